"""Flow-GRPO's SDE (Liu et al. 2025): Euler-Maruyama with the noise a sqrt(t / (1 - t)) of a rectified flow."""

from torch import Tensor

import condrl
from condrl.diffusion.schedule import Schedule
from condrl.diffusion.transition import Coefficients, check_noise_level, euler_maruyama


@condrl.sampler
def flow_sde(
    schedule: Schedule,
    times: Tensor,
    *,
    noise_level: float = 0.7,  # a >= 0; a = sqrt(2) is memoryless
) -> Coefficients:
    """Flow-GRPO's sampler: Euler-Maruyama at eta = a / sqrt(2), whatever the schedule (docs/theory.md 3)."""
    check_noise_level(noise_level, "noise_level")
    return euler_maruyama(schedule, times, noise_level / 2**0.5)
