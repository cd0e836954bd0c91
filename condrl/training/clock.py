"""Seconds, counted once a GPU has done what it was asked to do."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def now() -> float:
    """The time in seconds, once a GPU has done what it was asked to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(work: Callable[[], Any]) -> float:
    """How long something takes, on a GPU to its end."""
    begun = now()
    work()
    return now() - begun


class Clock:
    """Seconds of each phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        """End a phase; what follows is another's."""
        end = now()
        self.seconds[name], self.last = end - self.last, end
