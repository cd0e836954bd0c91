"""What rewards of pixels share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from condrl.errors import UsageError, brief
from condrl.io.files import why_unreadable


def luma(samples: Tensor) -> Tensor:
    """(B, H, W) in [0, 1] of images (B, 3, H, W) in [0, 1] (ITU-R BT.709)."""
    weights = samples.new_tensor([0.2126, 0.7152, 0.0722])
    return torch.einsum("bchw,c->bhw", samples, weights)


def from_pil(image: Image.Image) -> Tensor:
    """(3, H, W) float32 in [0, 1], turned as its EXIF tag says; what is transparent shows white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # 16 or 32 bits of grey, of which Pillow's RGB would keep the lowest 8
        grey = torch.from_numpy(np.array(image).astype(np.float32)) / (1 if image.mode == "F" else 65535)
        return grey.clamp(0, 1).expand(3, *grey.shape).contiguous()
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def read_image(path: Path, what: str) -> Tensor:
    """An image file, (3, H, W) in [0, 1]; `what` it should be begins the complaint.

    Raises: UsageError naming the file when it is no image, or cannot be decoded whole.
    """
    if why := why_unreadable(path):
        raise UsageError(f"{what}: {path} {why}")
    try:
        with Image.open(path) as image:
            return from_pil(image)
    except Exception as error:  # Pillow passes on whatever its decoders raise
        raise UsageError(f"{what}: {path} cannot be read as an image: {brief(error)}") from error


def to_pil(image: Tensor) -> Any:
    """A (3, H, W) image in [0, 1] as a PIL image."""
    from PIL import Image

    pixels = image.detach().float().cpu().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(pixels.numpy()))
