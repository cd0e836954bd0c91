"""Euler-Maruyama steps of the reverse SDE of any noise level; eta = 0 is Euler's method on the ODE."""

from torch import Tensor

import condrl
from condrl.diffusion.schedule import Schedule
from condrl.diffusion.transition import Coefficients, check_noise_level
from condrl.diffusion.transition import euler_maruyama as coefficients


@condrl.sampler
def euler_maruyama(
    schedule: Schedule,
    times: Tensor,
    *,
    eta: float = 1.0,  # noise level >= 0
) -> Coefficients:
    """Euler-Maruyama at noise level eta; eta = 0 is Euler on the probability-flow ODE (docs/theory.md 3, S1)."""
    check_noise_level(eta)
    return coefficients(schedule, times, eta)
