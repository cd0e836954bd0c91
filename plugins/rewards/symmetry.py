"""Images that are their own mirror image."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

import condrl


@condrl.reward
def symmetry(
    samples: Tensor,
    prompts: Sequence[str],
    *,
    mirror: Literal["left_right", "up_down"] = "left_right",  # which sides should match
) -> Tensor:
    """Minus the mean absolute difference to the mirror image, in [-1, 0]; differentiable."""
    mirrored = samples.flip(3 if mirror == "left_right" else 2)
    return -(samples - mirrored).abs().mean((1, 2, 3))
