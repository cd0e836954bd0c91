"""Whether a point lies in a box."""

from typing import Any

from torch import Tensor

import condrl
from condrl.rewards.points import of_rows


@condrl.reward(differentiable=False)
def box(
    samples: Tensor,
    prompts: list[str],
    metadata: list[dict[str, Any]],
    *,
    low: tuple[float, ...] = (-1.0,),  # one number per dimension or one for all
    high: tuple[float, ...] = (1.0,),  # likewise
) -> Tensor:
    """1 for points (B, d) between `low` and `high`, else 0; a prompt row's own "low" and "high" take precedence."""
    lows, highs = (of_rows(samples, prompts, metadata, *bound) for bound in (("low", low), ("high", high)))
    if wrong := (lows > highs).any(1).nonzero().flatten().tolist():
        raise condrl.UsageError(f"the reward box: 'low' is above 'high' for the prompt {prompts[wrong[0]]!r}")
    return ((samples >= lows) & (samples <= highs)).all(1).float()
