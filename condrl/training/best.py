"""The best epoch so far, by prompts that are neither trained on nor reported."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Best:
    """The epoch that validation prompts rate highest, 0 being the base model."""

    epoch: int = 0
    value: float | None = None  # the rewards' weighted sum there; None before the first evaluation
    waited: int = 0  # evaluations since then
    weights: list[Tensor] = field(default_factory=list)  # what was trained, as it was then; empty: the base model's

    def take(self, epoch: int, value: float) -> bool:
        """Whether an epoch is the best so far; one that is rated NaN is neither that nor worse."""
        if math.isnan(value):
            return False
        if self.value is not None and value <= self.value:
            self.waited += 1
            return False
        self.epoch, self.value, self.waited = epoch, value, 0
        return True
