"""The affine Gaussian step x' ~ N(A x + B a, S^2 I): its mean, sample, log-probability and KL divergence.

An action `a` is a score (condrl.diffusion.schedule says what it is where there is no signal). A sampler is the three
numbers (A, B, S) of every step; whatever is learned, measured or differentiated follows from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from condrl.diffusion.schedule import Schedule, like
from condrl.errors import UsageError

ModelFn = Callable[[Tensor, Tensor], Tensor]  # (x, t) -> action
Numbers = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]  # noise levels eta (K,) -> A, B, S (K,)


@dataclass(frozen=True)
class Transition:
    """The distribution N(mean, std^2 I) of the next state; mean (B, ...), std broadcastable to it."""

    mean: Tensor
    std: Tensor
    solver_state: Tensor | None = None  # what a multi-step sampler hands on to its next step, (B, ...)

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
    """What a sampler plugin returns: times (K + 1,) and the distribution of each of its K steps.

    For `sampler.noise_steps` it has `with_noise(mask)` as well: itself with noise at the steps in a mask (K,) alone.
    """

    @property
    def times(self) -> Tensor: ...

    @property
    def stochastic(self) -> Tensor:
        """(K,) bool: the steps that have a log-probability."""
        ...

    def step(self, k: Tensor, x: Tensor, act: ModelFn, solver_state: Tensor | None = None) -> Transition:
        """The distribution of the state after step k (B,) from x (B, ...), calling `act` for actions."""
        ...


@dataclass(frozen=True)
class Coefficients:
    """A one-stage sampler: x_{k+1} ~ N(A_k x_k + B_k a_k, S_k^2 I), a_k the action at (x_k, times[k])."""

    times: Tensor  # (K + 1,) float64
    A: Tensor  # (K,)
    B: Tensor  # (K,)
    S: Tensor  # (K,)
    eta: Tensor | None = None  # (K,) noise levels, 1 for the reverse SDE; None where that is not known
    numbers: Numbers | None = None  # A, B and S at other noise levels

    @classmethod
    def at(cls, times: Tensor, eta: Tensor | float, numbers: Numbers) -> Coefficients:
        """The coefficients at noise levels eta, one for all steps or (K,); other levels can be asked for later."""
        level = torch.as_tensor(eta, dtype=times.dtype).expand(len(times) - 1)
        return cls(times, *numbers(level), level, numbers)

    @property
    def stochastic(self) -> Tensor:
        return self.S > 0

    def with_noise(self, mask: Tensor) -> Coefficients:
        """The sampler with its noise at the steps in mask (K,) alone, the others being its deterministic ones.

        Raises: UsageError when it was made for one noise level.
        """
        if self.numbers is None or self.eta is None:
            raise UsageError(
                "config sampler.noise_steps: this sampler says its coefficients at one noise level only; its plugin "
                "has to make them with Coefficients.at"
            )
        return self.at(self.times, self.eta.where(mask, 0.0), self.numbers)

    def step(self, k: Tensor, x: Tensor, act: ModelFn, solver_state: Tensor | None = None) -> Transition:
        action = act(x, self.times[k])
        A, B, S = (like(c[k], x) for c in (self.A, self.B, self.S))
        return Transition(A * x + B * action, S)


def euler_maruyama(schedule: Schedule, times: Tensor, eta: Tensor | float) -> Coefficients:
    """S1: A = 1 - f D, B = (1 + eta^2) g^2 D / 2, S = eta g sqrt(D), for any noise level eta >= 0 (THEORY 1.3)."""
    t, step = times[:-1], times[:-1] - times[1:]

    def numbers(level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        noise_rate = level.square() * schedule.noise_rate(times) * step
        return 1 - schedule.f(t) * step, (schedule.g2(t) * step + noise_rate) / 2, noise_rate.sqrt()

    return Coefficients.at(times, eta, numbers)


@dataclass(frozen=True)
class Overshoot:
    """S4: any deterministic solver, made stochastic by going too far and adding noise back (THEORY 1.3).

    From t it goes to w with lambda_w = lambda_u + eta^2 h, then noise brings w back to u: exactly Gaussian.
    """

    schedule: Schedule
    times: Tensor  # (K + 1,)
    eta: Tensor  # (K,)
    solver: Callable[[Tensor, Tensor, Tensor, ModelFn], Tensor]  # (x, t, w, act) -> the state at w

    @cached_property
    def targets(self) -> Tensor:
        """(K,) the times w."""
        t, u = self.times[:-1], self.times[1:]
        level = self.schedule.log_snr(u)
        aim = self.schedule.time_of(level + self.eta**2 * (level - self.schedule.log_snr(t)))
        return u.where((self.eta == 0) | (u == 0), aim)

    @property
    def stochastic(self) -> Tensor:
        return self.targets < self.times[1:]

    def with_noise(self, mask: Tensor) -> Overshoot:
        return replace(self, eta=self.eta.where(mask, 0.0))

    def step(self, k: Tensor, x: Tensor, act: ModelFn, solver_state: Tensor | None = None) -> Transition:
        t, u, w = self.times[k], self.times[k + 1], self.targets[k]
        alpha_u, alpha_w, sigma_u, sigma_w = (
            like(c, x) for c in (self.schedule.alpha(u), self.schedule.alpha(w), *map(self.schedule.sigma, (u, w)))
        )
        back = alpha_u / alpha_w
        std = (sigma_u.square() - (back * sigma_w).square()).clamp(min=0).sqrt()
        return Transition(back * self.solver(x, t, w, act), std)
