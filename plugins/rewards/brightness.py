"""Bright images."""

from collections.abc import Sequence

from torch import Tensor

import condrl
from condrl.rewards.pixels import luma


@condrl.reward
def brightness(samples: Tensor, prompts: Sequence[str]) -> Tensor:
    """Mean luma, in [0, 1]; differentiable (ITU-R BT.709)."""
    return luma(samples).mean((1, 2))
