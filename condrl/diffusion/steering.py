"""What a steering plugin is given: images to draw, and the rewards of states on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from condrl.diffusion.policy import Policy


@dataclass(frozen=True)
class Draws:
    """B images to draw; a steering plugin returns their final states (B, ...)."""

    policy: Policy
    condition: Tensor  # (B,) the prompts' numbers
    generators: list[torch.Generator]  # one for each image, so that it does not depend on those beside it
    score: Callable[[Tensor, Tensor], Tensor]  # the total reward (n,) of states (n, ...) drawn for the images (n,);
    # in grad mode with the gradients of rewards that have one

    def repeated(self, count: int) -> tuple[Tensor, Tensor, list[torch.Generator]]:
        """For `count` chains of each image: its number, its condition, each (B * count,), and its generator."""
        images = torch.arange(len(self.condition)).repeat_interleave(count)
        return images, self.condition[images], [self.generators[i] for i in images.tolist()]
