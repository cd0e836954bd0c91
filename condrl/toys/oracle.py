"""Exact answers for toys: mixtures under quadratic rewards, the Riccati optimum, dynamic programs on a 1-D grid.

Everything is float64 and batched over B conditions or points. The formulas are in docs/theory.md 6 and 17.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LOG_2PI = math.log(2 * math.pi)


# ---------------------------------------------------------------------------------------------- mixtures


@dataclass(frozen=True)
class GaussianMixture:
    """B distributions sum_i w_i N(m_i, U_i diag(l_i) U_i^T) in d dimensions."""

    log_weights: Tensor  # (B, n)
    means: Tensor  # (B, n, d)
    variances: Tensor  # (B, n, d) eigenvalues l of the covariances
    bases: Tensor  # (B, n, d, d) their eigenvectors U, as columns

    @classmethod
    def of(cls, weights: Tensor, means: Tensor, covariances: Tensor) -> GaussianMixture:
        """From weights (B, n), means (B, n, d) and covariances (B, n, d, d)."""
        variances, bases = torch.linalg.eigh(covariances)
        return cls((weights / weights.sum(-1, keepdim=True)).log(), means, variances, bases)

    @property
    def covariances(self) -> Tensor:
        return self.bases @ torch.diag_embed(self.variances) @ self.bases.mT

    def rows(self, index: Tensor) -> GaussianMixture:
        """The distributions of the conditions index (B,)."""
        return GaussianMixture(self.log_weights[index], self.means[index], self.variances[index], self.bases[index])

    def to(self, x: Tensor) -> GaussianMixture:
        """With x's dtype and device."""
        return GaussianMixture(*(v.to(x) for v in (self.log_weights, self.means, self.variances, self.bases)))

    def noised(self, alpha: Tensor, sigma: Tensor) -> GaussianMixture:
        """The distributions of alpha X + sigma eps, for alpha, sigma (B,) or scalars."""
        a, s = (c.reshape(-1, 1, 1) for c in (alpha, sigma))
        return GaussianMixture(self.log_weights, a * self.means, a**2 * self.variances + s**2, self.bases)

    def _whitened(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """U^T (x - m) (B, n, d) and each component's log-density with its weight (B, n)."""
        y = torch.einsum("bnij,bni->bnj", self.bases, x[:, None] - self.means)
        quadratic = (y.square() / self.variances).sum(-1)
        log_det = self.variances.log().sum(-1)
        return y, self.log_weights - (quadratic + log_det + x.shape[-1] * LOG_2PI) / 2

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density (B,) at x (B, d), nats."""
        return self._whitened(x)[1].logsumexp(-1)

    def score(self, x: Tensor) -> Tensor:
        """Gradient of the log-density (B, d) at x (B, d) (docs/theory.md 17)."""
        y, log_joint = self._whitened(x)
        pulls = torch.einsum("bnij,bnj->bni", self.bases, y / self.variances)
        return -(log_joint.softmax(-1)[..., None] * pulls).sum(1)

    def posterior(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> GaussianMixture:
        """The distribution of X_0 given alpha X_0 + sigma eps = x (B, d) (docs/theory.md 17)."""
        a, s = (c.reshape(-1, 1, 1) for c in (alpha, sigma))
        log_joint = self.noised(alpha, sigma)._whitened(x)[1]
        variances = 1 / (1 / self.variances + (a / s) ** 2)
        inner = torch.einsum("bnij,bni->bnj", self.bases, self.means) / self.variances
        outer = torch.einsum("bnij,bi->bnj", self.bases, x) * a / s**2
        means = torch.einsum("bnij,bnj->bni", self.bases, variances * (inner + outer))
        return GaussianMixture(log_joint.log_softmax(-1), means, variances, self.bases)

    def mean(self) -> Tensor:
        """(B, d)"""
        return (self.log_weights.exp()[..., None] * self.means).sum(1)

    def sample(self, generator: torch.Generator) -> Tensor:
        """One draw of each distribution, (B, d)."""
        component = torch.multinomial(self.log_weights.exp(), 1, generator=generator)[:, 0]
        rows = torch.arange(len(component))
        noise = torch.randn(self.means[:, 0].shape, generator=generator, dtype=self.means.dtype)
        spread = self.variances[rows, component].sqrt() * noise
        return self.means[rows, component] + torch.einsum("bij,bj->bi", self.bases[rows, component], spread)


@dataclass(frozen=True)
class Quadratic:
    """r(x) = <b, x> - x^T Q x / 2 + c of B conditions."""

    linear: Tensor  # (B, d)
    curvature: Tensor  # (B, d, d)
    constant: Tensor  # (B,)

    def rows(self, index: Tensor) -> Quadratic:
        return Quadratic(self.linear[index], self.curvature[index], self.constant[index])

    def __call__(self, x: Tensor) -> Tensor:
        """(B,) at x (B, d)."""
        bend = torch.einsum("bi,bij,bj->b", x, self.curvature, x)
        return (self.linear * x).sum(-1) - bend / 2 + self.constant


def tilted(distribution: GaussianMixture, reward: Quadratic, kappa: float) -> tuple[GaussianMixture, Tensor]:
    """p* ~ p exp(r / kappa) and log Z = log E_p exp(r / kappa) (B,) (docs/theory.md 17).

    Needs S_i^{-1} + Q / kappa > 0, else the tilted distribution does not exist.
    """
    precision = torch.linalg.inv(distribution.covariances)
    bend, slope = reward.curvature[:, None] / kappa, reward.linear[:, None] / kappa
    P = precision + bend
    pull = torch.einsum("bnij,bnj->bni", precision, distribution.means)
    means = torch.linalg.solve(P, pull + slope)
    log_z = (
        reward.constant[:, None] / kappa
        - torch.logdet(P @ distribution.covariances) / 2
        + torch.einsum("bni,bnij,bnj->bn", means, P, means) / 2
        - torch.einsum("bni,bni->bn", distribution.means, pull) / 2
    )
    log_weights = distribution.log_weights + log_z
    star = GaussianMixture.of(log_weights.softmax(-1), means, torch.linalg.inv(P))
    return star, log_weights.logsumexp(-1)


def value(
    distribution: GaussianMixture, reward: Quadratic, kappa: float, x: Tensor, alpha: Tensor, sigma: Tensor
) -> Tensor:
    """V = kappa log E[exp(r(X_0) / kappa) | X_t = x], (B,) at x (B, d) (docs/theory.md 6 and 17)."""
    return kappa * tilted(distribution.posterior(x, alpha, sigma), reward, kappa)[1]


# ---------------------------------------------------------------------------------------------- 1-D grids


@dataclass(frozen=True)
class Line:
    """n equal cells of the real line; distributions are masses (n,), functions values (n,) at the cells' centres."""

    low: float
    high: float
    cells: int

    @property
    def width(self) -> float:
        return (self.high - self.low) / self.cells

    @property
    def x(self) -> Tensor:
        """(n,) centres."""
        return self.low + self.width * (torch.arange(self.cells, dtype=torch.float64) + 0.5)

    def masses(self, log_density: Tensor) -> Tensor:
        """Masses, which sum to 1, of a log-density (n,) at the centres."""
        return log_density.softmax(0)

    def interpolate(self, values: Tensor, at: Tensor) -> Tensor:
        """Catmull-Rom interpolation of values (n,) at any points, held constant beyond the ends."""
        position = ((at - self.low) / self.width - 0.5).clamp(0, self.cells - 1)
        left = position.floor().clamp(max=self.cells - 2).long()
        u = position - left
        p0, p1, p2, p3 = (values[(left + i).clamp(0, self.cells - 1)] for i in (-1, 0, 1, 2))
        slope1, slope2 = (p2 - p0) / 2, (p3 - p1) / 2
        return (
            p1 * (1 - u) ** 2 * (1 + 2 * u)
            + p2 * u**2 * (3 - 2 * u)
            + slope1 * u * (1 - u) ** 2
            - slope2 * u**2 * (1 - u)
        )

    def push(self, masses: Tensor, means: Tensor, std: float) -> Tensor:
        """The distribution of mean(x) + std z: each cell's mass (n,) spread normally around its mean."""
        if std < self.width / 2:
            return self._share(masses, means)
        edges = self.low + self.width * torch.arange(1, self.cells, dtype=torch.float64)
        cumulative = torch.special.ndtr((edges[None] - means[:, None]) / std)
        below = masses @ cumulative
        return torch.cat([below[:1], below.diff(), masses.sum()[None] - below[-1:]])

    def _share(self, masses: Tensor, means: Tensor) -> Tensor:
        """Each mass to the two nearest cells, so that its mean is kept."""
        position = ((means - self.low) / self.width - 0.5).clamp(0, self.cells - 1)
        left = position.floor().clamp(max=self.cells - 2).long()
        share = position - left
        found = torch.zeros_like(masses).index_add(0, left, masses * (1 - share))
        return found.index_add(0, left + 1, masses * share)


@dataclass(frozen=True)
class Program:
    """The optimal means (K, n) of a 1-D chain at the centres of a line, and the values (K + 1, n)."""

    means: Tensor
    values: Tensor


def hermite(count: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights with E f(z) ~ sum_j w_j f(z_j) for z ~ N(0, 1) (Golub and Welsch 1969)."""
    off = torch.arange(1, count, dtype=torch.float64).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return nodes, vectors[0] ** 2


def dynamic_program(line: Line, base: Tensor, std: Tensor, reward: Tensor, kappa: float, nodes: int = 40) -> Program:
    """V_k(x) = max_m E V_{k+1}(m + S_k z) - kappa (m - base_k(x))^2 / (2 S_k^2), V_K = reward (n,) (docs/theory.md 17).

    `base` (K, n) are the pretrained means at the centres, `std` (K,). A step without noise keeps its base mean.
    """
    values, means = [reward], []
    z, w = hermite(nodes)
    for k in reversed(range(len(std))):
        later, m = values[-1], base[k]
        if std[k] > 0:
            ahead = (w * line.interpolate(later, line.x[:, None] + std[k] * z)).sum(1)
            m = _best_mean(line, ahead, base[k], std[k].item(), kappa)
            cost = kappa * (m - base[k]) ** 2 / (2 * std[k] ** 2)
            values.append((w * line.interpolate(later, m[:, None] + std[k] * z)).sum(1) - cost)
        else:
            values.append(line.interpolate(later, m))
        means.append(m)
    return Program(torch.stack(means[::-1]), torch.stack(values[::-1]))


def _best_mean(line: Line, ahead: Tensor, base: Tensor, std: float, kappa: float) -> Tensor:
    """argmax_m ahead(m) - kappa (m - base)^2 / (2 std^2): the best centre, then the vertex of its parabola."""
    gains = ahead[None] - kappa * (line.x[None] - base[:, None]) ** 2 / (2 * std**2)
    best = gains.argmax(1).clamp(1, line.cells - 2)
    left, middle, right = (gains.gather(1, (best + i)[:, None])[:, 0] for i in (-1, 0, 1))
    bend = left - 2 * middle + right
    vertex = torch.where(bend < 0, (left - right) / (2 * bend.clamp(max=-1e-300)), torch.zeros_like(bend))
    return line.x[best] + line.width * vertex.clamp(-1, 1)


@dataclass(frozen=True)
class Audit:
    """What a 1-D policy does, without sampling: the final masses (n,), E r, the path KL in nats, and the objective."""

    masses: Tensor
    reward: float
    kl: float
    objective: float


def audit(line: Line, means: Tensor, base: Tensor, std: Tensor, start: Tensor, reward: Tensor, kappa: float) -> Audit:
    """Push `start` (n,) through means (K, n) and sum the KLs to `base` (K, n); steps without noise cost nothing."""
    masses, kl = start, 0.0
    for m, b, s in zip(means, base, std.tolist(), strict=True):
        if s > 0:
            kl += (masses * (m - b) ** 2).sum().item() / (2 * s**2)
        masses = line.push(masses, m, s)
    expected = (masses * reward).sum().item()
    return Audit(masses, expected, kl, expected - kappa * kl)


def tilted_masses(line: Line, log_density: Tensor, reward: Tensor, kappa: float) -> tuple[Tensor, float]:
    """Masses of p exp(r / kappa) / Z and log Z, by quadrature."""
    masses = line.masses(log_density)
    joint = masses.log() + reward / kappa
    return joint.softmax(0), joint.logsumexp(0).item()


def kl_of_masses(p: Tensor, q: Tensor) -> float:
    """KL(p || q) in nats."""
    return torch.where(p > 0, p * (p.clamp(min=1e-300).log() - q.clamp(min=1e-300).log()), 0.0).sum().item()
