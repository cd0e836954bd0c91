"""Learning from samples that are noised again by the forward process."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from condrl.algorithms.examples import Examples, per_image, per_step
from condrl.diffusion.noise import Noise
from condrl.diffusion.policy import Policy
from condrl.diffusion.rollout import Rollout
from condrl.diffusion.schedule import Schedule, like


@dataclass(frozen=True, kw_only=True)
class Noised(Examples):
    """Draws x = alpha(t) x_N + sigma(t) noise of the forward process from the policy's samples; a step is a draw."""

    x: Tensor = per_step()
    t: Tensor = per_step()  # float64
    noise: Tensor = per_step()
    old_score: Tensor = per_step()  # at (x, t), of the policy that made the samples
    advantage: Tensor = per_step()
    base_score: Tensor | None = per_step(default=None)  # at (x, t), of the policy that the loss keeps near
    reward: Tensor | None = per_image(default=None)  # less its prompt's mean: what a value network should predict
    hint: Tensor | None = per_step(default=None)  # that of the old score's denoised prediction


@torch.no_grad()
def noised_samples(
    policy: Policy,
    rollout: Rollout,
    advantages: Tensor,
    draws: int,
    times: tuple[float, float],
    batch: int,
    noise: Noise,
) -> Noised:
    """Noise each final state `draws` times, at times stratified over a range of shares of the schedule's time.

    `advantages` (B,) are those of the images.
    """
    clean, schedule = rollout.samples, policy.model.schedule
    low, high = times
    strata = (torch.arange(draws)[:, None] + noise.uniform((draws,)).T) / draws
    t = schedule.end * (low + (high - low) * strata).double()  # (draws, B)
    errors = noise.normal((draws, *clean.shape[1:])).transpose(0, 1).to(clean.device)
    x = noised(schedule, clean.expand_as(errors).flatten(0, 1), t.flatten(), errors.flatten(0, 1)).view_as(errors)
    found = Noised(
        condition=rollout.condition,
        k=torch.arange(draws),
        x=x,
        t=t,
        noise=errors,
        old_score=x,
        advantage=advantages.expand(draws, -1),
    )
    return replace(found, old_score=scores_at(policy, found, batch))


@torch.no_grad()
def scores_at(policy: Policy, draws: Noised, batch: int) -> Tensor:
    """The policy's scores (n, B, ...) at the draws, `batch` at a time."""
    x, t = draws.x.flatten(0, 1), draws.t.flatten()
    condition = draws.condition.repeat(len(draws.t))
    with policy.model.merged():
        parts = zip(x.split(batch), t.split(batch), condition.split(batch), strict=True)
        return torch.cat([policy.model.score(*part) for part in parts]).view_as(draws.x)


def noised(schedule: Schedule, clean: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """alpha(t) clean + sigma(t) noise, (B, ...) at times (B,)."""
    return like(schedule.alpha(t), clean) * clean + like(schedule.sigma(t), clean) * noise
