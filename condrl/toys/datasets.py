"""Data sets of points, and the score of their noised distribution by the ratio estimator of Gao et al. 2024."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from condrl.errors import UsageError
from condrl.registry import suggestion


def swiss_roll(
    count: int, generator: torch.Generator, *, noise: float = 1.0, scale: float = 1 / 3, angle: float = 0.0
) -> Tensor:
    """(count, 2) of scikit-learn's Swiss roll seen from the side, times `scale`, turned by `angle` degrees."""
    turn = 1.5 * math.pi * (1 + 2 * torch.rand(count, generator=generator))
    points = turn[:, None] * torch.stack([turn.cos(), turn.sin()], 1)
    points = (points + noise * torch.randn(count, 2, generator=generator)) * scale
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return points @ torch.tensor([[c, s], [-s, c]])


def mixture(
    count: int,
    generator: torch.Generator,
    *,
    weights: Sequence[float],
    means: Sequence[float],
    variances: Sequence[float],
) -> Tensor:
    """(count, 1) of a mixture of Gaussians on the line."""
    which = torch.multinomial(torch.tensor(weights), count, replacement=True, generator=generator)
    spread = torch.tensor(variances).sqrt()[which]
    return (torch.tensor(means)[which] + spread * torch.randn(count, generator=generator))[:, None]


DATASETS: dict[str, Callable[..., Tensor]] = {"swiss_roll": swiss_roll, "mixture": mixture}


def make_dataset(prompt: str, options: Mapping[str, Any], count: int, generator: torch.Generator) -> Tensor:
    """`count` points (count, d) of the data set that `options` name and describe.

    Raises: UsageError when there is no such data set, or when it cannot take the options.
    """
    options = dict(options)
    name = options.pop("name", None)
    if name not in DATASETS:
        known = ", ".join(DATASETS)
        raise UsageError(
            f"config model.data[{prompt!r}].name: {name!r} is not one of {known}.{suggestion(str(name), DATASETS)}"
        )
    try:
        return DATASETS[name](count, generator, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"config model.data[{prompt!r}]: {error}") from error


def ratio_score(x: Tensor, points: Tensor, alpha: Tensor, sigma: Tensor, floor: float = 1e-12) -> Tensor:
    """The score (K, B, d) of alpha X_0 + sigma eps at x (K, B, d) from points (K, m, d) of X_0, alpha, sigma (K,).

    (-x + alpha sum_i p_i x_i / max(sum_i p_i, m floor)) / sigma^2 with p_i the density of x given x_i
    (Gao et al. 2024, eq. 18; docs/theory.md 12).
    """
    a, v = (c.to(x)[:, None, None] for c in (alpha, sigma.square()))
    centres, log2 = a * points, math.log2(math.e) / v  # exp2 is three times as fast as exp on CPUs
    # log density = (<x, c> - |x|^2 / 2 - |c|^2 / 2) / v and a constant: a product, (m, d + 2) by (d + 2, B)
    of_points = torch.cat([with_one(centres), -centres.square().sum(2, keepdim=True) / 2], 2) * log2
    of_x = with_one(torch.cat([x, -x.square().sum(2, keepdim=True) / 2], 2)).mT.contiguous()
    summed = with_one(centres).mT.contiguous()
    # a step at a time: its densities then stay in the processor's cache
    sums = torch.stack([s @ (p @ q).exp2_() for s, p, q in zip(summed, of_points, of_x, strict=True)]).mT
    least = points.shape[1] * floor * (2 * math.pi * v) ** (x.shape[2] / 2)
    return (sums[..., :-1] / torch.maximum(sums[..., -1:], least) - x) / v


def with_one(x: Tensor) -> Tensor:
    """(K, n, d + 1): x (K, n, d) with a last coordinate 1."""
    return torch.nn.functional.pad(x, (0, 1), value=1.0)
