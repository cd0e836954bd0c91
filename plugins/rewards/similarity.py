"""Images that resemble given ones."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import condrl
from condrl.io.files import locate
from condrl.prompts import IMAGES
from condrl.rewards.pixels import read_image


@condrl.reward
class Similarity:
    """Minus the root mean square difference to the nearest of some reference images, in [-1, 0]; differentiable."""

    def __init__(
        self,
        *,
        images: str,  # an image, or a folder of images; they are resized to the samples' size
    ) -> None:
        path = locate(images)
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        files = [file for file in files if file.is_file() and file.suffix.lower() in IMAGES]
        if not files:
            raise condrl.UsageError(f"config rewards.similarity.images: no image ({', '.join(IMAGES)}) at {path}")
        self.files, self.references = files, torch.empty(0)

    def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        if self.references.shape[2:] != samples.shape[2:] or self.references.device != samples.device:
            self.references = torch.cat([self._fitted(file, samples) for file in self.files])
        nearest = torch.stack([(samples - one).square().mean((1, 2, 3)) for one in self.references]).amin(0)
        return -nearest.sqrt()

    def load(self) -> None:
        for file in self.files:
            self._read(file)

    def _read(self, file: Path) -> Tensor:
        return read_image(file, "config rewards.similarity.images")[None]

    def _fitted(self, file: Path, samples: Tensor) -> Tensor:
        x, size = self._read(file).to(samples), (samples.shape[2], samples.shape[3])
        return nn.functional.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 1)
