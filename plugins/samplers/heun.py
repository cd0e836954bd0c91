"""Heun's method on the probability-flow ODE, with noise by overshooting."""

import torch
from torch import Tensor

import condrl
from condrl.diffusion.schedule import Schedule, like
from condrl.diffusion.transition import ModelFn, Overshoot, check_noise_level


@condrl.sampler
def heun(
    schedule: Schedule,
    times: Tensor,
    *,
    eta: float = 0.0,  # noise level >= 0; each step overshoots and is noised back
) -> Overshoot:
    """Heun's second-order ODE method, two scores a step; exactly Gaussian for eta > 0 (docs/theory.md 3, S4)."""
    check_noise_level(eta)
    if eta > 0 and not schedule.alpha(times[0]) > 0:
        raise condrl.UsageError(
            "config sampler.eta: heun would overshoot to the data from where there is no signal: use eta=0, or ddim"
        )

    def solver(x: Tensor, action: Tensor, t: Tensor, w: Tensor, model: ModelFn) -> Tensor:
        step, first = like(w - t, x), schedule.flow(x, t, action)
        ahead = x + step * first
        data = like((w == 0).double(), x)  # no score there: Euler's step stands
        safe = w.where(w > 0, t)
        return ahead + (1 - data) * step / 2 * (schedule.flow(ahead, safe, model(ahead, safe)) - first)

    return Overshoot(schedule, times, torch.full((len(times) - 1,), eta, dtype=torch.float64), solver)
