"""Roll-outs that explore in the action: the score is drawn, a ~ N(mu, Sigma_k I), and then used."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from condrl.policy import Policy
from condrl.rollout import Rollout
from condrl.transition import Coefficients, randn


@dataclass(frozen=True, kw_only=True)
class Actions(Rollout):
    """Trajectories with the scores that were used; `log_probs` are those of the actions."""

    means: Tensor  # (K, B, ...) the policy's scores
    actions: Tensor  # (K, B, ...)


def action_variance(policy: Policy, exploration: float) -> Tensor:
    """Sigma_k = exploration / (2 g^2) of each step, (K,): the shape of the best one (Gao et al. 2024, eq. 21)."""
    return exploration / (2 * policy.model.schedule.g2(policy.sampler.times[:-1]))


def action_log_prob(mean: Tensor, action: Tensor, variance: Tensor) -> Tensor:
    """log N(action; mean, variance I) but for its constant, (B,) float64, for variances (B,)."""
    error = (action - mean).square().flatten(1).sum(1, dtype=torch.float64)
    return -error / (2 * variance.to(error))


@torch.no_grad()
def explore(policy: Policy, condition: Tensor, generator: torch.Generator, batch: int, variance: Tensor) -> Actions:
    """Trajectories for conditions (B,), `batch` at a time, with actions of variances (K,).

    The sampler's steps must be affine in the score.
    """
    parts = [_explore(policy, part, generator, variance) for part in condition.split(batch)]
    names = ("states", "log_probs", "means", "actions")
    whole = {name: torch.cat([getattr(part, name) for part in parts], 1) for name in names}
    return Actions(condition=condition, **whole)


def _explore(policy: Policy, condition: Tensor, generator: torch.Generator, variance: Tensor) -> Actions:
    sampler, model = policy.sampler, policy.model
    assert isinstance(sampler, Coefficients)
    shape = (len(condition), *model.state_shape)
    x = randn(shape, generator, model.device) * model.schedule.prior_std
    noise = randn((policy.steps, 2, *shape), generator, model.device)
    states, means, actions = [x], [], []
    steps = zip(*(c.tolist() for c in (sampler.A, sampler.B, sampler.S, variance.sqrt())), strict=True)
    for k, (A, B, S, std) in enumerate(steps):
        means.append(policy.action(x, torch.full((len(x),), k), condition))
        actions.append(means[-1] + std * noise[k, 0])
        x = A * x + B * actions[-1] + S * noise[k, 1]
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
def pretrained_scores(policy: Policy, rollout: Rollout, batch: int) -> Tensor:
    """The pretrained model's scores at the visited states, (K, B, ...), `batch` images at a time."""
    found = torch.empty_like(rollout.states[1:])
    with policy.model.reference():
        for k in range(policy.steps):
            for images in torch.arange(len(rollout.condition)).split(batch):
                rows = images.to(found.device)
                place = rollout.states[k, rows], torch.full((len(images),), k), rollout.condition[images]
                found[k, rows] = policy.action(*place)
    return found
