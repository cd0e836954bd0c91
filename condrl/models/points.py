"""What models of points share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from condrl.diffusion.schedule import Schedule
from condrl.errors import UsageError
from condrl.io.files import load_tensors, save_tensors
from condrl.registry import suggestion


class Points(ABC):
    """A model of points (B, d), with one distribution for each prompt that its config names."""

    distributions_option: ClassVar[str] = "distributions"  # the option that names the prompts
    device: torch.device
    prompts: list[str]
    schedule: Schedule
    state_shape: tuple[int]
    module: nn.Module
    evaluations = 0
    tuned = True  # False within `reference`

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Rows (B,) of the prompts' distributions.

        Raises: UsageError on a prompt without one.
        """
        for prompt in prompts:
            if prompt not in self.prompts:
                near = suggestion(prompt, self.prompts)
                raise UsageError(
                    f"config model.{self.distributions_option}: there is no distribution for {prompt!r}.{near}"
                )
        return torch.tensor([self.prompts.index(prompt) for prompt in prompts])

    def features(self, condition: Tensor) -> Tensor:
        """One-hot prompts (B, C)."""
        return nn.functional.one_hot(condition, len(self.prompts)).float().to(self.device)

    @property
    def sample_shape(self) -> tuple[int]:
        return self.state_shape

    @abstractmethod
    def predict(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """The score (B, d) at x (B, d) and times t (B,)."""

    def score(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """The network's output, which is the score."""
        self.evaluations += len(x)
        return self.predict(x, t, condition)

    def decode(self, x: Tensor) -> Tensor:
        return x

    def encode_images(self, images: Tensor) -> Tensor:
        return images.to(self.device)

    def shard(self) -> None:
        """Raises: UsageError, since there is nothing to spread."""
        raise UsageError("a model of points cannot be sharded: use another of configs/accelerate")

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within it, the score is the one that tuning started from."""
        self.tuned = False
        try:
            yield
        finally:
            self.tuned = True

    def merged(self) -> AbstractContextManager[None]:
        return nullcontext()

    def save_adapter(self, folder: Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write the weights of what is trained."""
        save_module(self.module, folder, metadata)

    def load_adapter(self, folder: Path) -> None:
        """Read them.

        Raises: UsageError when there are none in the folder.
        """
        load_module(self.module, folder)


def check_signal(schedule: Schedule) -> None:
    """Raises: UsageError when a schedule begins without signal, where a learned score is meaningless."""
    if not schedule.alpha(torch.tensor(schedule.end)) > 0:
        raise UsageError(
            "config model.schedule_options: there is no signal at `end`, where a learned score is meaningless: lower it"
        )


MODULE_FILE = "network.safetensors"


def save_module(module: nn.Module, folder: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a small network's weights to `folder`, with texts for the file's header."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous() for name, value in module.state_dict().items()}
    save_tensors(weights, folder / MODULE_FILE, metadata or {})


def load_module(module: nn.Module, folder: Path) -> None:
    """Read a small network's weights.

    Raises: UsageError when there are none in the folder, or when they are damaged or another network's.
    """
    if not (folder / MODULE_FILE).is_file():
        raise UsageError(f"{folder} holds no {MODULE_FILE}")
    state = load_tensors(folder / MODULE_FILE, "network")
    broken = [name for name, value in state.items() if not value.isfinite().all()]
    if broken:
        raise UsageError(f"{folder / MODULE_FILE} holds values that are not finite, in {broken[0]}")
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        difference = str(error).splitlines()[-1].strip()
        raise UsageError(
            f"{folder / MODULE_FILE} belongs to another network (other model options?): {difference}"
        ) from error
