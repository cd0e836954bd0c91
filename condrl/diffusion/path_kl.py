"""The KL between the policy's chain and the pretrained model's, step by step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from condrl.diffusion.policy import Policy
from condrl.diffusion.rollout import Rollout


@dataclass(frozen=True)
class PathKL:
    """The pretrained model's distributions along trajectories, and the KL of each of their steps."""

    means: Tensor  # (K, B, ...)
    stds: Tensor  # (K, B)
    kl: Tensor  # (K, B) nats, 0 where a step is deterministic

    @property
    def to_go(self) -> Tensor:
        """(K, B) the sum over the steps after k."""
        return remaining(self.kl) - self.kl


def remaining(costs: Tensor) -> Tensor:
    """(K, B) the sums of costs (K, B) over step k and the later ones."""
    return costs.flip(0).cumsum(0).flip(0)


@torch.no_grad()
def path_kl(policy: Policy, rollout: Rollout, batch: int) -> PathKL:
    """KL(current || pretrained) of each step at the visited states, `batch` images at a time (docs/theory.md 5)."""
    count = len(rollout.condition)
    means = torch.zeros_like(rollout.states[1:])
    stds, kl = (means.new_zeros(policy.steps, count) for _ in range(2))
    for k in policy.sampler.stochastic.nonzero().flatten().tolist():
        for start in range(0, count, batch):
            rows = slice(start, start + batch)
            x, condition = rollout.states[k, rows], rollout.condition[rows]
            solver_state = None if rollout.solver_states is None else rollout.solver_states[k, rows]
            step = x, torch.full((len(x),), k), condition, solver_state
            transition = policy.transition(*step)
            with policy.model.reference():
                base = policy.transition(*step)
            means[k, rows], stds[k, rows], kl[k, rows] = base.mean, base.std.flatten(), transition.kl(base)
    return PathKL(means, stds, kl)


@torch.no_grad()
def base_log_probs(policy: Policy, rollout: Rollout, batch: int) -> Tensor:
    """The pretrained model's log-probabilities (K, B) of a roll-out's steps, nats in float64, `batch` images at a time.

    They are 0 where a step is deterministic.
    """
    found = torch.zeros_like(rollout.log_probs)
    for k in policy.sampler.stochastic.nonzero().flatten().tolist():
        for images in torch.arange(len(rollout.condition)).split(batch):
            rows, k_each = images.to(found.device), torch.full((len(images),), k)
            place = rollout.place(k, rows)
            with policy.model.reference():
                base = policy.transition(place.x, k_each, rollout.condition[images], place.solver_state)
            found[k, rows] = base.log_prob(rollout.states[k + 1, rows])
    return found
