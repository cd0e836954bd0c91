"""DanceGRPO's SDE (Xue et al. 2025): Euler-Maruyama with a constant rate of noise."""

from torch import Tensor

import condrl
from condrl.diffusion.schedule import Schedule
from condrl.diffusion.transition import Coefficients, euler_maruyama


@condrl.sampler
def dance_sde(
    schedule: Schedule,
    times: Tensor,
    *,
    noise_level: float = 0.3,  # standard deviation per square root of time, >= 0
) -> Coefficients:
    """DanceGRPO's sampler: Euler-Maruyama with eta(t) g(t) constant (THEORY 1.3)."""
    if noise_level < 0:
        raise condrl.UsageError(f"config sampler.noise_level: dance_sde needs at least 0, got {noise_level}")
    return euler_maruyama(schedule, times, noise_level / schedule.noise_rate(times).sqrt())
