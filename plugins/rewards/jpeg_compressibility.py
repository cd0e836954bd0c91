"""Images that make small JPEG files (Black et al. 2024)."""

from collections.abc import Sequence

from torch import Tensor

import condrl
from condrl.rewards.pixels import jpeg_kilobytes


@condrl.reward(differentiable=False)
def jpeg_compressibility(
    samples: Tensor,
    prompts: Sequence[str],
    *,
    quality: int = 95,  # JPEG quality, 1 to 95
) -> Tensor:
    """Minus the size of the image as a JPEG, in kB; no gradient (Black et al. 2024, section 5)."""
    return -jpeg_kilobytes(samples, quality)
