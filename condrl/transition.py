"""The affine Gaussian step x' ~ N(A x + B a, S^2 I): its mean, sample, log-probability and KL divergence.

An action `a` is a score. A sampler is the three numbers (A, B, S) of every step; whatever is learned, measured or
differentiated follows from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from condrl.config import TrainConfig
from condrl.errors import UsageError
from condrl.schedule import Schedule, like

Act = Callable[[Tensor, Tensor], Tensor]  # (x, t) -> score


@dataclass(frozen=True)
class Transition:
    """The law N(mean, std^2 I) of the next state; mean (B, ...), std broadcastable to it."""

    mean: Tensor
    std: Tensor
    memory: Tensor | None = None  # what a multi-step sampler hands on to its next step, (B, ...)

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean + self.std * noise

    def log_prob(self, x: Tensor) -> Tensor:
        """log N(x; mean, std^2 I) in nats, summed over dimensions in float64, (B,).

        The ratio of two such sums is near 1 while each sum is thousands of nats: float32 would round it away.
        """
        z = (x - self.mean) / self.std
        constant = self.std.log() + 0.5 * math.log(2 * math.pi)
        return -(0.5 * z.square() + constant).flatten(1).sum(1, dtype=torch.float64)

    def kl(self, other: Transition) -> Tensor:
        """KL(self || other) in nats, summed over dimensions, (B,)."""
        ratio = self.std / other.std
        shift = (self.mean - other.mean) / other.std
        return (0.5 * (ratio.square() + shift.square() - 1) - ratio.log()).expand_as(shift).flatten(1).sum(1)


class Sampler(Protocol):
    """What a sampler plugin returns: times (K + 1,) and the law of each of its K steps."""

    @property
    def times(self) -> Tensor: ...

    @property
    def stochastic(self) -> Tensor:
        """(K,) bool: the steps that have a log-probability."""
        ...

    def step(self, k: Tensor, x: Tensor, act: Act, memory: Tensor | None = None) -> Transition:
        """The law of the state after step k (B,) from x (B, ...), calling `act` for scores."""
        ...


@dataclass(frozen=True)
class Coefficients:
    """A one-stage sampler: x_{k+1} ~ N(A_k x_k + B_k a_k, S_k^2 I), a_k the score at (x_k, times[k])."""

    times: Tensor  # (K + 1,) float64
    A: Tensor  # (K,)
    B: Tensor  # (K,)
    S: Tensor  # (K,)
    eta: Tensor | None = None  # (K,) noise levels, 1 for the reverse SDE; None where that is not known

    @property
    def stochastic(self) -> Tensor:
        return self.S > 0

    def step(self, k: Tensor, x: Tensor, act: Act, memory: Tensor | None = None) -> Transition:
        action = act(x, self.times[k])
        A, B, S = (like(c[k], x) for c in (self.A, self.B, self.S))
        return Transition(A * x + B * action, S)


def euler_maruyama(schedule: Schedule, times: Tensor, eta: Tensor | float) -> Coefficients:
    """S1: A = 1 - f D, B = (1 + eta^2) g^2 D / 2, S = eta g sqrt(D), for any noise level eta >= 0 (THEORY 1.3)."""
    t, step = times[:-1], times[:-1] - times[1:]
    level = torch.as_tensor(eta, dtype=t.dtype).expand(len(t))
    churn = level.square() * schedule.churn(times) * step
    return Coefficients(times, 1 - schedule.f(t) * step, (schedule.g2(t) * step + churn) / 2, churn.sqrt(), level)


@dataclass(frozen=True)
class Overshoot:
    """S4: any deterministic solver, made stochastic by going too far and adding noise back (THEORY 1.3).

    From t it goes to w with lambda_w = lambda_u + eta^2 h, then noise brings w back to u: an exact Gaussian law.
    """

    schedule: Schedule
    times: Tensor  # (K + 1,)
    eta: Tensor  # (K,)
    solver: Callable[[Tensor, Tensor, Tensor, Act], Tensor]  # (x, t, w, act) -> the state at w

    @cached_property
    def aims(self) -> Tensor:
        """(K,) the times w."""
        t, u = self.times[:-1], self.times[1:]
        level = self.schedule.log_snr(u)
        aim = self.schedule.time_of(level + self.eta**2 * (level - self.schedule.log_snr(t)))
        return u.where((self.eta == 0) | (u == 0), aim)

    @property
    def stochastic(self) -> Tensor:
        return self.aims < self.times[1:]

    def step(self, k: Tensor, x: Tensor, act: Act, memory: Tensor | None = None) -> Transition:
        t, u, w = self.times[k], self.times[k + 1], self.aims[k]
        alpha_u, alpha_w, sigma_u, sigma_w = (
            like(c, x) for c in (self.schedule.alpha(u), self.schedule.alpha(w), *map(self.schedule.sigma, (u, w)))
        )
        back = alpha_u / alpha_w
        std = (sigma_u.square() - (back * sigma_w).square()).clamp(min=0).sqrt()
        return Transition(back * self.solver(x, t, w, act), std)


def windowed(noisy: Any, quiet: Any, steps: Sequence[int]) -> Any:
    """A sampler that is `noisy` at the chosen steps and `quiet` at the others (THEORY 7.5, partial SDE).

    Both are dataclasses of one plugin; whatever they hold per step, (K,), is taken from one or the other.
    """
    count = len(noisy.times) - 1
    mask = torch.zeros(count, dtype=torch.bool)
    mask[list(steps)] = True
    chosen = {}
    for field in fields(noisy):
        first, second = getattr(noisy, field.name), getattr(quiet, field.name)
        if isinstance(first, Tensor) and first.shape == (count,):
            chosen[field.name] = first.where(mask, second)
    return replace(noisy, **chosen)


def trained_steps(sampler: Sampler, train: TrainConfig) -> Tensor:
    """The steps that have a log-probability and that the config trains.

    Raises: UsageError when the config names another step, or wants more per image than there are.
    """
    stochastic = sampler.stochastic.nonzero().flatten().tolist()
    chosen = stochastic if train.steps is None else train.steps
    wrong = sorted(set(chosen) - set(stochastic))
    if wrong or not chosen:
        raise UsageError(f"config train.steps: {wrong or chosen} are not among the steps with noise, {stochastic}")
    if train.steps_per_image is not None and not 1 <= train.steps_per_image <= len(chosen):
        raise UsageError(f"config train.steps_per_image: {train.steps_per_image} of the {len(chosen)} trained steps")
    return torch.tensor(sorted(set(chosen)))
