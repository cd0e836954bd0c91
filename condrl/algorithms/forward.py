"""Learning from samples that are noised again by the forward process."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from condrl.algorithms.base import Metrics
from condrl.diffusion.noise import Noise
from condrl.diffusion.policy import Policy
from condrl.diffusion.rollout import Rollout
from condrl.diffusion.schedule import like


@dataclass(frozen=True)
class Noised:
    """B draws of the forward process, x = alpha(t) x_N + sigma(t) noise, from the policy's own samples x_N."""

    x: Tensor  # (B, ...)
    t: Tensor  # (B,) float64
    noise: Tensor  # (B, ...)
    old_score: Tensor  # (B, ...) at (x, t), of the policy that made the samples
    advantage: Tensor  # (B,)
    condition: Tensor  # (B,)


@dataclass(frozen=True)
class NoisedSamples:
    """An epoch's final states, each noised n times; a column is a draw."""

    draws: Noised  # (n * B, ...): every image's first draw, then every image's second, ...
    columns: Tensor  # (n,)
    metrics: Metrics = field(default_factory=dict)

    @property
    def images(self) -> int:
        return len(self.draws.t) // len(self.columns)

    def minibatch(self, images: Tensor, columns: Tensor) -> Noised:
        rows = columns * self.images + images
        values = (getattr(self.draws, f.name) for f in fields(Noised))
        return Noised(*(value[rows.to(value.device)] for value in values))


@torch.no_grad()
def noised_samples(
    policy: Policy,
    rollout: Rollout,
    advantages: Tensor,
    draws: int,
    times: tuple[float, float],
    batch: int,
    noise: Noise,
) -> NoisedSamples:
    """Noise each final state `draws` times, at times stratified over a range of shares of the schedule's time.

    `advantages` (B,) are those of the images.
    """
    clean, condition, schedule = rollout.samples, rollout.condition, policy.model.schedule
    low, high = times
    strata = (torch.arange(draws)[:, None] + noise.uniform((draws,)).T).flatten() / draws
    t = schedule.end * (low + (high - low) * strata).double()
    errors = noise.normal((draws, *clean.shape[1:])).transpose(0, 1).flatten(0, 1).to(clean.device)
    clean, condition, advantage = (torch.cat([v] * draws) for v in (clean, condition, advantages))
    alpha, sigma = (like(c, clean) for c in (schedule.alpha(t), schedule.sigma(t)))
    x = alpha * clean + sigma * errors
    with policy.model.merged():
        parts = [
            policy.model.score(*part)
            for part in zip(x.split(batch), t.split(batch), condition.split(batch), strict=True)
        ]
    return NoisedSamples(Noised(x, t, errors, torch.cat(parts), advantage, condition), torch.arange(draws))
