"""Adjoint matching: a regression onto the optimal control (Domingo-Enrich et al. 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import condrl
from condrl.algorithms.base import Algorithm, Examples, Experience, Metrics, Need, trained_steps
from condrl.config import TrainConfig
from condrl.diffusion.noise import Noise
from condrl.diffusion.policy import Policy
from condrl.diffusion.rollout import Rollout


@dataclass(frozen=True)
class Targets:
    """B (image, step) pairs."""

    x: Tensor  # (B, ...)
    k: Tensor  # (B,)
    mean: Tensor  # (B, ...) that the step should have
    condition: Tensor  # (B,)


@dataclass(frozen=True)
class TargetTable:
    """The steps of an epoch's images; a column is a step."""

    rollout: Rollout
    means: Tensor  # (K, B, ...)
    columns: Tensor  # (n,)
    metrics: Metrics = field(default_factory=dict)

    @property
    def images(self) -> int:
        return len(self.rollout.condition)

    def minibatch(self, images: Tensor, columns: Tensor) -> Targets:
        k, i = columns.to(self.means.device), images.to(self.means.device)
        return Targets(self.rollout.states[k, i], columns, self.means[k, i], self.rollout.condition[images])


@condrl.algorithm
@dataclass(kw_only=True)
class AdjointMatching(Algorithm):
    """E r - kappa KL by matching each step to its lean adjoint (Domingo-Enrich et al. 2025; THEORY 7.3).

    The adjoint is -grad r / kappa at the sample, carried back through the pretrained chain; a step should then move its
    mean by -S^2 times the adjoint of the next state. The only fixed point is the optimum, at every number of steps.
    """

    kappa: float = 1.0  # reward per nat of path KL to the pretrained model

    def __post_init__(self) -> None:
        self.require_positive("kappa")

    @property
    def needs(self) -> Sequence[Need]:
        return ("reward gradients", "stochastic steps", "Markov steps")

    def examples(self, policy: Policy, experience: Experience, train: TrainConfig, noise: Noise) -> Examples:
        r, means = experience.rollout, torch.empty_like(experience.rollout.states[1:])
        for images in torch.arange(len(r.condition)).split(min(train.rollout_batch, train.loss_batch)):
            rows = images.to(means.device)
            for k, mean in self._targets(policy, r.states[:, rows], r.condition[images], images, experience):
                means[k, rows] = mean
        return TargetTable(r, means, trained_steps(policy.sampler, train))

    def _targets(
        self, policy: Policy, states: Tensor, condition: Tensor, images: Tensor, experience: Experience
    ) -> list[tuple[int, Tensor]]:
        """Each step with the mean it should have, (B, ...), from the last to the first."""
        found = []
        x = states[-1].requires_grad_()
        reward = experience.score(policy.model.decode(x), images).sum()
        adjoint = -torch.autograd.grad(reward, x)[0] / self.kappa
        for k in reversed(range(policy.steps)):
            x = states[k].requires_grad_()
            with policy.model.reference():
                base = policy.transition(x, torch.full((len(x),), k), condition)
            found.append((k, base.mean.detach() - base.std.square() * adjoint))
            (adjoint,) = torch.autograd.grad(base.mean, x, adjoint)
        return found

    def loss(self, policy: Policy, batch: Targets) -> tuple[Tensor, Metrics]:
        """|mean - target|^2 / 2 S^2 of each step, (B,), nats."""
        transition = policy.transition(batch.x, batch.k, batch.condition)
        return ((transition.mean - batch.mean) / transition.std).square().flatten(1).sum(1) / 2, {}
