"""Random draws that are functions of a seed and of what they are for, not of what was drawn before."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Noise:
    """Draws for images of an epoch, the same however the images are split over batches and processes.

    Each image has an index in the epoch, and `group` consecutive images share a stream. The n-th draw of a `Noise` is a
    function of the seed, n and the indices, so parts of it (`noise[rows]`) start over. With `same_start` the images of
    a stream begin alike.
    """

    def __init__(self, seed: str, indices: range, group: int, same_start: bool = False) -> None:
        self.seed, self.indices, self.group, self.same_start = seed, indices, group, same_start
        self.draws = itertools.count()

    def __getitem__(self, rows: slice) -> Noise:
        return Noise(self.seed, self.indices[rows], self.group, self.same_start)

    def start(self, shape: tuple[int, ...]) -> Tensor:
        """Standard normal (B, *shape), where chains begin."""
        return self._draw(torch.randn, shape, self.same_start)

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Standard normal (B, *shape)."""
        return self._draw(torch.randn, shape)

    def uniform(self, shape: tuple[int, ...]) -> Tensor:
        """Uniform on [0, 1), (B, *shape)."""
        return self._draw(torch.rand, shape)

    def shared(self, purpose: object) -> torch.Generator:
        """A generator that is the same for all images and processes."""
        return seeded_by(f"{self.seed} {purpose}")

    def _draw(self, kind: Callable[..., Tensor], shape: tuple[int, ...], same: bool = False) -> Tensor:
        draw, parts, indices = next(self.draws), [], self.indices
        for stream in range(indices.start // self.group, -(-indices.stop // self.group)):
            start = stream * self.group
            drawn = kind((1 if same else self.group, *shape), generator=self.shared(f"{stream} {draw}"))
            whole = drawn.expand(self.group, *shape)
            parts.append(whole[max(0, indices.start - start) : indices.stop - start])
        return torch.cat(parts)


Source = Noise | torch.Generator | list[torch.Generator]


def randn(shape: tuple[int, ...], source: Source, device: torch.device) -> Tensor:
    """Standard normal noise (B, ...), drawn on the CPU so that a seed gives the same noise on every device.

    With a list, row i is drawn by generator i alone, so it does not depend on its batch; nor does a `Noise`.
    """
    if isinstance(source, Noise):
        return source.normal(shape[1:]).to(device)
    if isinstance(source, list):
        return torch.cat([torch.randn((1, *shape[1:]), generator=g) for g in source]).to(device)
    return torch.randn(shape, generator=source).to(device)


def start_noise(shape: tuple[int, ...], source: Source, device: torch.device) -> Tensor:
    """As `randn`, for the beginning of chains."""
    return source.start(shape[1:]).to(device) if isinstance(source, Noise) else randn(shape, source, device)


def seeded(seeds: list[int]) -> list[torch.Generator]:
    """A CPU generator for each seed, as diffusers pipelines take them."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def seeded_by(text: str) -> torch.Generator:
    """A CPU generator that a text determines."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1)


def rng_state() -> dict[str, Any]:
    """Where the global generators of torch, Python and numpy are, which plugins may draw from."""
    legacy = np.random.get_state(legacy=False)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": {**legacy, "state": {name: np.asarray(value).tolist() for name, value in legacy["state"].items()}},
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put them back to where `rng_state` found them."""
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    key = np.array(state["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state({**state["numpy"], "state": {**state["numpy"]["state"], "key": key}})
