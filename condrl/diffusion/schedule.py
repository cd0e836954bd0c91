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
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from condrl.errors import UsageError

FLOW_OPTIONS = (  # of diffusers' flow-matching scheduler that change its times or its steps
    "invert_sigmas",
    "stochastic_sampling",
    "use_beta_sigmas",
    "use_exponential_sigmas",
    "use_karras_sigmas",
)
DIFFUSERS_SPACINGS = ("leading", "linspace", "trailing")
Prediction = Literal["epsilon", "v_prediction", "sample"]
VP_SCHEDULERS = (  # of diffusers, for networks trained on a table of variance-preserving noise levels
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)


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


@dataclass(frozen=True)
class FlowSchedule(RectifiedFlow):
    """A rectified flow of a network that says the velocity, on the times of diffusers' flow-matching Euler scheduler.

    Its times fall evenly from 1 to `least` and are shifted towards the noise, t -> shift t / (1 + (shift - 1) t).
    """

    shift: float = 1.0
    least: float | None = None  # the last time that is not 0, before it is shifted; null: 1 / steps
    terminal: float | None = None  # what it is stretched to be after that
    training_steps: int = 1000  # of the network's clock
    end: float = 1.0
    final_time: float = 0.0

    def grid(self, steps: int, spacing: str | None = None) -> Tensor:
        """The (steps + 1,) times of the scheduler, or uniform ones.

        Raises: UsageError when there is no step, or on a spacing that a flow does not have.
        """
        if spacing is not None or steps < 1:
            if spacing in DIFFUSERS_SPACINGS:
                raise UsageError(f"config sampler.spacing: a flow's scheduler has no {spacing} times: set it to null")
            return super().grid(steps, spacing)
        times = torch.linspace(1, 1 / steps if self.least is None else self.least, steps, dtype=torch.float64)
        times = shifted(times, self.shift)
        if self.terminal:
            if steps == 1:
                raise UsageError("config sampler.steps: must be at least 2 for a scheduler with shift_terminal")
            times = 1 - (1 - times) * (1 - self.terminal) / (1 - times[-1])
        return torch.cat([times, times.new_zeros(1)])

    def network_time(self, t: Tensor) -> Tensor:
        """Times on the network's clock, (B,) float32, rounded as diffusers does."""
        return t.float() * self.training_steps

    def score(self, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """A network's velocity (B, ...) at x (B, ...) and times t (B,), as the action."""
        alpha, sigma = (like(c, x) for c in (self.alpha(t), self.sigma(t)))
        return (-(x + alpha * prediction) / sigma).where(alpha > 0, x - prediction)


def shifted(t: Tensor | float, shift: float) -> Any:
    """Times (...) of a flow moved towards the noise (Esser et al. 2024; docs/theory.md 2)."""
    return shift * t / (1 + (shift - 1) * t)


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


@dataclass(frozen=True)
class DiscreteSchedule(Schedule):
    """The variance-preserving process tabulated by a diffusers scheduler: `alpha_bar[i]` at time (i + 1) / T.

    Between the tabulated times alpha_bar is linear in t, and alpha_bar(0) = 1.
    """

    alpha_bar: Tensor  # (T,) float64
    prediction: Prediction = "epsilon"
    spacing: str = "leading"
    steps_offset: int = 0
    final_time: float = 0.0
    end: float = 1.0

    def _alpha_bar(self, t: Tensor) -> Tensor:
        table = torch.cat([self.alpha_bar.new_ones(1), self.alpha_bar])
        position = t.double() * len(self.alpha_bar)
        left = position.round().where((position - position.round()).abs() < 1e-9, position.floor()).long()
        right = (left + 1).clamp(max=len(self.alpha_bar))
        return table[left] + (position - left) * (table[right] - table[left])

    def alpha(self, t: Tensor) -> Tensor:
        return self._alpha_bar(t).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - self._alpha_bar(t)).sqrt()

    def f(self, t: Tensor) -> Tensor:
        """d log(alpha) / dt, the slope of the table's cell to the left of t."""
        count = len(self.alpha_bar)
        cell = ((t.double() * count - 1e-9).ceil() / count).clamp(min=1 / count)
        slope = (self._alpha_bar(cell) - self._alpha_bar(cell - 1 / count)) * count
        return slope / (2 * self._alpha_bar(t))

    def g2(self, t: Tensor) -> Tensor:
        """g(t)^2 = -2 f(t), as for every variance-preserving process."""
        return -2 * self.f(t)

    @property
    def _least_time(self) -> float:
        return self.final_time or 1 / len(self.alpha_bar)

    def network_time(self, t: Tensor) -> Tensor:
        """The timestep that the network was trained with, (B,) float32, for times t."""
        return (t.double() * len(self.alpha_bar) - 1).float()

    def grid(self, steps: int, spacing: str | None = None) -> Tensor:
        """The (steps + 1,) times of a diffusers sampler, from noise to `final_time`, or as `Schedule.grid`.

        Raises: UsageError when the table has fewer times than `steps`.
        """
        spacing, count = spacing or self.spacing, len(self.alpha_bar)
        if spacing not in DIFFUSERS_SPACINGS:
            return super().grid(steps, spacing)
        if not 1 <= steps <= count:
            raise UsageError(
                f"config sampler.steps: must be between 1 and {count}, the training steps of the model's "
                f"scheduler; got {steps}"
            )
        index = torch.from_numpy(self._indices(steps, spacing)).double()
        if index[0] >= count:
            raise UsageError(
                f"config sampler.steps: {steps} steps with the scheduler's offset begin after its last time"
            )
        if len(index) != steps:
            raise UsageError(
                f"config sampler.steps: diffusers' trailing spacing makes {len(index)} times of {steps} steps, by a "
                "rounding error: use one step more or less"
            )
        return torch.cat([(index + 1) / count, torch.tensor([self.final_time], dtype=torch.float64)])

    def _indices(self, steps: int, spacing: str) -> Any:
        """The rows of the table by diffusers' own expressions: halves are rounded as theirs are."""
        count = len(self.alpha_bar)
        if spacing == "leading":
            return np.arange(steps)[::-1] * (count // steps) + self.steps_offset
        if spacing == "linspace":
            return np.linspace(0, count - 1, steps).round()[::-1].copy()
        return np.arange(count, 0, -count / steps).round() - 1

    def targets(self, times: Tensor) -> Tensor:
        """Where a grid is diffusers', the times to which its DDIM goes: T // K rows down the table, or `final_time`.

        They are the next times of the grid unless it is linspace, or trailing with steps that do not divide the table.
        """
        count, row = len(self.alpha_bar), times[:-1] * len(self.alpha_bar) - 1
        if not torch.allclose(row, row.round(), atol=1e-6, rtol=0):
            return times[1:]
        below = row.round() - count // len(row)
        return ((below + 1) / count).where(below >= 0, times[-1])

    def score(self, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """A network's prediction (B, ...) at x (B, ...) and times t (B,), as the action."""
        alpha, sigma = (like(c, x) for c in (self.alpha(t), self.sigma(t)))
        if self.prediction == "epsilon":
            return score_from_epsilon(prediction, sigma)
        if self.prediction == "v_prediction":
            score = score_from_epsilon(epsilon_from_v(prediction, x, alpha, sigma), sigma)
            return score.where(alpha > 0, -prediction)
        return score_from_x0(prediction, x, alpha, sigma).where(alpha > 0, prediction)


def schedule_from_diffusers(config: Mapping[str, Any]) -> DiscreteSchedule:
    """The schedule of a diffusers scheduler config (DDPM, DDIM, PNDM, Euler, DPM-Solver families).

    Raises: UsageError on another process, and on a prediction type, spacing or beta schedule that is not supported.
    """
    check_process(config)
    prediction, spacing = config.get("prediction_type", "epsilon"), config.get("timestep_spacing", "leading")
    if prediction not in get_args(Prediction):
        raise UsageError(f"the model predicts {prediction!r}; supported are {', '.join(get_args(Prediction))}")
    if spacing not in DIFFUSERS_SPACINGS:
        raise UsageError(
            f"the scheduler's timestep_spacing is {spacing!r}; supported are {', '.join(DIFFUSERS_SPACINGS)}"
        )
    alpha_bar = (1 - betas_of(config)).cumprod(0)
    if config.get("rescale_betas_zero_snr"):
        root = alpha_bar.sqrt()
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])  # Lin et al. 2023, algorithm 1
        alpha_bar = root.square()
    final_time = 0.0 if config.get("set_alpha_to_one", True) else 1 / len(alpha_bar)
    return DiscreteSchedule(alpha_bar, prediction, spacing, config.get("steps_offset", 0), final_time)


