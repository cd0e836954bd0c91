"""Share of images that obey their prompt exactly."""

from collections.abc import Sequence

import torch
from torch import Tensor

import condrl
from condrl.shapes import scenes


@condrl.reward(differentiable=False)
def shapes_exact(samples: Tensor, prompts: Sequence[str]) -> Tensor:
    """1 if the coloured shapes obey the prompt exactly, else 0."""
    return torch.tensor(scenes.grade(samples.float().cpu().numpy(), prompts)).eq(1).float()
