"""Points known by samples alone: a small network that says their score, trained from nothing or from a file."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import condrl
from condrl.checkpoint import load_module, save_module
from condrl.datasets import make_dataset
from condrl.errors import UsageError
from condrl.registry import suggestion
from condrl.schedule import make_schedule
from condrl.values import tanh_relu


@condrl.model
class Empirical:
    """Points (B, d) with a data set for each prompt, and the network of Gao et al. 2024 (Table 1) as their score."""

    def __init__(
        self,
        device: torch.device,
        *,
        data: dict[str, Any],  # prompt -> name (swiss_roll, mixture) and its options
        points: int = 20_000,  # of each prompt's data set
        schedule: Literal["vp", "ou", "rectified_flow"] = "ou",  # the forward process
        schedule_options: dict[str, float] | None = None,  # its parameters: b0, b1, rate, noise, end, final_time
        width: int = 64,  # units in the hidden layers
        weights: str | None = None,  # folder of a saved network to start from; null: from nothing
        seed: int = 0,  # of the first weights and of the data
    ) -> None:
        self.device, self.prompts = device, list(data)
        self.schedule = make_schedule(schedule, schedule_options or {})
        generator = torch.Generator().manual_seed(seed)
        sets = [make_dataset(prompt, options, points, generator) for prompt, options in data.items()]
        if len({one.shape[1] for one in sets}) > 1:
            raise UsageError("config model.data: the data sets of all prompts need as many dimensions")
        self.data = torch.stack(sets).to(device)  # (C, n, d)
        self.state_shape = (self.data.shape[2],)
        self.evaluations = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.module: nn.Module = ScoreNetwork(len(data), self.data.shape[2], width)
        self.module.to(device)
        if weights:
            self.load_adapter(Path(weights))
        self._pretrained = copy.deepcopy(self.module).requires_grad_(False)
        self._current = True

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Rows (B,) of the prompts' data sets.

        Raises: UsageError on a prompt without data.
        """
        for prompt in prompts:
            if prompt not in self.prompts:
                raise UsageError(f"config model.data: no data for {prompt!r}.{suggestion(prompt, self.prompts)}")
        return torch.tensor([self.prompts.index(prompt) for prompt in prompts])

    def finish_encoding(self) -> None:
        """Nothing is held for encoding."""

    def score(self, x: Tensor, t: Tensor, condition: Tensor, module: nn.Module | None = None) -> Tensor:
        """(B, d) at x (B, d) and times t (B,)."""
        self.evaluations += len(x)
        network = (module or self.module) if self._current else self._pretrained
        score: Tensor = network(x, t.to(x), condition)
        return score

    def features(self, condition: Tensor) -> Tensor:
        """One-hot prompts (B, C)."""
        return nn.functional.one_hot(condition, len(self.prompts)).float().to(self.device)

    def decode(self, x: Tensor) -> Tensor:
        return x

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within it, the score is the network's that tuning started from."""
        self._current = False
        try:
            yield
        finally:
            self._current = True

    def merged(self) -> AbstractContextManager[None]:
        return nullcontext()

    def save_adapter(self, folder: Path) -> None:
        """Write the network's weights."""
        save_module(self.module, folder)

    def load_adapter(self, folder: Path) -> None:
        """Read the network's weights.

        Raises: UsageError when there are none in the folder.
        """
        load_module(self.module, folder)


class ScoreNetwork(nn.Module):
    """The score from (t, x), and from the prompt where there are several (Gao et al. 2024, Table 1)."""

    def __init__(self, prompts: int, dimensions: int, width: int) -> None:
        super().__init__()
        self.prompts = prompts if prompts > 1 else 0
        self.layers = tanh_relu(1 + dimensions + self.prompts, width, dimensions)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        told = [t[:, None], x]
        if self.prompts:
            told.append(nn.functional.one_hot(condition, self.prompts).to(x))
        score: Tensor = self.layers(torch.cat(told, 1))
        return score