def flow_from_diffusers(config: Mapping[str, Any], tokens: int, evenly: bool = False) -> FlowSchedule:
    """The schedule of a diffusers flow-matching Euler scheduler, for images of so many tokens.

    Before they are shifted, times end at 1 / steps if `evenly`, as FLUX's pipeline has it, or at the scheduler's least.

    Raises: UsageError when the scheduler is another one, or changes its times in a way that is not supported.
    """
    name = config.get("_class_name", "FlowMatchEulerDiscreteScheduler")
    if name != "FlowMatchEulerDiscreteScheduler":
        raise UsageError(f"the model's scheduler is a {name}; a flow needs a FlowMatchEulerDiscreteScheduler")
    for key in FLOW_OPTIONS:
        if config.get(key):
            raise UsageError(f"the model's {name} has {key}={config[key]}, which is not supported")
    count, shift = config.get("num_train_timesteps", 1000), config.get("shift", 1.0)
    least = 1 / count
    if config.get("use_dynamic_shifting"):
        shift = dynamic_shift(config, tokens)
    else:
        least = shifted(least, shift)  # and once more with all others: so it is in diffusers
    return FlowSchedule(
        shift=shift,
        least=None if evenly else least,
        terminal=config.get("shift_terminal"),
        training_steps=count,
    )


