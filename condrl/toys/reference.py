"""Known answers that only tests use, kept as reference: closed forms, and values by Monte Carlo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from condrl.diffusion.policy import Policy
from condrl.diffusion.rollout import Place, advance
from condrl.diffusion.transition import Coefficients
from condrl.prompts import Row
from condrl.rewards.scoring import Reward, score
from condrl.toys.oracle import GaussianMixture, Line, Quadratic, tilted


def optimal_score(
    distribution: GaussianMixture, reward: Quadratic, kappa: float, x: Tensor, alpha: Tensor, sigma: Tensor
) -> Tensor:
    """The optimal action at eta = 1: the score of the noised p*, (B, d) at x (B, d) (docs/theory.md 6)."""
    return tilted(distribution, reward, kappa)[0].noised(alpha, sigma).score(x)


def wasserstein(line: Line, p: Tensor, q: Tensor) -> float:
    """W_1 of two distributions on a line."""
    return ((p - q).cumsum(0).abs().sum() * line.width).item()


# ---------------------------------------------------------------------------------------------- Riccati


@dataclass(frozen=True)
class LinearPolicy:
    """Means gain_k x + offset_k of the K steps of a 1-D chain, and its objective E r - kappa KL."""

    gain: Tensor  # (K,)
    offset: Tensor  # (K,)
    objective: Tensor  # ()


def riccati(
    chain: tuple[Tensor, Tensor, Tensor],
    reward: tuple[float, float, float],
    kappa: float,
    start: tuple[float, float],
) -> LinearPolicy:
    """The best means for x' = a_k x + c_k + S_k z, r = b x - Q x^2 / 2 + c0 and start N(m, v) (docs/theory.md 17).

    `chain` is (a, c, S), each (K,) float64; `reward` is (b, Q, c0). The variance of each step stays S_k^2.
    """
    a, c, S = chain
    q, P, r = (torch.tensor(v, dtype=torch.float64) for v in reward)
    gain, offset = torch.empty_like(a), torch.empty_like(a)
    for k in reversed(range(len(a))):
        variance = S[k] ** 2
        D = 1 + P * variance / kappa
        gain[k], offset[k] = a[k] / D, (c[k] + q * variance / kappa) / D
        r = r + (q * c[k] - P * c[k] ** 2 / 2 + q**2 * variance / (2 * kappa)) / D - P * variance / 2
        q, P = a[k] * (q - P * c[k]) / D, a[k] ** 2 * P / D
    m, v = start
    return LinearPolicy(gain, offset, -P * (m**2 + v) / 2 + q * m + r)


def gaussian_chain(
    sampler: Coefficients, alpha: Tensor, sigma: Tensor, mean: float, variance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(a, c, S) of a one-stage sampler driven by the exact score of N(mean, variance), alpha, sigma at its times."""
    spread = alpha[:-1] ** 2 * variance + sigma[:-1] ** 2
    return sampler.A - sampler.B / spread, sampler.B * alpha[:-1] * mean / spread, sampler.S


# ---------------------------------------------------------------------------------------------- Monte Carlo


@dataclass(frozen=True)
class ValueEstimate:
    """V = kappa log E exp(r / kappa) with the standard error of the estimate."""

    value: float
    error: float


def feynman_kac(rewards: Tensor, kappa: float) -> ValueEstimate:
    """V at a state from the rewards (n,) of base chains that continue from it (docs/theory.md 6)."""
    scaled = rewards.double() / kappa
    weights = (scaled - scaled.max()).exp()
    mean = weights.mean()
    error = weights.std() / mean / len(weights) ** 0.5
    return ValueEstimate(kappa * (mean.log() + scaled.max()).item(), kappa * error.item())


@torch.no_grad()
def monte_carlo_value(
    policy: Policy,
    place: Place,
    row: Row,
    rewards: Sequence[Reward],
    kappa: float,
    particles: int,
    generator: torch.Generator,
) -> ValueEstimate:
    """V = kappa log E exp(r / kappa) at the place of one chain, for any model and reward.

    From `particles` pretrained chains (Feynman-Kac; docs/theory.md 6).
    """
    model, i = policy.model, torch.zeros(particles, dtype=torch.long)
    condition = model.encode([row.prompt] * particles)
    place = place[i]
    with model.reference():
        while place.k < policy.steps:
            _, place = advance(policy, place, condition, generator)
    return feynman_kac(score(rewards, model.decode(place.x), [row] * particles).total, kappa)
