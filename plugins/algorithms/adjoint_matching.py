"""Adjoint matching: a regression onto the optimal control (Domingo-Enrich et al. 2025)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

import condrl
from condrl.algorithms.base import Algorithm, Experience
from condrl.algorithms.examples import Examples, Metrics, per_step
from condrl.algorithms.needs import Need, markov_steps, noisy_steps, reward_gradients, trained_steps
from condrl.config import TrainConfig
from condrl.diffusion.noise import Noise
from condrl.diffusion.policy import Policy
from condrl.diffusion.transition import Transition


def lean(policy: Policy, x: Tensor, k: Tensor, condition: Tensor, base: Transition, later: Tensor) -> Tensor:
    """The adjoint (B, ...) at x (B, ...) of that at the next state, through the pretrained step alone."""
    return torch.autograd.grad(base.mean, x, later)[0]


def continuous(policy: Policy, x: Tensor, k: Tensor, condition: Tensor, base: Transition, later: Tensor) -> Tensor:
    """The same through the policy's step, and with the gradient of the step's own KL."""
    own = policy.transition(x, k, condition)
    cost = own.kl(base).sum() if policy.sampler.stochastic[k[0]] else 0.0  # a step without noise has none
    return torch.autograd.grad((own.mean * later).sum() + cost, x)[0]


ADJOINTS: dict[str, Callable[..., Tensor]] = {"lean": lean, "continuous": continuous}


@dataclass(frozen=True, kw_only=True)
class Targets(Examples):
    """The denoising steps of an epoch's images."""

    x: Tensor = per_step()
    mean: Tensor = per_step()  # that the step should have


@condrl.algorithm
@dataclass(kw_only=True)
class AdjointMatching(Algorithm):
    """E r - kappa KL by matching each step to its lean adjoint (Domingo-Enrich et al. 2025; docs/theory.md 15).

    The adjoint is -grad r / kappa at the sample, carried back through the pretrained chain; a step should then move its
    mean by -S^2 times the adjoint of the next state. The optimum is a fixed point at every number of steps, and the
    only one where kappa / S^2 exceeds the curvature of what is expected later, as in short steps. The continuous
    adjoint is the paper's baseline: the gradient is that of draft with the same kappa.
    """

    kappa: float = 1.0  # reward per nat of path KL to the pretrained model
    adjoint: Literal["lean", "continuous"] = "lean"  # back through the pretrained chain; or the policy's and its KL

    def __post_init__(self) -> None:
        self.require_positive("kappa")

    @property
    def needs(self) -> tuple[Need, ...]:
        return (reward_gradients, noisy_steps, markov_steps)

    def examples(self, policy: Policy, experience: Experience, train: TrainConfig, noise: Noise) -> Targets:
        r, means = experience.rollout, torch.empty_like(experience.rollout.states[1:])
        for images in torch.arange(len(r.condition)).split(min(train.rollout_batch, train.loss_batch)):
            rows = images.to(means.device)
            for k, mean in self._targets(policy, r.states[:, rows], r.condition[images], images, experience):
                means[k, rows] = mean
        return Targets(condition=r.condition, k=trained_steps(policy.sampler, train), x=r.states[:-1], mean=means)

    def _targets(
        self, policy: Policy, states: Tensor, condition: Tensor, images: Tensor, experience: Experience
    ) -> list[tuple[int, Tensor]]:
        """Each step with the mean it should have, (B, ...), from the last to the first."""
        found = []
        x = states[-1].requires_grad_()
        reward = experience.score(policy.model.decode(x), images).sum()
        adjoint = -torch.autograd.grad(reward, x)[0] / self.kappa
        for k in reversed(range(policy.steps)):
            x, steps = states[k].requires_grad_(), torch.full((len(condition),), k)
            with policy.model.reference():
                base = policy.transition(x, steps, condition)
            found.append((k, base.mean.detach() - base.std.square() * adjoint))
            adjoint = ADJOINTS[self.adjoint](policy, x, steps, condition, base, adjoint)
        return found

    def loss(self, policy: Policy, batch: Targets) -> tuple[Tensor, Metrics]:
        """|mean - target|^2 / 2 S^2 of each step, (B,), nats."""
        transition = policy.transition(batch.x, batch.k, batch.condition)
        return ((transition.mean - batch.mean) / transition.std).square().flatten(1).sum(1) / 2, {}
