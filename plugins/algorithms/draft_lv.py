"""DRaFT-LV: the reward's gradient through the last step alone, from several noisy versions of a sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import condrl
from condrl.algorithms.base import Algorithm, Experience
from condrl.algorithms.examples import Metrics, per_step
from condrl.algorithms.forward import noised
from condrl.algorithms.needs import Need, markov_steps, one_pass, reward_gradients
from condrl.algorithms.reward_gradient import Scored
from condrl.config import TrainConfig
from condrl.diffusion.noise import Noise
from condrl.diffusion.policy import Policy


@dataclass(frozen=True, kw_only=True)
class Renoised(Scored):
    """States before the last step that the samples might have come from; a step of learning is a draw."""

    x: Tensor = per_step()
    noise: Tensor = per_step()  # of the last step, where it has some


@condrl.algorithm(name="draft_lv")
@dataclass(kw_only=True)
class DRaFTLV(Algorithm):
    """Maximises E r through the last step, from several draws of its start (Clark et al. 2024; docs/theory.md 14).

    The draws are the policy's own samples, noised to the time before the last step. As with `draft` and last=1, the
    earlier steps are taken as given; several gradients of an image vary less than one, at no further roll-out.
    """

    draws: int = 2  # noisy versions of each sample

    def __post_init__(self) -> None:
        self.require_positive("draws")

    @property
    def needs(self) -> tuple[Need, ...]:
        return (reward_gradients, markov_steps, one_pass)

    def examples(self, policy: Policy, experience: Experience, train: TrainConfig, noise: Noise) -> Renoised:
        clean, condition = experience.rollout.samples, experience.rollout.condition
        t = policy.sampler.times[-2].expand(len(clean))
        shape = (2, self.draws, *clean.shape[1:])
        before, after = noise.normal(shape).movedim(0, 2).to(clean.device)
        return Renoised(
            condition=condition,
            k=torch.arange(self.draws),
            images=torch.arange(len(clean)),
            experience=experience,
            x=torch.stack([noised(policy.model.schedule, clean, t, one) for one in before]),
            noise=after,
        )

    def loss(self, policy: Policy, batch: Renoised) -> tuple[Tensor, Metrics]:
        """-r / draws of each draw, (B,)."""
        last = torch.full((len(batch.x),), policy.steps - 1)
        samples = policy.transition(batch.x, last, batch.condition).sample(batch.noise)
        return -batch.score(policy.model.decode(samples)) / self.draws, {}
