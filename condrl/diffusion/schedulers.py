"""The schedules of diffusers' schedulers: tables of noise levels, and flows, on their own times."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from condrl.diffusion.schedule import (
    DIFFUSERS_SPACINGS,
    RectifiedFlow,
    Schedule,
    epsilon_from_v,
    like,
    score_from_epsilon,
    score_from_x0,
)
from condrl.errors import UsageError

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
FLOW_OPTIONS = (  # of diffusers' flow-matching scheduler that change its times or its steps
    "invert_sigmas",
    "stochastic_sampling",
    "use_beta_sigmas",
    "use_exponential_sigmas",
    "use_karras_sigmas",
)
VP_TABLE = (  # what a table of noise levels is made by
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"),
)
FLOW_TIMES = (  # what that scheduler's times are made by
    *("num_train_timesteps", "shift", "shift_terminal", "use_dynamic_shifting", "time_shift_type"),
    *("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"),
)
SOME_STEPS = 50  # by which times are tried


# ---------------------------------------------------------------------------------------------- tables


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

    Raises: UsageError on another process, on a prediction type, spacing or beta schedule that is not supported, and on
    values by which the signal does not fall.
    """
    check_process(config)
    prediction, spacing = config.get("prediction_type", "epsilon"), config.get("timestep_spacing", "leading")
    if prediction not in get_args(Prediction):
        raise UsageError(f"the model predicts {prediction!r}; supported are {', '.join(get_args(Prediction))}")
    if spacing not in DIFFUSERS_SPACINGS:
        raise UsageError(
            f"the scheduler's timestep_spacing is {spacing!r}; supported are {', '.join(DIFFUSERS_SPACINGS)}"
        )
    try:
        alpha_bar = alpha_bar_of(config)
        falls = bool((torch.cat([alpha_bar.new_ones(1), alpha_bar]).diff() < 0).all() and alpha_bar[-1] >= 0)
    except (TypeError, LookupError, ArithmeticError, RuntimeError):  # of values that are no numbers, or have no root
        falls = False
    if not falls:
        raise UsageError(
            f"the model's scheduler has noise levels that do not rise from 0 to 1, by {said(config, VP_TABLE)}"
        )
    offset = config.get("steps_offset", 0)
    if not isinstance(offset, int) or not 0 <= offset < len(alpha_bar):
        raise UsageError(f"the model's scheduler has steps_offset={offset!r}; it is from 0 to {len(alpha_bar) - 1}")
    final_time = 0.0 if config.get("set_alpha_to_one", True) else 1 / len(alpha_bar)
    return DiscreteSchedule(alpha_bar, prediction, spacing, offset, final_time)


def said(config: Mapping[str, Any], keys: Sequence[str]) -> str:
    """What a config says of these, in words."""
    return ", ".join(f"{key}={reprlib.repr(config[key])}" for key in keys if key in config)


def alpha_bar_of(config: Mapping[str, Any]) -> Tensor:
    """The (T,) alpha^2 of a diffusers scheduler config."""
    alpha_bar = (1 - betas_of(config)).cumprod(0)
    if not config.get("rescale_betas_zero_snr"):
        return alpha_bar
    root = alpha_bar.sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])  # Lin et al. 2023, algorithm 1
    return root.square()


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


# ---------------------------------------------------------------------------------------------- flows


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


def flow_from_diffusers(config: Mapping[str, Any], tokens: int, evenly: bool = False) -> FlowSchedule:
    """The schedule of a diffusers flow-matching Euler scheduler, for images of so many tokens.

    Before they are shifted, times end at 1 / steps if `evenly`, as FLUX's pipeline has it, or at the scheduler's least.

    Raises: UsageError when the scheduler is another one, changes its times in a way that is not supported, or has
    values by which they do not fall from 1 to 0.
    """
    name = config.get("_class_name", "FlowMatchEulerDiscreteScheduler")
    if name != "FlowMatchEulerDiscreteScheduler":
        raise UsageError(f"the model's scheduler is a {name}; a flow needs a FlowMatchEulerDiscreteScheduler")
    for key in FLOW_OPTIONS:
        if config.get(key):
            raise UsageError(f"the model's {name} has {key}={config[key]}, which is not supported")
    try:
        schedule = flow(config, tokens, evenly)
        falls = bool((schedule.grid(SOME_STEPS).float().diff() < 0).all())
    except (TypeError, LookupError, ArithmeticError):  # of values that are no numbers, unknown, or overflow
        falls = False
    if not falls:
        raise UsageError(f"the model's {name} has times that do not fall from 1 to 0, by {said(config, FLOW_TIMES)}")
    return schedule


def flow(config: Mapping[str, Any], tokens: int, evenly: bool) -> FlowSchedule:
    """The schedule that these values say."""
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
    found: float = {"exponential": math.exp, "linear": float}[config.get("time_shift_type", "exponential")](mu)
    return found