def dynamic_shift(config: Mapping[str, Any], tokens: int) -> float:
    """The shift of times for images of so many tokens: its logarithm, or itself, is linear in their number."""
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    first, last = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    mu = low + (high - low) * (tokens - first) / (last - first)
    return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu


def check_process(config: Mapping[str, Any]) -> None:
    """Raises: UsageError when a scheduler is of another process, or changes what the network predicts."""
    name = config.get("_class_name", "scheduler")
    if "_class_name" in config and name not in VP_SCHEDULERS:
        raise UsageError(
            f"the model's scheduler is a {name}; supported are those with a table of noise levels, such as "
            f"{', '.join(VP_SCHEDULERS[1::3])}"
        )
    for key, usual in (("use_flow_sigmas", False), ("thresholding", False), ("timestep_type", "discrete")):
        if config.get(key, usual) != usual:
            raise UsageError(f"the model's {name} has {key}={config[key]}, which is not supported")


def betas_of(config: Mapping[str, Any]) -> Tensor:
    """The (T,) noise variances of a diffusers scheduler config."""
    count, first, last = config["num_train_timesteps"], config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    kind = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float64)
    if kind == "linear":
        return torch.linspace(first, last, count, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(first**0.5, last**0.5, count, dtype=torch.float64).square()
    if kind == "squaredcos_cap_v2":
        u = torch.arange(count + 1, dtype=torch.float64) / count
        bar = torch.cos((u + 0.008) / 1.008 * torch.pi / 2).square()
        return (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    raise UsageError(
        f"the scheduler's beta_schedule is {kind!r}; supported are linear, scaled_linear, squaredcos_cap_v2"
    )


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
