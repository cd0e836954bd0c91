"""alpha(t), sigma(t), f, g^2 of a forward process, and the affine conversions between score, epsilon, v and x0.

The forward process is X_t = alpha_t X_0 + sigma_t eps, the solution of dX = f(t) X dt + g(t) dB. Times are noise
times: 0 is data, `end` is noise. All times and coefficients are float64; tensors are converted where they are used.

The action of a policy is the score; where alpha_t = 0 (zero terminal SNR) the score is -x whatever the network says, so
there, and only there, the action is the denoised prediction x0 itself: `Schedule.score` gives it, `x0_from_score` takes
it, and `coefficients` has the A and B that go with it. All other statistics follow from A, B and S as usual.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from condrl.errors import UsageError

DIFFUSERS_SPACINGS = ("leading", "linspace", "trailing")


class Schedule(ABC):
    """alpha(t), sigma(t), f(t), g(t)^2 for times t of any shape, float64."""

    end: float  # the time that sampling begins at
    final_time: float  # the time that it ends at
    prior_std: float = 1.0  # of the noise that it begins with

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def f(self, t: Tensor) -> Tensor:
        """d log(alpha) / dt."""

    @abstractmethod
    def g2(self, t: Tensor) -> Tensor:
        """g(t)^2 = d(sigma^2)/dt - 2 f sigma^2."""

    def velocity(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """What x and E[x_0 | x] are multiplied by in dx/dt of the probability flow at times t."""
        half = self.g2(t) / (2 * self.sigma(t).square())
        return self.f(t) + half, -half * self.alpha(t)

    def flow(self, x: Tensor, t: Tensor, action: Tensor) -> Tensor:
        """dx/dt of the probability flow at x (B, ...) and times t (B,), given the action there."""
        has_signal = self.alpha(t) > 0
        from_x, from_denoised = self.velocity(t)
        f, half = self.f(t).where(has_signal, from_x), (-self.g2(t) / 2).where(has_signal, from_denoised)
        return like(f, x) * x + like(half, x) * action

    def noise_rate(self, times: Tensor) -> Tensor:
        """The g^2 (K,) that scales the noise of an Euler-Maruyama step between times (K + 1,)."""
        return self.g2(times[:-1])

    def log_snr(self, t: Tensor) -> Tensor:
        """lambda(t) = log(alpha / sigma), falling in t."""
        return (self.alpha(t) / self.sigma(t)).log()

    def clock(self, t: Tensor) -> Tensor:
        """Features (B, 2) of times t (B,) for small networks, both of order 1."""
        return torch.stack([t / self.end, self.log_snr(t).clamp(-5, 5) / 3], -1)

    def time_of(self, log_snr: Tensor) -> Tensor:
        """The times at which lambda(t) is `log_snr`, by bisection, within [0, end]."""
        low, high = torch.zeros_like(log_snr), torch.full_like(log_snr, self.end)
        for _ in range(60):
            middle = (low + high) / 2
            later = self.log_snr(middle) > log_snr
            low, high = middle.where(later, low), high.where(later, middle)
        return (low + high) / 2

    def grid(self, steps: int, spacing: str | None = None) -> Tensor:
        """The (steps + 1,) times from `end` to `final_time`, uniform in t (the default) or in lambda.

        Raises: UsageError when there is no step, or on a spacing that needs a diffusers scheduler.
        """
        if steps < 1:
            raise UsageError(f"config sampler.steps: must be at least 1, got {steps}")
        if spacing in DIFFUSERS_SPACINGS:
            raise UsageError(f"config sampler.spacing: {spacing} needs a diffusers scheduler; use uniform or log_snr")
        ends = torch.tensor([self.end, self.final_time], dtype=torch.float64)
        if spacing != "log_snr":
            return torch.linspace(self.end, self.final_time, steps + 1, dtype=torch.float64)
        if not self.alpha(ends[0]) > 0:
            raise UsageError(
                "config sampler.spacing: log_snr is infinite where there is no signal: use another spacing"
            )
        last = self._least_time
        extra = int(last > self.final_time)  # lambda is infinite at 0, so one step goes there from the least time
        if steps == extra:
            return ends
        start, stop = self.log_snr(torch.stack([ends[0], ends.new_tensor(last)])).tolist()
        times = self.time_of(torch.linspace(start, stop, steps + 1 - extra, dtype=torch.float64))
        times[0], times[-1] = self.end, last
        return torch.cat([times, ends[1:]]) if extra else times

    def targets(self, times: Tensor) -> Tensor:
        """The times (K,) that DDIM's steps go to on a grid (K + 1,): the next ones."""
        return times[1:]

    def score(self, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """A network's output at x (B, ...) and times t (B,), as the action: here it is a score."""
        return prediction

    @property
    def _least_time(self) -> float:
        """The last time of a grid uniform in lambda that is not 0."""
        return self.final_time or 1e-3 * self.end


@dataclass(frozen=True)
class VP(Schedule):
    """beta(t) = b0 + (b1 - b0) t, f = -beta / 2, g^2 = beta (Song et al. 2021); docs/theory.md 2."""

    b0: float = 0.1
    b1: float = 20.0
    end: float = 1.0
    final_time: float = 1e-3

    def beta(self, t: Tensor) -> Tensor:
        return self.b0 + (self.b1 - self.b0) * t.double()

    def alpha(self, t: Tensor) -> Tensor:
        t = t.double()
        return (-(self.b0 * t + (self.b1 - self.b0) * t.square() / 2) / 2).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - self.alpha(t).square()).sqrt()

    def f(self, t: Tensor) -> Tensor:
        return -self.beta(t) / 2

    def g2(self, t: Tensor) -> Tensor:
        return self.beta(t)


