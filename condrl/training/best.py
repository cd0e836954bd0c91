"""The best epoch so far, by prompts that are neither trained on nor reported."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Best:
    """The epoch that validation prompts rate highest, 0 being the base model."""

    epoch: int = 0
    value: float | None = None  # the rewards' weighted sum there; None before the first evaluation
    waited: int = 0  # evaluations since then

    def take(self, epoch: int, value: float) -> bool:
        """Whether an epoch is the best so far."""
        if self.value is not None and not value > self.value:
            self.waited += 1
            return False
        self.epoch, self.value, self.waited = epoch, value, 0
        return True
