"""DDIM (Song et al. 2021): eta = 0 is the ODE, eta = 1 is ancestral DDPM sampling."""

import torch
from torch import Tensor

import condrl
from condrl.diffusion.schedule import Schedule, coefficients
from condrl.diffusion.transition import Coefficients, check_noise_level


@condrl.sampler
def ddim(
    schedule: Schedule,
    times: Tensor,
    *,
    eta: float = 1.0,  # noise level in [0, 1]
) -> Coefficients:
    """DDIM with noise level eta in [0, 1]; eta = 1 is DDPM (Song et al. 2021, eq. 12)."""
    check_noise_level(eta, most=1)
    t, u = times[:-1], schedule.targets(times)
    alpha_t, alpha_u, sigma_t, sigma_u = schedule.alpha(t), schedule.alpha(u), schedule.sigma(t), schedule.sigma(u)
    fresh = 1 - (alpha_t * sigma_u / (alpha_u * sigma_t)).square()  # 1 - e^{-2h}, h the gain in log-SNR

    def numbers(level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        A, B = coefficients(alpha_t, sigma_t, alpha_u, sigma_u * torch.sqrt(1 - level**2 * fresh))
        return A, B, level * sigma_u * fresh.sqrt()

    return Coefficients.at(schedule, times, eta, numbers)
