"""What rewards of pixels share."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def luma(samples: Tensor) -> Tensor:
    """(B, H, W) in [0, 1] of images (B, 3, H, W) in [0, 1] (ITU-R BT.709)."""
    weights = samples.new_tensor([0.2126, 0.7152, 0.0722])
    return torch.einsum("bchw,c->bhw", samples, weights)


def from_pil(image: Image.Image) -> Tensor:
    """(3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
