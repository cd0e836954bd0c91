"""Whether a point lies in a box."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import condrl


@condrl.reward(differentiable=False)
def box(
    samples: Tensor,
    prompts: list[str],
    metadata: list[dict[str, Any]],
    *,
    low: tuple[float, ...] = (-1.0,),  # one number per dimension or one for all
    high: tuple[float, ...] = (1.0,),  # likewise
) -> Tensor:
    """1 for points (B, d) between `low` and `high`, else 0; a prompt row's own "low" and "high" come first."""

    def corners(name: str, default: Sequence[float]) -> Tensor:
        return torch.tensor([row.get(name, default) for row in metadata]).to(samples)

    inside = (samples >= corners("low", low)) & (samples <= corners("high", high))
    return inside.all(1).float()
