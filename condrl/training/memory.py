"""The memory that a run will need, measured on a few images and carried over to its batches."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from condrl.models.quantised import held_bytes
from condrl.training.clock import Clock
from condrl.training.host import peak_memory_gb
from condrl.training.optimizer import MOMENT_BYTES
from condrl.training.trainer import Trainer


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made within it and still alive, also in backward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}  # of each storage
        self.now = self.peak = 0

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for given in storages((args, kwargs)):  # of which a result may be a view
            self.keep(given, 0)
        returned = call(*args, **(kwargs or {}))
        for made in storages(returned):
            self.keep(made, made.nbytes())
        return returned

    def keep(self, storage: torch.UntypedStorage, size: int) -> None:
        if storage._cdata in self.sizes:
            return
        self.sizes[storage._cdata] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.release, storage._cdata)

    def release(self, storage: int) -> None:
        self.now -= self.sizes.pop(storage)


def storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    """Of the tensors in nested lists and dicts, other than sharded ones."""
    for leaf in tree_iter(tree):
        if isinstance(leaf, Tensor) and not isinstance(leaf, DTensor):
            yield leaf.untyped_storage()


class PeakClock(Clock):
    """Keeps the peak of each phase's bytes beside its seconds."""

    def __init__(self, live: LiveBytes) -> None:
        super().__init__()
        self.live = live
        self.peaks: dict[str, int] = {}

    def lap(self, name: str) -> None:
        super().lap(name)
        self.peaks[name], self.live.peak = self.live.peak, self.live.now


@dataclass(frozen=True)
class Growth:
    """The most bytes that a phase holds by the size of its batch: fixed + each * size."""

    fixed: float
    each: float

    @classmethod
    def through(cls, peaks: Mapping[int, int]) -> Growth:
        """The line through what was measured at two sizes, or through 0 and what was measured at one."""
        (small, low), (large, high) = min(peaks.items()), max(peaks.items())
        each = (high - low) / (large - small) if large > small else high / large
        return cls(max(0.0, low - each * small), each)

    def gb(self, size: int) -> float:
        return (self.fixed + self.each * size) / 1e9


@dataclass(frozen=True)
class Needs:
    """What the phases of an epoch hold at once."""

    rollout: Growth  # by images
    decode: Growth
    score: Growth
    examples: Growth  # by images, as many at a time as pairs
    learn: Growth  # by pairs of image and step
    steps: int  # trained of an image


def memory(trainer: Trainer, needs: Needs) -> str:
    """The memory that training will need in a process, and what is free."""
    parameters = list(trainer.policy.model.module.parameters())
    weights = sum(held_bytes(here(p)) for p in parameters) / 1e9
    moments = MOMENT_BYTES[trainer.config.train.optimizer] / 4
    trained = (1 + moments) * sum(p.nbytes for p in trainer.learner.parameters) / 1e9  # with their gradients
    stored = trajectories_gb(trainer)
    if any(here(p) is not p for p in parameters):  # gathered weights come and go, and are not counted
        return (
            f"memory in a process: sharded weights {weights:.3f} GB, optimiser {trained:.2f}, trajectories "
            f"{stored:.2f}; the passes through the network are not estimated"
        )
    device = trainer.policy.model.device
    taken, (phase, most) = taken_gb(device), largest(trainer, needs)
    needed = max(taken + trained + stored + most, peak_memory_gb(device))
    parts = in_parts(trainer.policy.model, weights, taken)
    text = (
        f"memory: about {needed:.2f} GB at its peak: {taken:.2f} now ({parts}), optimiser {trained:.2f}, "
        f"trajectories {stored:.2f}, {phase} {most:.2f}"
    )
    free = free_gb(device)
    if free is None:
        return text
    lower = "lower train.loss_batch, or model.gradient_checkpointing=true"
    if "roll-out" in phase:
        lower = "algorithm.keep_graph=false" if trainer.algorithm.keep_graph else "lower train.rollout_batch"
    short = f"; warning: that may not be enough: {lower}"
    return f"{text}; {free:.1f} GB are free{short if needed - taken > free else ''}"


def in_parts(model: Any, weights: float, taken: float) -> str:
    """What is taken now: the network's weights, those beside it in the pipeline, and the rest."""
    pipe = getattr(model, "pipe", None)
    parts = getattr(pipe, "components", vars(pipe) if pipe else {}).values()
    others = [part for part in parts if isinstance(part, nn.Module) and part is not model.module]
    found = [p for part in others for p in part.parameters()]
    beside = sum(p.nbytes for p in found if p.device.type == model.device.type) / 1e9
    named = f", the VAE's and text encoders' {beside:.2f}" if pipe else ""
    rest = "Python, its libraries and the rewards" if model.device.type == "cpu" else "the rewards"
    return f"the network's weights {weights:.2f}{named}, {rest} {taken - weights - beside:.2f}"


def own_images(trainer: Trainer) -> int:
    """This process's images of an epoch."""
    train = trainer.config.train
    return len(trainer.processes.local_indices(train.prompts_per_epoch)) * train.images_per_prompt


def trajectories_gb(trainer: Trainer) -> float:
    policy = trainer.policy
    return 4e-9 * own_images(trainer) * (policy.steps + 1) * torch.Size(policy.model.state_shape).numel()


def largest(trainer: Trainer, needs: Needs) -> tuple[str, float]:
    """The phase of an epoch that holds most, and its GB."""
    train, images = trainer.config.train, own_images(trainer)
    at_once = images if trainer.algorithm.keep_graph else min(images, train.rollout_batch)
    decoded = min(images, getattr(trainer.policy.model, "decode_batch", images))
    scored = min(images, max((reward.batch for reward in trainer.rewards), default=0))
    prepared = min(images, train.loss_batch)
    pairs = trainer.config.pairs_at_once(needs.steps, trainer.processes.count)
    phases = {
        f"roll-out of {at_once} images": needs.rollout.gb(at_once),
        f"decoding {decoded} images": needs.decode.gb(decoded),
        f"scoring {scored} images": needs.score.gb(scored),
        f"examples of {prepared} images": needs.examples.gb(prepared),
        f"backward pass of {pairs} pairs": needs.learn.gb(pairs),
    }
    return max(phases.items(), key=lambda phase: phase[1])


def here(parameter: Tensor) -> Tensor:
    """A parameter, or this process's part of a sharded one."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def taken_gb(device: torch.device) -> float:
    """What is allocated on a GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 1e9
    import psutil  # which accelerate needs

    return float(psutil.Process().memory_info().rss) / 1e9


def free_gb(device: torch.device) -> float | None:
    """Free memory of a device, or of the machine for a CPU, within its limit; None where it is not known."""
    if device.type == "cuda":  # what torch has in reserve is free for it
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + reserve) / 1e9
    if device.type == "cpu" and sys.platform == "linux":
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
        free = next(float(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("MemAvailable"))
        import resource  # not on Windows

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]  # ulimit -v
        taken = int(Path("/proc/self/statm").read_text("utf-8").split()[0]) * resource.getpagesize()
        return free if limit == resource.RLIM_INFINITY else min(free, (limit - taken) / 1e9)
    return None
