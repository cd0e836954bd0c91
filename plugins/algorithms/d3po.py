"""D3PO: preferences between the policy's own images, by the denoising steps that made them (Yang et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

import condrl
from condrl.algorithms.base import Algorithm, Experience
from condrl.algorithms.examples import Examples, Metrics, per_image
from condrl.algorithms.needs import Need, groups, noisy_steps, trained_steps
from condrl.algorithms.preferences import contests, extremes, odds, preference_loss
from condrl.config import TrainConfig
from condrl.diffusion.noise import Noise
from condrl.diffusion.path_kl import base_log_probs
from condrl.diffusion.policy import Policy


@dataclass(frozen=True, kw_only=True)
class StepPairs(Examples):
    """An epoch's trajectories, and the two of them that each image compares."""

    pair: Tensor = per_image()  # (B, 2) the images that are the better and the worse one of its set
    preferred: Tensor | None = per_image(default=None)  # the probability that the first is the better one; None: 1
    states: Tensor  # (K + 1, B, ...)
    base_log_prob: Tensor  # (K, B) of the pretrained model
    solver_states: Tensor | None

    def log_ratios(self, policy: Policy) -> Tensor:
        """log p_theta / p_pre of both images' steps (n, 2), of pairs."""
        k, images = self.k.repeat_interleave(2).to(self.states.device), self.pair.flatten().to(self.states.device)
        solver_state = None if self.solver_states is None else self.solver_states[k, images]
        condition = self.condition.repeat_interleave(2)
        transition = policy.transition(self.states[k, images], k.cpu(), condition, solver_state)
        return (transition.log_prob(self.states[k + 1, images]) - self.base_log_prob[k, images]).view(-1, 2)


@condrl.algorithm(name="d3po")
@dataclass(kw_only=True)
class D3PO(Algorithm):
    """-log sigmoid of kappa times the difference of two images' log-ratios, step by step (docs/theory.md 16).

    Each step has the whole preference to explain, so that kappa is exact to first order in r / kappa. A pair is taken
    up by every image of its set: with `train.steps_per_image` each of them draws other steps.
    """

    kappa: float = 0.1  # reward per nat of path KL to the pretrained model
    contest: int = 2  # images of a prompt of which the best and the worst are a pair
    soft: bool = True  # a pair is preferred with odds exp(r - r'); false: the better one always, as published
    clip_range: float | None = None  # bound on |log p / p_pre| of a step, nats, beyond which it teaches nothing

    def __post_init__(self) -> None:
        self.require_positive("kappa", *(("clip_range",) if self.clip_range is not None else ()))
        self.require_at_least(2, "contest")

    @property
    def needs(self) -> tuple[Need, ...]:
        return (noisy_steps, groups, contests(self.contest))

    def examples(self, policy: Policy, experience: Experience, train: TrainConfig, noise: Noise) -> StepPairs:
        r, rewards = experience.rollout, experience.scores.total
        pairs = extremes(rewards, self.contest)
        return StepPairs(
            condition=r.condition,
            k=trained_steps(policy.sampler, train),
            pair=pairs,
            preferred=odds(rewards, pairs) if self.soft else None,
            states=r.states,
            base_log_prob=base_log_probs(policy, r, train.rollout_batch),
            solver_states=r.solver_states,
        )

    def loss(self, policy: Policy, batch: StepPairs) -> tuple[Tensor, Metrics]:
        """The preference loss of each image's pair at one step, (B,)."""
        ratios = batch.log_ratios(policy).float()
        if self.clip_range is not None:
            ratios = ratios.clamp(-self.clip_range, self.clip_range)
        return preference_loss(self.kappa * (ratios[:, 0] - ratios[:, 1]), batch.preferred)
