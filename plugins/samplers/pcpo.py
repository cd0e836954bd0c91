"""PCPO's noise levels: every step with noise has a score function of the same size (arXiv 2509.25774)."""

from dataclasses import dataclass

import torch
from torch import Tensor

import condrl
from condrl.diffusion.schedule import Schedule, coefficients
from condrl.diffusion.transition import Coefficients


@condrl.sampler
def pcpo(
    schedule: Schedule,
    times: Tensor,
    *,
    weight: float | None = None,  # |d mean / d output| / std of every step with noise; null: the one with most noise
) -> Coefficients:
    """DDIM with a noise level for each step, so that policy gradients weigh them alike (docs/theory.md 3).

    A step that is heavier at every level has no noise. With null, the sum of the squared levels is the largest.

    Raises: UsageError when no step can have the weight.
    """
    t, u = times[:-1], schedule.targets(times)
    alpha_t, alpha_u, sigma_t, sigma_u = schedule.alpha(t), schedule.alpha(u), schedule.sigma(t), schedule.sigma(u)
    fresh = 1 - (alpha_t * sigma_u / (alpha_u * sigma_t)).square()

    def numbers(level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        A, B = coefficients(alpha_t, sigma_t, alpha_u, sigma_u * torch.sqrt(1 - level**2 * fresh))
        return A, B, level * sigma_u * fresh.sqrt()

    slope = (schedule.score(torch.ones_like(t), 0 * t, t) - schedule.score(0 * t, 0 * t, t)).abs()
    whole, rest = (slope * coefficients(alpha_t, sigma_t, alpha_u, kept)[1] for kept in (0 * t, sigma_u))
    slopes = Slopes(whole, whole - rest, sigma_u, fresh.sqrt())
    level = slopes.noisiest() if weight is None else slopes.checked(weight)
    return Coefficients.at(schedule, times, level, numbers)


@dataclass(frozen=True)
class Slopes:
    """Of steps (K,) that keep sigma cos of the noise and add sigma sin: |d mean / d output| = whole - lost cos."""

    whole: Tensor
    lost: Tensor
    sigma: Tensor
    largest: Tensor  # sin at noise level 1

    @property
    def least(self) -> Tensor:
        """The least weight (K,) that each step can have, at noise level 1; infinite where no noise can be added."""
        least = (self.whole.square() - self.lost.square()).clamp(min=0).sqrt() / self.sigma
        return least.where(self.sigma > 0, torch.inf)

    def levels(self, weight: Tensor) -> Tensor:
        """The noise levels (K,) at which whole - lost cos = weight sigma sin; 0 where the weight is too small."""
        length = (self.lost.square() + (weight * self.sigma).square()).sqrt()
        angle = torch.atan2(weight * self.sigma, self.lost) - (self.whole / length).clamp(max=1).acos()
        return (angle.sin() / self.largest).clamp(0, 1).where(self.least <= weight, 0.0)

    def noisiest(self) -> Tensor:
        """The levels at the weight with the most noise: it is one that some step has at noise level 1."""
        none = torch.zeros_like(self.least)  # of a single step, which ends at the data
        every = torch.stack([none, *(self.levels(weight) for weight in self.least[self.least.isfinite()])])
        return every[every.square().sum(1).argmax()]

    def checked(self, weight: float) -> Tensor:
        """Raises: UsageError when no step can have the weight."""
        if not weight >= self.least.min():
            raise condrl.UsageError(
                f"config sampler.weight: no step can have as little as {weight:g} on this grid; some can from "
                f"{self.least.min():.3g}, all from {self.least[self.least.isfinite()].max():.3g}"
            )
        return self.levels(torch.tensor(weight, dtype=self.whole.dtype))
