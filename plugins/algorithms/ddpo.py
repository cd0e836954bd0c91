"""DDPO: policy gradients on denoising steps, importance-sampled and clipped (Black et al. 2024)."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

import condrl
from condrl.algorithms.credit import PromptTracker
from condrl.algorithms.examples import Metrics
from condrl.algorithms.needs import Need, noisy_steps
from condrl.algorithms.policy_gradient import ClippedPolicyGradient, Steps
from condrl.diffusion.policy import Policy
from condrl.diffusion.transition import Transition


@condrl.algorithm
@dataclass(kw_only=True)
class DDPO(ClippedPolicyGradient):
    """DDPO-IS: clipped importance-weighted policy gradient on any subset of steps (Black et al. 2024, eq. 5)."""

    advantage: Literal["group", "prompt"] = "group"  # against the epoch's images of a prompt, or its last rewards
    tracker_length: int = 32  # rewards remembered per prompt by advantage=prompt
    tracker_least: int = 16  # until this many are known, advantage=prompt standardises over the epoch
    balance_steps: bool = False  # weigh steps so that the noise of their gradients is alike at the network's output

    tracker: PromptTracker = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kappa and self.advantage == "prompt":
            raise condrl.UsageError("config algorithm: kappa needs advantage=group")
        if self.advantage == "prompt" and (not self.normalise or self.leave_one_out):
            raise condrl.UsageError("config algorithm: normalise and leave_one_out need advantage=group")
        self.tracker = PromptTracker(self.tracker_length, self.tracker_least)

    def state_dict(self) -> dict[str, Any]:
        return self.tracker.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tracker.load_state_dict(state)

    @property
    def needs(self) -> tuple[Need, ...]:
        return super().needs if self.advantage == "group" else (noisy_steps,)

    def advantages(self, rewards: Tensor, groups: Tensor) -> Tensor:
        if self.advantage == "group":
            return super().advantages(rewards, groups)
        return self.bounded(self.tracker.advantages(rewards, groups.tolist()))

    def surrogate(self, policy: Policy, transition: Transition, batch: Steps) -> tuple[Tensor, Metrics]:
        loss, metrics = super().surrogate(policy, transition, batch)
        if self.balance_steps:
            loss = loss * step_weights(policy)[batch.k].to(loss)
        return loss, metrics


def step_weights(policy: Policy) -> Tensor:
    """1 / (std of d log p / d output) of each step, (K,), the largest 1; zero where a step is deterministic.

    The score function of a step is z / S times d mean / d output (docs/theory.md 4). Where S is small,
    near the data, it is so noisy that it drowns the steps that decide what is in the image.
    """
    schedule, zero = policy.model.schedule, torch.zeros(policy.steps, 1, dtype=torch.float64)

    def transition(output: float) -> Transition:
        k, state = torch.arange(policy.steps), policy.sampler.init(zero)
        return policy.sampler.step(k, zero, lambda x, t: schedule.score(zero + output, x, t), state)[0]

    at_zero, at_one = transition(0.0), transition(1.0)
    weights = (at_one.std / (at_one.mean - at_zero.mean).abs()).flatten()
    return weights / weights.max()
