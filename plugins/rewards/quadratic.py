"""A quadratic function of points, which may differ from prompt to prompt."""

from typing import Any

import torch
from torch import Tensor

import condrl


@condrl.reward
def quadratic(
    samples: Tensor,
    prompts: list[str],
    metadata: list[dict[str, Any]],
    *,
    linear: tuple[float, ...] = (1.0,),  # b, one number per dimension or one for all
    curvature: tuple[float, ...] = (0.0,),  # the diagonal of Q, likewise
    constant: float = 0.0,  # c
) -> Tensor:
    """<b, x> - x^T Q x / 2 + c of points (B, d); a prompt row's own "linear" and "curvature" come first."""
    b = torch.tensor([row.get("linear", linear) for row in metadata]).to(samples)
    Q = torch.tensor([row.get("curvature", curvature) for row in metadata]).to(samples)
    return (b * samples - Q * samples.square() / 2).sum(1) + constant
