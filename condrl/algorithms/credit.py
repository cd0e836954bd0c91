"""Advantages: how much better an image was than its prompt's others."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Sequence

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, groups: Tensor, normalise: bool = True, leave_one_out: bool = False) -> Tensor:
    """Rewards (..., B) minus the mean of their group, over its standard deviation if `normalise` (Shao et al. 2024).

    `groups` (B,) are integer ids. With `leave_one_out` the mean is of the others (Ahmadian et al. 2024), without
    it the advantage shrinks by 1 - 1 / K. A group without spread gives zero.
    """
    centred, size, std = _by_group(rewards, groups)
    if leave_one_out:
        centred = centred * size / (size - 1).clamp(min=1)
    return centred / (std + 1e-4) if normalise else centred


def leave_one_out(rewards: Tensor, groups: Tensor) -> Tensor:
    """Rewards (..., B) minus the mean of the others in their group, in the rewards' unit (Ahmadian et al. 2024)."""
    return group_advantages(rewards, groups, normalise=False, leave_one_out=True)


def group_scale(rewards: Tensor, groups: Tensor) -> Tensor:
    """1 / the standard deviation of the rewards (..., B) in each image's group; 0 for a group without spread."""
    std = _by_group(rewards, groups)[2]
    return torch.zeros_like(std).where(std < 1e-6, 1 / (std + 1e-4))


def _by_group(rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards less their group's mean, the group's size and its standard deviation, each (..., B)."""
    _, index = groups.unique(return_inverse=True)
    index = index.expand_as(rewards)

    def total(values: Tensor) -> Tensor:
        return torch.zeros_like(rewards).scatter_add(-1, index, values).gather(-1, index)

    size = total(torch.ones_like(rewards))
    centred = rewards - total(rewards) / size
    return centred, size, (total(centred.square()) / size).sqrt()


class PromptTracker:
    """Advantages against the last rewards of the same prompt row (Black et al. 2024, section 5.2)."""

    def __init__(self, length: int = 32, least: int = 16) -> None:
        self.least = least
        self.history: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=length))

    def advantages(self, rewards: Tensor, groups: Sequence[int]) -> Tensor:
        """Standardise rewards (B,) by their prompt's history, or by the batch until `least` of it are known."""
        values = rewards.double().cpu()
        for row, value in zip(groups, values.tolist(), strict=True):
            self.history[row].append(value)
        batch = (values.mean(), values.std(correction=0))
        statistics = {row: self._statistics(row, batch) for row in set(groups)}
        mean = torch.stack([statistics[row][0] for row in groups])
        std = torch.stack([statistics[row][1] for row in groups])
        return ((values - mean) / (std + 1e-6)).to(rewards)

    def _statistics(self, row: int, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if len(self.history[row]) < self.least:
            return batch
        past = torch.tensor(self.history[row], dtype=torch.float64)
        return past.mean(), past.std(correction=0)

    def state_dict(self) -> dict[str, list[float]]:
        return {str(row): list(values) for row, values in self.history.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Raises: ValueError on values that are not finite."""
        if not all(math.isfinite(value) for values in state.values() for value in values):
            raise ValueError("a prompt's rewards are not finite")
        self.history.clear()
        for row, values in state.items():
            self.history[int(row)].extend(values)
