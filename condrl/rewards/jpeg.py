"""JPEG size of images."""

from __future__ import annotations

import io

import torch
from torch import Tensor

from condrl.errors import UsageError
from condrl.rewards.pixels import to_pil


def jpeg_kilobytes(samples: Tensor, quality: int) -> Tensor:
    """Size in kB (1000 bytes) of each image (B, 3, H, W) in [0, 1] as a JPEG of this quality, (B,).

    Raises: UsageError when there is no such quality.
    """
    if not 1 <= quality <= 95:
        raise UsageError(f"a JPEG's quality is from 1 to 95, not {quality}")
    sizes = []
    for image in samples:
        buffer = io.BytesIO()
        to_pil(image).save(buffer, "JPEG", quality=quality)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes)
