"""The exponential integrator of the reverse SDE: DDIM at eta = 0, DDPM at eta = 1, and any noise level."""

from torch import Tensor

import condrl
from condrl.diffusion.schedule import Schedule, coefficients
from condrl.diffusion.transition import Coefficients, check_noise_level


@condrl.sampler
def exponential(
    schedule: Schedule,
    times: Tensor,
    *,
    eta: float = 1.0,  # noise level >= 0
) -> Coefficients:
    """Exact in the linear part for a score of constant epsilon; gDDIM (Zhang et al. 2023; docs/theory.md 3, S2)."""
    check_noise_level(eta)
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    alpha_t, alpha_u, sigma_t, sigma_u = alpha[:-1], alpha[1:], sigma[:-1], sigma[1:]
    ratio = alpha_t * sigma_u / (alpha_u * sigma_t)  # e^{-h}, h the gain in log-SNR; 0 to the data, or from pure noise

    def numbers(level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kept = ratio ** level.square()
        return *coefficients(alpha_t, sigma_t, alpha_u, sigma_u * kept), sigma_u * (1 - kept.square()).sqrt()

    return Coefficients.at(schedule, times, eta, numbers)
