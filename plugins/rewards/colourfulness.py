"""Colourful images (Hasler and Suesstrunk 2003)."""

from collections.abc import Sequence

from torch import Tensor

import condrl


@condrl.reward
def colourfulness(samples: Tensor, prompts: Sequence[str]) -> Tensor:
    """Spread and strength of the opponent colours, in 8-bit levels, 0 to about 293 (Hasler and Suesstrunk 2003).

    Differentiable where the image is not of one colour.
    """
    red, green, blue = (255 * samples).flatten(2).unbind(1)
    against_green, against_blue = red - green, (red + green) / 2 - blue
    spread = against_green.var(1, correction=0) + against_blue.var(1, correction=0)
    strength = against_green.mean(1).square() + against_blue.mean(1).square()
    return spread.sqrt() + 0.3 * strength.sqrt()
