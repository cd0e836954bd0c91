"""DDIM (Song et al. 2021): eta = 0 is the ODE, eta = 1 is ancestral DDPM sampling."""

import torch
from torch import Tensor

import condrl
from condrl.schedule import DiscreteSchedule
from condrl.transition import Coefficients


@condrl.sampler
def ddim(
    schedule: DiscreteSchedule,
    times: Tensor,
    *,
    eta: float = 1.0,  # noise level in [0, 1]
) -> Coefficients:
    """DDIM with noise level eta in [0, 1]; eta = 1 is DDPM (Song et al. 2021, eq. 12)."""
    if not 0 <= eta <= 1:
        raise condrl.UsageError(f"config sampler.eta: ddim needs a value in [0, 1], got {eta}")
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    alpha_t, alpha_u, sigma_t, sigma_u = alpha[:-1], alpha[1:], sigma[:-1], sigma[1:]
    fresh = 1 - (alpha_t * sigma_u / (alpha_u * sigma_t)).square()  # 1 - e^{-2h}, h the gain in log-SNR
    A = alpha_u / alpha_t
    B = sigma_t * (A * sigma_t - sigma_u * torch.sqrt(1 - eta**2 * fresh))
    return Coefficients(times, A, B, eta * sigma_u * fresh.sqrt(), torch.full_like(A, eta))
