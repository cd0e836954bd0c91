"""A quadratic function of points, which may differ from prompt to prompt."""

from typing import Any

from torch import Tensor

import condrl
from condrl.rewards.points import of_rows


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
    """<b, x> - x^T Q x / 2 + c of points (B, d); a prompt row's own "linear" and "curvature" take precedence."""
    b, Q = (of_rows(samples, prompts, metadata, *part) for part in (("linear", linear), ("curvature", curvature)))
    return (b * samples - Q * samples.square() / 2).sum(1) + constant
