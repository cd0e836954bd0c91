"""What a model provides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from condrl.diffusion.schedule import Schedule


class Model(Protocol):
    """What a model plugin provides. A condition is a (B,) tensor of the numbers that `encode` assigned to prompts."""

    schedule: Schedule
    module: nn.Module  # the network that holds every trained weight
    evaluations: int  # network evaluations of one image so far

    @property
    def device(self) -> torch.device: ...

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Of x: latents (C, h, w), or points (d,)."""
        ...

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Of what `decode` returns: images (3, H, W), or points (d,)."""
        ...

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Conditions (B,) of prompts; cheap, also for very many."""
        ...

    def predict(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """The network's output at x (B, ...), times t (B,), in its own terms; the only place that calls it."""
        ...

    def score(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """The action at x (B, ...), times t (B,), from `predict` with and without the prompt."""
        ...

    def features(self, condition: Tensor) -> Tensor:
        """Features (B, F) of conditions (B,) for a value network."""
        ...

    def decode(self, x: Tensor) -> Tensor:
        """Samples for the reward: images (B, 3, H, W) in [0, 1]."""
        ...

    def encode_images(self, images: Tensor) -> Tensor:
        """States (B, ...) that `decode` to images (B, 3, H, W) in [0, 1], or nearly so."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Within it, the model is the pretrained one."""
        ...

    def merged(self) -> AbstractContextManager[None]:
        """Within it, without gradients, the model may compute the same function faster."""
        ...

    def shard(self) -> None:
        """Spread the frozen weights over the processes.

        Raises: UsageError where there is nothing to spread.
        """
        ...

    def save_adapter(self, folder: Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write what was trained, in files that other programs read, with texts for their headers."""
        ...

    def load_adapter(self, folder: Path) -> None:
        """Read what was trained from a folder, or from a file."""
        ...


@runtime_checkable
class Featured(Protocol):
    """What a model with a deep network may provide beside."""

    def network_features(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """What its network, called once, makes of x (B, ...) at times t (B,): (B, F) float32, without gradients."""
        ...
