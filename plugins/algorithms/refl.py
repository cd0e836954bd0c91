"""ReFL: the reward of the denoised prediction at one late step, back through that step alone (Xu et al. 2023)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import condrl
from condrl.algorithms.base import Algorithm, Experience
from condrl.algorithms.examples import Metrics, per_image
from condrl.algorithms.needs import Need, one_pass, reward_gradients
from condrl.algorithms.reward_gradient import Scored
from condrl.config import TrainConfig
from condrl.diffusion.noise import Noise
from condrl.diffusion.policy import Policy


@dataclass(frozen=True, kw_only=True)
class LateStates(Scored):
    """A state of each image before one of its late steps, which is one step of learning."""

    x: Tensor = per_image()
    step: Tensor = per_image()  # (B,)
    solver_state: Tensor | None = per_image(default=None)


@condrl.algorithm(name="refl")
@dataclass(kw_only=True)
class ReFL(Algorithm):
    """Maximises the reward of the denoised prediction at a random late step (Xu et al. 2023; docs/theory.md 14).

    Nothing keeps it near the pretrained model: each late step comes to denoise to where the reward is highest. It is no
    estimate of E r - kappa KL, so there is no kappa; a run ends early, or by train.kl_budget.
    """

    last: int | None = None  # steps that one is drawn from for each image, counted from the end; null: a quarter

    def __post_init__(self) -> None:
        if self.last is not None:
            self.require_at_least(1, "last")

    @property
    def needs(self) -> tuple[Need, ...]:
        return (reward_gradients, one_pass)

    def examples(self, policy: Policy, experience: Experience, train: TrainConfig, noise: Noise) -> LateStates:
        r, images = experience.rollout, torch.arange(len(experience.rollout.condition))
        among = min(self.last or math.ceil(policy.steps / 4), policy.steps)
        step = policy.steps - 1 - (noise.uniform(()) * among).long()
        return LateStates(
            condition=r.condition,
            k=torch.zeros(1, dtype=torch.long),
            images=images,
            experience=experience,
            x=r.states[step, images],
            step=step,
            solver_state=None if r.solver_states is None else r.solver_states[step, images],
        )

    def loss(self, policy: Policy, batch: LateStates) -> tuple[Tensor, Metrics]:
        """-r of the denoised prediction, (B,)."""
        denoised = policy.transition(batch.x, batch.step, batch.condition, batch.solver_state).denoised
        return -batch.score(policy.model.decode(denoised)), {}
