"""DDPO: policy gradients on denoising steps, importance-sampled and clipped (Black et al. 2024)."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

import condrl
from condrl.credit import PromptTracker, group_advantages
from condrl.policy import Policy
from condrl.trainer import Metrics, Minibatch, Need
from condrl.transition import Transition

MAX_LOG_RATIO = 20.0  # nats: no float32 overflow where the min leaves the ratio unbounded (negative advantages)


@condrl.algorithm
@dataclass(kw_only=True)
class DDPO:
    """DDPO-IS: clipped importance-weighted policy gradient on any subset of steps (Black et al. 2024, eq. 5)."""

    clip_range: float = 0.2  # bound on |ratio - 1| for a step of 1/50 of the time; others scale with sqrt(step)
    advantage: Literal["group", "prompt"] = "group"  # against the epoch's images of a prompt, or its last rewards
    normalise: bool = True  # divide group advantages by the group's standard deviation
    leave_one_out: bool = False  # centre a group's reward on the mean of the others
    advantage_clip: float = 5.0  # bound on |advantage|
    tracker_length: int = 32  # rewards remembered per prompt by advantage=prompt
    tracker_least: int = 16  # until so many are known, advantage=prompt standardises over the epoch

    balance_steps: bool = False  # weigh steps so that the noise of their gradients is alike at the network's output

    tracker: PromptTracker = field(init=False)

    def __post_init__(self) -> None:
        self.tracker = PromptTracker(self.tracker_length, self.tracker_least)

    @property
    def needs(self) -> tuple[Need, ...]:
        return ("stochastic steps", "groups") if self.advantage == "group" else ("stochastic steps",)

    def advantages(self, rewards: Tensor, groups: Tensor) -> Tensor:
        """Advantages (B,) of rewards (B,) of prompt rows (B,)."""
        if self.advantage == "group":
            found = group_advantages(rewards, groups, self.normalise, self.leave_one_out)
        else:
            found = self.tracker.advantages(rewards, groups.tolist())
        return found.clamp(-self.advantage_clip, self.advantage_clip)

    def loss(self, policy: Policy, batch: Minibatch) -> tuple[Tensor, Metrics]:
        """PPO's loss of each (image, step) pair, (B,), with the min that keeps clipping one-sided."""
        log_prob = policy.transition(batch.x, batch.k, batch.condition).log_prob(batch.next_x)
        log_ratio = (log_prob - batch.old_log_prob).float()
        ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
        times = policy.sampler.times
        step = (times[batch.k] - times[batch.k + 1]) / times[0]
        bound = (self.clip_range * (50 * step).sqrt()).to(ratio)
        clipped = ratio.clamp(1 - bound, 1 + bound)
        loss = -torch.min(ratio * batch.advantage, clipped * batch.advantage)
        if self.balance_steps:
            loss = loss * step_weights(policy)[batch.k].to(loss)
        with torch.no_grad():
            return loss, {
                "approx_kl": (ratio - 1 - log_ratio).mean(),  # nats per step (Schulman 2020, k3)
                "clip_fraction": ((ratio - 1).abs() > bound).float().mean(),
            }


def step_weights(policy: Policy) -> Tensor:
    """1 / (std of d log p / d output) of each step, (K,), the largest 1; zero where a step is deterministic.

    The score function of a step is z / S times the mean's slope in the network's output (THEORY 4.1). Where S is small,
    near the data, it is so noisy that it drowns the steps that decide what is in the image.
    """
    schedule, zero = policy.model.schedule, torch.zeros(policy.steps, 1, dtype=torch.float64)

    def law(output: float) -> Transition:
        return policy.sampler.step(torch.arange(policy.steps), zero, lambda x, t: schedule.score(zero + output, x, t))

    at_zero, at_one = law(0.0), law(1.0)
    weights = (at_one.std / (at_one.mean - at_zero.mean).abs()).flatten()
    return weights / weights.max()
