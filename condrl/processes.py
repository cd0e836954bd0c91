"""The processes of a run: each has a share of every epoch's images, and all have the same weights."""

from __future__ import annotations

import gc
import math
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from condrl.errors import SIGNALS, RunError, Stopped, UsageError

T = TypeVar("T")


def asks_for_shards(accelerator: Any) -> bool:
    """Whether accelerate was told to use FSDP, for several processes."""
    return accelerator.num_processes > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


class Processes:
    """The processes that accelerate started: one, or several that synchronize now and then to sum what each has.

    Whenever they synchronize they also learn whether one of them failed or was asked to stop, and then all stop.
    Gradients are summed here and not by DistributedDataParallel: once per update, over the trained weights alone,
    including an algorithm's own networks, however many passes a process made. Only with `sharded` frozen weights must
    all make the same number of passes.
    """

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.rank: int = accelerator.process_index
        self.count: int = accelerator.num_processes
        self.sharded = asks_for_shards(accelerator)
        self.asked = 0  # the signal that asked this process to stop
        self.is_interruptible = False  # whether the run may stop wherever it is
        self.failed = False

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    def local_indices(self, items: int) -> range:
        """This process's share of `items` items."""
        return range(self.rank * items // self.count, (self.rank + 1) * items // self.count)

    def padding(self, items: int) -> int:
        """How many items this process has to add so that all have the same number, which sharding requires."""
        return -(-items // self.count) - len(self.local_indices(items)) if self.sharded else 0

    # ------------------------------------------------------------------------------------------ synchronizing

    def barrier(self, failure: Exception | None = None) -> None:
        """Wait for the others.

        Raises: RunError when one of them failed, UsageError if that was its error; Stopped when one was asked to stop
        and `interruptible` allows it.
        """
        if self.count == 1:
            return
        asked = [float(self.is_interruptible and self.asked == number) for number in SIGNALS]
        failed, *asking = self._add(torch.tensor([float(failure is not None), *asked])).tolist()
        if failed:
            self.failed = True
            own = None if failure is None else (isinstance(failure, UsageError), f"{type(failure).__name__}: {failure}")
            rank, (usage, reason) = next((i, r) for i, r in enumerate(self._objects(own)) if r is not None)
            raise failure or (UsageError if usage else RunError)(f"process {rank} failed: {reason}")
        for number, count in zip(SIGNALS, asking, strict=True):
            if count:
                raise Stopped(number)

    def synchronized(self, work: Callable[[], T]) -> T:
        """Do the work; when it fails in one process, all stop with that error.

        With sharded weights the others may be waiting inside the network: then this one leaves, and the launcher ends
        them.
        """
        try:
            done = work()
        except Exception as error:
            if self.sharded:
                if not self.is_main:  # the first one's errors are printed where they are caught
                    print(f"process {self.rank} failed: {type(error).__name__}: {error}", file=sys.stderr)
            elif not self.failed:
                self.barrier(error)
            raise
        self.barrier()
        return done

    def end(self) -> None:
        """Finish the trackers and leave the others.

        What still holds the group is collected before and after: left to the end of Python, gloo aborts now and then.
        Of a process alone it is what the run leaves in memory.
        """
        if self.count > 1:
            gc.collect()
        self.accelerator.end_training()
        gc.collect()

    def stop(self, number: int) -> None:
        """Record that this process was asked to stop; if it is the only one and interruptible, it stops at once.

        Raises: Stopped.
        """
        self.asked = number
        if self.is_interruptible and self.count == 1:
            raise Stopped(number)

    @contextmanager
    def interruptible(self, is_interruptible: bool) -> Iterator[None]:
        """Within it, a run that is asked to stop does so wherever it is."""
        self.is_interruptible = is_interruptible
        try:
            if is_interruptible and self.asked and self.count == 1:
                raise Stopped(self.asked)
            yield
        finally:
            self.is_interruptible = False

    def broadcast(self, *facts: bool) -> tuple[int, tuple[bool, ...]]:
        """The signal that asked any of them to stop, or 0; and the first process's values of `facts`."""
        if self.count == 1:
            return self.asked, facts
        asked = [float(self.asked == number) for number in SIGNALS]
        found = self.sum(torch.tensor([*asked, *(float(fact and self.is_main) for fact in facts)])).tolist()
        stopping = next((number for number, count in zip(SIGNALS, found, strict=False) if count), 0)
        return stopping, tuple(bool(value) for value in found[len(SIGNALS) :])

    # ------------------------------------------------------------------------------------------ adding up

    def sum(self, x: Tensor) -> Tensor:
        """The sum over processes of tensors of one shape."""
        if self.count == 1:
            return x
        self.barrier()
        return self._add(x)

    def gather(self, x: Tensor, indices: range, count: int) -> Tensor:
        """(..., count): every process's (..., n) at its indices."""
        if self.count == 1:
            return x
        whole = x.new_zeros((*x.shape[:-1], count))
        whole[..., indices.start : indices.stop] = x
        return self.sum(whole)

    def gather_objects(self, value: Any) -> list[Any]:
        """Every process's value."""
        if self.count == 1:
            return [value]
        self.barrier()
        return self._objects(value)

    def add_up(self, values: Mapping[str, float]) -> dict[str, float]:
        """The sums by name over the processes that have it."""
        total: dict[str, float] = defaultdict(float)
        for own in self.gather_objects(dict(values)):
            for name, value in own.items():
                total[name] += value
        return dict(total)

    def average(self, values: Mapping[str, float], weight: float) -> dict[str, float]:
        """The weighted means by name over the processes where the value is finite."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        summed = self.add_up({name: weight * value for name, value in finite.items()})
        weights = self.add_up(dict.fromkeys(finite, weight))
        return {name: summed[name] / weights[name] for name in summed if weights[name]}

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace each parameter's gradient by its sum over processes."""
        if self.count == 1:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        total = self.sum(torch.cat([g.flatten() for g in gradients]))
        for parameter, part in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)

    def check_same(self, parameters: Sequence[Tensor]) -> None:
        """Raises: RunError when the processes' parameters differ."""
        if self.count == 1:
            return
        digests = self.gather_objects([p.detach().double().abs().sum().item() for p in parameters])
        if any(digest != digests[0] for digest in digests):
            raise RunError("the processes' weights differ: something draws or trains in one of them alone")

    def _add(self, x: Tensor) -> Tensor:
        total: Tensor = self.accelerator.reduce(x.to(self.accelerator.device), "sum")
        return total.to(x.device)

    def _objects(self, value: Any) -> list[Any]:
        from accelerate.utils import gather_object

        found: list[Any] = gather_object([value])
        return found
