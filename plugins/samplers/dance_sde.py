"""DanceGRPO's SDE (Xue et al. 2025): Euler-Maruyama with a constant rate of noise."""

from torch import Tensor

import condrl
from condrl.diffusion.schedule import Schedule
from condrl.diffusion.transition import Coefficients, check_noise_level, euler_maruyama


@condrl.sampler
def dance_sde(
    schedule: Schedule,
    times: Tensor,
    *,
    noise_level: float = 0.3,  # standard deviation per square root of time, >= 0
) -> Coefficients:
    """DanceGRPO's sampler: Euler-Maruyama with eta(t) g(t) constant (docs/theory.md 3)."""
    check_noise_level(noise_level, "noise_level")
    return euler_maruyama(schedule, times, noise_level / schedule.noise_rate(times).sqrt())
