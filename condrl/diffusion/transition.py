"""The affine Gaussian step x' ~ N(A x + B a, S^2 I): its mean, sample, log-probability and KL divergence.

An action `a` is a score (condrl.diffusion.schedule says what it is where there is no signal). Most samplers are the
three numbers (A, B, S) of every step; whatever is learned, measured or differentiated follows from them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from condrl.diffusion.schedule import Schedule, like, x0_from_score
from condrl.errors import UsageError

ModelFn = Callable[[Tensor, Tensor], Tensor]  # (x, t) -> action
Numbers = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]  # noise levels (K,) -> A, B, S (K,)
Solver = Callable[[Tensor, Tensor, Tensor, Tensor, ModelFn], Tensor]  # (x, action at x, t, w, model) -> the state at w


@dataclass(frozen=True)
class Gaussian:
    """N(mean, std^2 I); mean (B, ...), std broadcastable to it."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean + self.std * noise

    def log_prob(self, x: Tensor) -> Tensor:
        """log N(x; mean, std^2 I) in nats, summed over dimensions in float64, (B,).

        The ratio of two such sums is near 1 while each sum is thousands of nats: float32 would round it away.
        """
        z = (x - self.mean) / self.std
        constant = self.std.log() + 0.5 * math.log(2 * math.pi)
        return -(0.5 * z.square() + constant).flatten(1).sum(1, dtype=torch.float64)

    def kl(self, other: Gaussian) -> Tensor:
        """KL(self || other) in nats, summed over dimensions, (B,)."""
        ratio = self.std / other.std
        shift = (self.mean - other.mean) / other.std
        return (0.5 * (ratio.square() + shift.square() - 1) - ratio.log()).expand_as(shift).flatten(1).sum(1)


@dataclass(frozen=True)
class Transition(Gaussian):
    """The distribution of the next state, and the network's output at this one."""

    action: Tensor  # (B, ...)
    denoised: Tensor  # (B, ...) E[x_0 | x] by that action


class Sampler(ABC):
    """What a sampler plugin returns: times (K + 1,) and the distribution of each of its K steps.

    A chain can be entered, resampled and left at any step: whatever a step depends on beside x is its solver state,
    which the caller carries from step to step.
    """

    schedule: Schedule
    times: Tensor  # (K + 1,) float64, from noise to data
    noise_level: Tensor | None = None  # (K,) eta of each step, 1 for the reverse SDE; None where it is not known

    @property
    @abstractmethod
    def stochastic(self) -> Tensor:
        """(K,) bool: the steps that have a log-probability."""

    @property
    def affine(self) -> Coefficients | None:
        """The numbers A, B and S, where a step is affine in the action at its own state."""
        return None

    def with_noise(self, mask: Tensor) -> Sampler:
        """The sampler with noise at the steps in mask (K,) alone, the others being its deterministic ones.

        Raises: UsageError when it cannot leave its noise out.
        """
        raise UsageError("config sampler.noise_steps: this sampler has no with_noise to leave noise out")

    def init(self, x: Tensor) -> Tensor | None:
        """The solver state (B, ...) before the first step from x (B, ...); None if steps depend on x alone."""
        return None

    @abstractmethod
    def step(
        self, k: Tensor, x: Tensor, model: ModelFn, state: Tensor | None = None
    ) -> tuple[Transition, Tensor | None]:
        """The distribution of the state after step k (B,) from x (B, ...), and the next step's solver state."""

    @property
    def is_markov(self) -> bool:
        """Whether steps depend on x alone."""
        return self.init(torch.zeros(1, 1)) is None

    def transition(self, k: Tensor, x: Tensor, action: Tensor, mean: Tensor, std: Tensor) -> Transition:
        """A step's distribution, with what the action (B, ...) at x (B, ...) and the start of step k (B,) implies."""
        alpha, sigma = (like(c[k], x) for c in self._levels)
        return Transition(mean, std, action, x0_from_score(action, x, alpha, sigma))

    @cached_property
    def _levels(self) -> tuple[Tensor, Tensor]:
        """alpha and sigma at the beginning of each step, (K,)."""
        return self.schedule.alpha(self.times[:-1]), self.schedule.sigma(self.times[:-1])


