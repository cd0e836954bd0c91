"""What rewards of pixels share: luma, and images from and to Pillow's and files."""

from __future__ import annotations

import io
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
    """A PIL image as (3, H, W) float32 in [0, 1], turned as its EXIF tag says, on white where it is transparent."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # 16 or 32 bits of grey, of which Pillow's RGB would keep the lowest 8
        grey = torch.from_numpy(np.array(image).astype(np.float32)) / (1 if image.mode == "F" else 65535)
        return grey.clamp(0, 1).expand(3, *grey.shape).contiguous()
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def read_image(path: Path, what: str) -> Tensor:
    """An image file, (3, H, W) in [0, 1]; the error begins with `what` it should be.

    Raises: UsageError naming the file when it is not an image, or cannot be decoded completely.
    """
    if why := why_unreadable(path):
        raise UsageError(f"{what}: {path} {why}")
    try:
        with Image.open(path) as image:
            return from_pil(image)
    except Exception as error:  # Pillow passes on whatever its decoders raise
        raise UsageError(f"{what}: {path} cannot be read as an image: {brief(error)}") from error


def to_pil(image: Tensor) -> Image.Image:
    """A (3, H, W) image in [0, 1] as a PIL image."""
    pixels = image.detach().float().cpu().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(pixels.numpy()))


def encoded(image: Tensor, kind: str, **options: Any) -> bytes:
    """A (3, H, W) image in [0, 1] as a file in one of Pillow's formats, with its options for that."""
    file = io.BytesIO()
    to_pil(image).save(file, kind, **options)
    return file.getvalue()


def jpeg_kilobytes(samples: Tensor, quality: int) -> Tensor:
    """Size in kB (1000 bytes) of each image (B, 3, H, W) in [0, 1] as a JPEG of this quality, (B,).

    Raises: UsageError when the quality is not from 1 to 95.
    """
    if not 1 <= quality <= 95:
        raise UsageError(f"a JPEG's quality is from 1 to 95, not {quality}")
    return torch.tensor([len(encoded(image, "JPEG", quality=quality)) / 1000 for image in samples])
