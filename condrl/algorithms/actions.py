"""Roll-outs that explore in the action: the score is drawn, a ~ N(mu, Sigma_k I), and then used."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from condrl.diffusion.noise import Noise, start_noise
from condrl.diffusion.policy import Policy
from condrl.diffusion.rollout import Rollout


@dataclass(frozen=True, kw_only=True)
class Actions(Rollout):
    """Trajectories with the scores that were used; `log_probs` are those of the actions."""

    means: Tensor  # (K, B, ...) the policy's scores
    actions: Tensor  # (K, B, ...)


@dataclass(frozen=True, kw_only=True)
class Pairs(Actions):
    """Single steps from noised points; `states` are where they start, and where the last one ends."""

    nexts: Tensor  # (K, B, d) where each step ends
    scores: Tensor  # (K, B, d) of where it starts, given its point


def action_variance(policy: Policy, exploration: float) -> Tensor:
    """Sigma_k = exploration / (2 g^2) of each step, (K,): the shape of the best one (Gao et al. 2024, eq. 21)."""
    return exploration / (2 * policy.model.schedule.g2(policy.sampler.times[:-1]))


def action_log_prob(mean: Tensor, action: Tensor, variance: Tensor) -> Tensor:
    """log N(action; mean, variance I) but for its constant, (B,) float64, for variances (B,)."""
    error = (action - mean).square().flatten(1).sum(1, dtype=torch.float64)
    return -error / (2 * variance.to(error))


@torch.no_grad()
def explore(
    policy: Policy, condition: Tensor, noise: Noise, batch: int, variance: Tensor, rest: Tensor | None = None
) -> Actions:
    """Trajectories for conditions (B,), `batch` at a time, with actions of variances (K,).

    `rest` (K,) is the std of the noise that is added to the state beside; None: the sampler's. The sampler's steps must
    be affine in the score.
    """
    rows = [slice(start, start + batch) for start in range(0, len(condition), batch)]
    with policy.rolling_out():
        parts = [_explore(policy, condition[part], noise[part], variance, rest) for part in rows]
    names = ("states", "log_probs", "means", "actions")
    whole = {name: torch.cat([getattr(part, name) for part in parts], 1) for name in names}
    return Actions(condition=condition, **whole)


def _explore(policy: Policy, condition: Tensor, noise: Noise, variance: Tensor, rest: Tensor | None) -> Actions:
    sampler, model = policy.sampler.affine, policy.model
    assert sampler is not None  # needs
    shape = (len(condition), *model.state_shape)
    x = start_noise(shape, noise, model.device) * model.schedule.prior_std
    draws = noise.normal((policy.steps, 2, *model.state_shape)).transpose(0, 1).to(model.device)
    states, means, actions = [x], [], []
    beside = sampler.S if rest is None else rest
    steps = zip(*(c.tolist() for c in (sampler.A, sampler.B, beside, variance.sqrt())), strict=True)
    for k, (A, B, S, std) in enumerate(steps):
        means.append(policy.action(x, torch.full((len(x),), k), condition))
        actions.append(means[-1] + std * draws[k, :, 0])
        x = A * x + B * actions[-1] + S * draws[k, :, 1]
        states.append(x)
    log_probs = action_log_prob(
        torch.stack(means).flatten(0, 1), torch.stack(actions).flatten(0, 1), variance.repeat_interleave(len(x))
    )
    return Actions(
        torch.stack(states),
        log_probs.view(policy.steps, -1),
        condition,
        means=torch.stack(means),
        actions=torch.stack(actions),
    )


@torch.no_grad()
def noised_pairs(policy: Policy, data: Tensor, condition: Tensor, noise: Noise, variance: Tensor) -> Pairs:
    """A step at each time from alpha x_0 + sigma eps, with x_0 of the condition's `data` (C, n, d), and its own action.

    The action, of variance (K,), does not know x_0; the sampler's steps must be affine in the score.
    """
    sampler, schedule = policy.sampler.affine, policy.model.schedule
    assert sampler is not None  # needs
    count, steps = len(condition), policy.steps
    drawn = (noise.uniform((steps,)).T * data.shape[1]).long().to(data.device)  # (K, B)
    eps, explored, moved = noise.normal((steps, 3, data.shape[2])).permute(2, 1, 0, 3).to(data.device)
    alpha, sigma = (c(sampler.times[:-1]).to(data)[:, None, None] for c in (schedule.alpha, schedule.sigma))
    x = alpha * data[condition.to(data.device), drawn] + sigma * eps
    k = torch.arange(steps).repeat_interleave(count)
    means = policy.action(x.flatten(0, 1), k, condition.repeat(steps)).view_as(x)
    actions = means + variance.sqrt().to(x)[:, None, None] * explored
    A, B, S = (c.to(x)[:, None, None] for c in (sampler.A, sampler.B, sampler.S))
    nexts = A * x + B * actions + S * moved
    log_probs = action_log_prob(means.flatten(0, 1), actions.flatten(0, 1), variance.repeat_interleave(count))
    return Pairs(
        torch.cat([x, nexts[-1:]]),
        log_probs.view(steps, count),
        condition,
        means=means,
        actions=actions,
        nexts=nexts,
        scores=-eps / sigma,
    )


@torch.no_grad()
def pretrained_scores(policy: Policy, rollout: Rollout, batch: int) -> Tensor:
    """The pretrained model's scores at the visited states, (K, B, ...), `batch` images at a time."""
    found = torch.empty_like(rollout.states[1:])
    with policy.model.reference(), policy.model.merged():
        for k in range(policy.steps):
            for images in torch.arange(len(rollout.condition)).split(batch):
                rows = images.to(found.device)
                step = rollout.states[k, rows], torch.full((len(images),), k), rollout.condition[images]
                found[k, rows] = policy.action(*step)
    return found
