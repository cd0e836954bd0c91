"""Heun's method on the probability-flow ODE, with noise by overshooting."""

import torch
from torch import Tensor

import condrl
from condrl.diffusion.schedule import Schedule, like
from condrl.diffusion.transition import ModelFn, Overshoot


@condrl.sampler
def heun(
    schedule: Schedule,
    times: Tensor,
    *,
    eta: float = 0.0,  # noise level >= 0; each step overshoots and is noised back
) -> Overshoot:
    """Heun's second-order ODE method, two scores a step; exactly Gaussian for eta > 0 (THEORY 1.3, S4)."""
    if eta < 0:
        raise condrl.UsageError(f"config sampler.eta: heun needs a value of at least 0, got {eta}")

    def drift(x: Tensor, t: Tensor, act: ModelFn) -> Tensor:
        return -like(schedule.f(t), x) * x + like(schedule.g2(t), x) / 2 * act(x, t)

    def solver(x: Tensor, t: Tensor, w: Tensor, act: ModelFn) -> Tensor:
        step, first = like(t - w, x), drift(x, t, act)
        ahead = x + step * first
        data = like((w == 0).double(), x)  # no score there: Euler's step stands
        safe = w.where(w > 0, t)
        return ahead + (1 - data) * step / 2 * (drift(ahead, safe, act) - first)

    return Overshoot(schedule, times, torch.full((len(times) - 1,), eta, dtype=torch.float64), solver)
