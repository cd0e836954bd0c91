"""DPM-Solver++ (2M), ODE and SDE (Lu et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

import condrl
from condrl.diffusion.schedule import Schedule, like, x0_from_score
from condrl.diffusion.transition import ModelFn, Sampler, Transition, check_noise_level


@dataclass(frozen=True)
class MultistepDPM(Sampler):
    """The state is (sigma_u / sigma_t) e^{-eta^2 h} x + alpha_u (1 - e^{-(1 + eta^2) h}) D, plus noise.

    D extrapolates from the last two denoised predictions. The distribution is exact given the earlier one, the solver
    state; a policy gradient takes that state as given, so it misses how earlier actions act through it.
    """

    schedule: Schedule
    times: Tensor
    noise_level: Tensor = field()  # without the default of other samplers

    @property
    def stochastic(self) -> Tensor:
        return (self.noise_level > 0) & (self.schedule.sigma(self.times[1:]) > 0)

    def with_noise(self, mask: Tensor) -> MultistepDPM:
        return replace(self, noise_level=self.noise_level.where(mask, 0.0))

    def init(self, x: Tensor) -> Tensor:
        """No earlier prediction: the first step gives this one no weight."""
        return torch.zeros_like(x)

    def step(self, k: Tensor, x: Tensor, model: ModelFn, state: Tensor | None = None) -> tuple[Transition, Tensor]:
        if state is None:
            raise condrl.UsageError("dpm_solver_pp cannot be entered at a step without the solver state before it")
        t, u = self.times[k], self.times[k + 1]
        alpha_t, sigma_t, alpha_u, sigma_u = (
            c(time) for c, time in zip((self.schedule.alpha, self.schedule.sigma) * 2, (t, t, u, u), strict=True)
        )
        action = model(x, t)
        denoised = x0_from_score(action, x, like(alpha_t, x), like(sigma_t, x))
        gain = (sigma_u * alpha_t) / (sigma_t * alpha_u)  # e^{-h}
        kept = gain ** self.noise_level[k].square()  # e^{-eta^2 h}
        target = denoised + like(self._slope(k), x) * (denoised - state)
        mean = like(sigma_u / sigma_t * kept, x) * x + like(alpha_u * (1 - gain * kept), x) * target
        std = like(sigma_u * (1 - kept.square()).sqrt(), x)
        return Transition(mean, std, action, denoised), denoised.detach()

    def _slope(self, k: Tensor) -> Tensor:
        """1 / (2 rho), rho = h_{k-1} / h_k; 0 at the first step and at one that goes to the data."""
        level = self.schedule.log_snr(self.times)
        h = level.diff()
        slope = h[k] / (2 * h[(k - 1).clamp(min=0)])
        return slope.where((k > 0) & slope.isfinite(), torch.zeros_like(slope))


@condrl.sampler
def dpm_solver_pp(
    schedule: Schedule,
    times: Tensor,
    *,
    eta: float = 0.0,  # noise level >= 0
) -> MultistepDPM:
    """DPM-Solver++ (2M) at any noise level, one score a step (Lu et al. 2022; docs/theory.md 3)."""
    check_noise_level(eta)
    return MultistepDPM(schedule, times, torch.full((len(times) - 1,), eta, dtype=torch.float64))