@dataclass(frozen=True)
class OU(Schedule):
    """The Ornstein-Uhlenbeck process dX = -rate X dt + noise dB; docs/theory.md 2."""

    rate: float = 0.5
    noise: float = 1.0
    end: float = 6.0
    final_time: float = 0.05

    def alpha(self, t: Tensor) -> Tensor:
        return (-self.rate * t.double()).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return self.noise * (-torch.expm1(-2 * self.rate * t.double()) / (2 * self.rate)).sqrt()

    def f(self, t: Tensor) -> Tensor:
        return torch.full_like(t, -self.rate, dtype=torch.float64)

    def g2(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.noise**2, dtype=torch.float64)

    @property
    def prior_std(self) -> float:  # type: ignore[override]
        return self.sigma(torch.tensor(self.end)).item()


@dataclass(frozen=True)
class RectifiedFlow(Schedule):
    """X_t = (1 - t) X_0 + t eps (Lipman et al. 2023); at t = 1, f and g^2 are infinite and the velocity is not."""

    end: float = 1 - 1e-3
    final_time: float = 1e-3

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t.double()

    def sigma(self, t: Tensor) -> Tensor:
        return t.double()

    def f(self, t: Tensor) -> Tensor:
        return -1 / (1 - t.double())

    def g2(self, t: Tensor) -> Tensor:
        return 2 * t.double() / (1 - t.double())

    def velocity(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 / t.double(), -1 / t.double()

    def noise_rate(self, times: Tensor) -> Tensor:
        """g^2, with 1 - t taken at the end of the first step, which begins where it is singular (Liu et al. 2025)."""
        left = 1 - times[:-1]
        return 2 * times[:-1] / torch.cat([1 - times[1:2], left[1:]])


SCHEDULES: dict[str, type[Schedule]] = {"vp": VP, "ou": OU, "rectified_flow": RectifiedFlow}


def make_schedule(name: str, options: Mapping[str, float]) -> Schedule:
    """Raises: UsageError on a parameter that the schedule does not have."""
    try:
        schedule = SCHEDULES[name](**options)
    except TypeError as error:
        raise UsageError(f"config model.schedule_options: {name} {str(error).split('__init__() ')[-1]}") from error
    ends = torch.tensor([schedule.final_time, schedule.end], dtype=torch.float64)
    (alpha, least), (_, sigma) = schedule.alpha(ends), schedule.sigma(ends)
    sane = 0 <= schedule.final_time < schedule.end and alpha > 0 and least >= 0 and 0 < sigma < math.inf
    if not sane or not torch.stack(schedule.velocity(ends[1:])).isfinite().all():
        raise UsageError(
            f"config model.schedule_options: {name} with {dict(options)} is not a schedule from data to noise"
        )
    return schedule


# ---------------------------------------------------------------------------------------------- conversions


def like(coefficient: Tensor, x: Tensor) -> Tensor:
    """A (B,) coefficient as x's dtype and device, shaped to multiply x (B, ...)."""
    return coefficient.to(x.device, x.dtype).reshape(-1, *[1] * (x.dim() - 1))


def score_from_epsilon(epsilon: Tensor, sigma: Tensor) -> Tensor:
    return -epsilon / sigma


def score_from_x0(x0: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return (alpha * x0 - x) / sigma.square()


def epsilon_from_v(v: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """diffusers' v-prediction, v = alpha eps - sigma x0 (Salimans and Ho 2022)."""
    return sigma * x + alpha * v


def x0_from_score(score: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """E[X_0 | x], Tweedie's formula; the action itself where alpha = 0."""
    return ((x + sigma.square() * score) / alpha.where(alpha > 0, 1.0)).where(alpha > 0, score)


def coefficients(alpha_t: Tensor, sigma_t: Tensor, alpha_u: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """A and B (K,) of steps whose mean is alpha_u x0 + kept eps, x0 and eps being the network's at (x, t).

    A x + B action: the action is the score, or x0 where alpha_t = 0.
    """
    start = alpha_t == 0
    ratio = alpha_u / alpha_t.where(~start, 1.0)
    A = (kept / sigma_t).where(start, ratio)
    return A, alpha_u.where(start, sigma_t * (ratio * sigma_t - kept))
