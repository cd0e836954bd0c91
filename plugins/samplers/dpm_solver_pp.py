"""DPM-Solver++ (2M), ODE and SDE (Lu et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import condrl
from condrl.diffusion.schedule import Schedule, like, x0_from_score
from condrl.diffusion.transition import ModelFn, Transition


@dataclass(frozen=True)
class MultistepDPM:
    """The state is (sigma_u / sigma_t) e^{-eta^2 h} x + alpha_u (1 - e^{-(1 + eta^2) h}) D, plus noise.

    D extrapolates from the last two denoised predictions. The distribution is exact given the earlier one, the solver
    state; a policy gradient takes that state as given, so it misses how earlier actions act through it.
    """

    schedule: Schedule
    times: Tensor  # (K + 1,)
    eta: Tensor  # (K,)
    has_solver_state = True

    @property
    def stochastic(self) -> Tensor:
        return (self.eta > 0) & (self.schedule.sigma(self.times[1:]) > 0)

    def with_noise(self, mask: Tensor) -> MultistepDPM:
        return replace(self, eta=self.eta.where(mask, 0.0))

    def step(self, k: Tensor, x: Tensor, act: ModelFn, solver_state: Tensor | None = None) -> Transition:
        t, u = self.times[k], self.times[k + 1]
        alpha_t, sigma_t, alpha_u, sigma_u = (
            c(time) for c, time in zip((self.schedule.alpha, self.schedule.sigma) * 2, (t, t, u, u), strict=True)
        )
        denoised = x0_from_score(act(x, t), x, like(alpha_t, x), like(sigma_t, x))
        gain = (sigma_u * alpha_t) / (sigma_t * alpha_u)  # e^{-h}
        kept = gain ** self.eta[k].square()  # e^{-eta^2 h}
        target = denoised
        if solver_state is not None:
            target = denoised + like(self._slope(k), x) * (denoised - solver_state)
        mean = like(sigma_u / sigma_t * kept, x) * x + like(alpha_u * (1 - gain * kept), x) * target
        return Transition(mean, like(sigma_u * (1 - kept.square()).sqrt(), x), solver_state=denoised.detach())

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
    """DPM-Solver++ (2M) at any noise level, one score a step (Lu et al. 2022; THEORY 1.3)."""
    if eta < 0:
        raise condrl.UsageError(f"config sampler.eta: dpm_solver_pp needs a value of at least 0, got {eta}")
    return MultistepDPM(schedule, times, torch.full((len(times) - 1,), eta, dtype=torch.float64))
