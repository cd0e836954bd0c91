"""Sharp images."""

from collections.abc import Sequence

from torch import Tensor, nn

import condrl
from condrl.rewards.pixels import luma


@condrl.reward
def sharpness(samples: Tensor, prompts: Sequence[str]) -> Tensor:
    """Variance of the luma's Laplacian, in squared 8-bit levels, 0 to about 10^6; differentiable."""
    grey = 255 * luma(samples)[:, None]
    kernel = grey.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]]).view(1, 1, 3, 3)
    return nn.functional.conv2d(grey, kernel).flatten(1).var(1, correction=0)
