"""How well the embedded pipeline's images obey their prompts, graded by rule."""

from collections.abc import Sequence

import torch
from torch import Tensor

import condrl
from condrl.shapes import scenes


@condrl.reward(differentiable=False)
def shapes(samples: Tensor, prompts: Sequence[str]) -> Tensor:
    """How well the coloured shapes obey the prompt, in [0, 1]; 1 means exactly."""
    return torch.tensor(scenes.grade(samples.float().cpu().numpy(), prompts))