@dataclass(frozen=True)
class Coefficients(Sampler):
    """A one-stage sampler: x_{k+1} ~ N(A_k x_k + B_k a_k, S_k^2 I), a_k the action at (x_k, times[k])."""

    schedule: Schedule
    times: Tensor
    A: Tensor  # (K,)
    B: Tensor  # (K,)
    S: Tensor  # (K,)
    noise_level: Tensor | None = None
    numbers: Numbers | None = None  # A, B and S at other noise levels

    @classmethod
    def at(cls, schedule: Schedule, times: Tensor, noise_level: Tensor | float, numbers: Numbers) -> Coefficients:
        """The coefficients at noise levels, one for all steps or (K,); other levels can be asked for later."""
        level = torch.as_tensor(noise_level, dtype=times.dtype).expand(len(times) - 1)
        made = numbers(level)
        if len(made) != 3:
            raise UsageError(f"a sampler's numbers are A, B and S, and it gave {len(made)} of them")
        return cls(schedule, times, *made, level, numbers)

    @property
    def stochastic(self) -> Tensor:
        return self.S > 0

    @property
    def affine(self) -> Coefficients:
        return self

    def with_noise(self, mask: Tensor) -> Coefficients:
        """Raises: UsageError when it was made for one noise level."""
        if self.numbers is None or self.noise_level is None:
            raise UsageError(
                "config sampler.noise_steps: this sampler has its coefficients at one noise level only; its plugin "
                "has to make them with Coefficients.at"
            )
        return self.at(self.schedule, self.times, self.noise_level.where(mask, 0.0), self.numbers)

    def step(self, k: Tensor, x: Tensor, model: ModelFn, state: Tensor | None = None) -> tuple[Transition, None]:
        action = model(x, self.times[k])
        A, B, S = (like(c[k], x) for c in (self.A, self.B, self.S))
        return self.transition(k, x, action, A * x + B * action, S), None


def windowed(sampler: Sampler, size: int, turn: int) -> Sampler:
    """The sampler with noise at `size` neighbouring steps alone, one further at each turn (docs/theory.md 3).

    Raises: UsageError when the sampler cannot leave its noise out.
    """
    noisy = sampler.stochastic.nonzero()[:, 0]
    first = turn % (len(noisy) - size + 1)
    mask = torch.zeros_like(sampler.stochastic)
    mask[noisy[first : first + size]] = True
    return sampler.with_noise(mask)


def check_noise_level(value: float, option: str = "eta", most: float = math.inf) -> None:
    """Raises: UsageError on a sampler's option that is not a noise level."""
    if not 0 <= value <= most:
        limits = "at least 0" if most == math.inf else f"in [0, {most:g}]"
        raise UsageError(f"config sampler.{option}: must be {limits}, got {value}")


def euler_maruyama(schedule: Schedule, times: Tensor, noise_level: Tensor | float) -> Coefficients:
    """S1: A = 1 - f D, B = (1 + eta^2) g^2 D / 2, S = eta g sqrt(D), for any noise level eta >= 0 (docs/theory.md 3).

    Where there is no signal, f and g^2 may be infinite while the probability flow's velocity is not: there the mean is
    x - D velocity + (noise rate / 2) score, with the score -x / sigma^2, and B belongs to the denoised prediction.
    """
    t, step = times[:-1], times[:-1] - times[1:]
    no_signal = schedule.alpha(t) == 0
    from_x, from_denoised = schedule.velocity(t)

    def numbers(level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        noise_rate = level.square() * schedule.noise_rate(times) * step
        A, B = 1 - schedule.f(t) * step, (schedule.g2(t) * step + noise_rate) / 2
        without_signal = 1 - from_x * step - noise_rate / (2 * schedule.sigma(t).square())
        return without_signal.where(no_signal, A), (-from_denoised * step).where(no_signal, B), noise_rate.sqrt()

    return Coefficients.at(schedule, times, noise_level, numbers)


@dataclass(frozen=True)
class Overshoot(Sampler):
    """S4: any deterministic solver, made stochastic by going too far and adding noise back (docs/theory.md 3).

    From t it goes to w with lambda_w = lambda_u + eta^2 h, then noise brings w back to u: exactly Gaussian.
    """

    schedule: Schedule
    times: Tensor
    noise_level: Tensor = field()  # without the default of other samplers
    solver: Solver = field()

    @cached_property
    def targets(self) -> Tensor:
        """(K,) the times w."""
        t, u = self.times[:-1], self.times[1:]
        level = self.schedule.log_snr(u)
        overshot = self.schedule.time_of(level + self.noise_level**2 * (level - self.schedule.log_snr(t)))
        return u.where((self.noise_level == 0) | (u == 0), overshot)

    @property
    def stochastic(self) -> Tensor:
        return self.targets < self.times[1:]

    def with_noise(self, mask: Tensor) -> Overshoot:
        return replace(self, noise_level=self.noise_level.where(mask, 0.0))

    def step(self, k: Tensor, x: Tensor, model: ModelFn, state: Tensor | None = None) -> tuple[Transition, None]:
        t, u, w = self.times[k], self.times[k + 1], self.targets[k]
        alpha_u, alpha_w, sigma_u, sigma_w = (
            like(c, x) for c in (self.schedule.alpha(u), self.schedule.alpha(w), *map(self.schedule.sigma, (u, w)))
        )
        back = alpha_u / alpha_w
        std = (sigma_u.square() - (back * sigma_w).square()).clamp(min=0).sqrt()
        action = model(x, t)
        return self.transition(k, x, action, back * self.solver(x, action, t, w, model), std), None
