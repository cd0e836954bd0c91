"""A set of weighted rewards: they are called, checked and summed here, so that a reward is just a function."""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from condrl.diffusion.schedule import like
from condrl.errors import LESS, RewardError, RunError, UsageError, brief, gpu_failed, out_of_memory, quoted
from condrl.prompts import Row
from condrl.registry import reward as registry

MOST_CACHED = 100_000  # scores that a reward keeps


class MissingKey(KeyError):
    """A prompt row has no such metadata."""

    def __init__(self, key: object, row: Row) -> None:
        super().__init__(key)
        self.row = row

    def __str__(self) -> str:
        known = ", ".join(map(repr, self.row.metadata)) or "none"
        return (
            f"{self.args[0]!r} in each prompt's metadata, and row {self.row.index + 1} of its prompts, "
            f"{self.row.prompt!r}, has {known}"
        )


class Metadata(dict[str, Any]):
    """A copy of a prompt row's metadata, which knows whose it is when a key is missing."""

    def __init__(self, row: Row) -> None:
        super().__init__(copy.deepcopy(row.metadata))
        self.row = row

    def __missing__(self, key: object) -> Any:
        raise MissingKey(key, self.row)


class RewardObject(Protocol):
    """What a reward that is a class may have; all but `__call__` can be left out."""

    def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) of samples (B, ...), as of a reward that is a function."""
        ...

    def load(self) -> None:
        """Open the files that it needs, so that errors in them show at the start."""
        ...

    def offload(self) -> None:
        """Make room on the device until it is called again."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What its next scores depend on, as tensors, numbers and text by name."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there."""
        ...


@dataclass(frozen=True)
class Reward:
    """A reward with its options set, called as `reward(samples, rows)`."""

    name: str
    weight: float
    call: Callable[..., Any]
    differentiable: bool = True
    cache: dict[bytes, float] | None = None  # scores by digest of image and row, of a reward that keeps them
    batch: int = 64  # images scored at a time
    per_group: bool = False  # whether it is given all images of a prompt row, and only them, instead
    smoothing: float = 0.0  # the root mean square distance within which the worst sample is scored
    section: str = "rewards"  # of the config, that names it

    @functools.cached_property
    def takes_metadata(self) -> bool:
        """Whether it has a parameter `metadata` that is not an option."""
        parameter = inspect.signature(self.call).parameters.get("metadata")
        return parameter is not None and parameter.kind is not parameter.KEYWORD_ONLY

    def __call__(self, samples: Tensor, rows: Sequence[Row]) -> Tensor:
        """Scores (B,) float32 of samples (B, ...), row i of which was made for `rows[i]`; nan where one failed.

        Raises: RewardError naming the reward and the prompt when the reward raises, or a score is missing.
        """
        if self.cache is None or (torch.is_grad_enabled() and samples.requires_grad):
            return self._scored(samples, rows)
        keys = [digest(sample, row) for sample, row in zip(samples, rows, strict=True)]
        new = {key: i for i, key in enumerate(keys) if key not in self.cache}
        found = {key: self.cache[key] for key in keys if key in self.cache}
        if new:
            scores = self._scored(samples[list(new.values())], [rows[i] for i in new.values()])
            found |= zip(new, scores.tolist(), strict=True)
            self.cache.update((key, value) for key, value in found.items() if math.isfinite(value))
            for oldest in list(self.cache)[: max(0, len(self.cache) - MOST_CACHED)]:
                del self.cache[oldest]
        return torch.tensor([found[key] for key in keys], device=samples.device)

    def parts(self, rows: Sequence[Row]) -> list[slice]:
        """The slices of the samples that it is given together."""
        if not self.per_group:
            return [slice(start, start + self.batch) for start in range(0, len(rows), self.batch)]
        ends = [i for i in range(1, len(rows)) if rows[i].index != rows[i - 1].index]
        return [slice(start, end) for start, end in itertools.pairwise([0, *ends, len(rows)])]

    def worst(self, samples: Tensor, rows: Sequence[Row]) -> Tensor:
        """The samples (B, ...) moved by `smoothing` against their scores' gradient: the worst nearby, to first order.

        The way there is held, so a gradient of their scores is that at the worst samples (docs/theory.md 14).
        """
        with torch.enable_grad(), self.blamed(rows):
            x = samples.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self._called(x, rows).sum(), x)
        size = gradient.square().flatten(1).mean(1).sqrt().clamp(min=torch.finfo(gradient.dtype).tiny)
        moved = samples.detach() - like(self.smoothing / size, gradient) * gradient
        moved = moved.clamp(0, 1) if samples.dim() == 4 else moved
        return samples + (moved - samples.detach())

    def _scored(self, samples: Tensor, rows: Sequence[Row]) -> Tensor:
        return self._called(self.worst(samples, rows) if self.smoothing else samples, rows)

    def _called(self, samples: Tensor, rows: Sequence[Row]) -> Tensor:
        prompts = [row.prompt for row in rows]
        extra = {"metadata": [Metadata(row) for row in rows]} if self.takes_metadata else {}
        with self.blamed(rows):
            scores = self.call(samples.clone(), prompts, **extra)  # a copy: it may work in place
        if not isinstance(scores, Tensor) or scores.shape != (len(rows),):
            got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
            raise RewardError(
                f"the reward {self.name!r} returned {got} for {len(rows)} samples, the first of prompt {prompts[0]!r}: "
                f"it should return a tensor of shape ({len(rows)},)"
            )
        return scores.float().where(scores.isfinite(), torch.nan)

    @contextmanager
    def blamed(self, rows: Sequence[Row] = ()) -> Iterator[None]:
        """Within it, whatever a reward raises becomes one line that names it and the first prompt.

        Raises: RewardError; UsageError when the reward raised one itself.
        """
        try:
            yield
        except UsageError as error:  # shared code cannot know which reward it works for
            text = str(error).replace("rewards.*", f"rewards.{self.name}")
            raise UsageError(
                self._named(text.replace(f"rewards.{self.name}.", f"{self.section}.{self.name}."))
            ) from error
        except RunError as error:
            raise RewardError(self._named(str(error))) from error
        except MissingKey as error:
            raise RewardError(f"the reward {self.name!r} needs {error}") from error
        except (Exception, SystemExit) as error:  # user code
            if gpu_failed(error):  # perhaps in what was asked of it before
                raise
            if out_of_memory(error):
                raise RunError(f"the reward {self.name!r} ran out of memory: {LESS} ({brief(error)})") from error
            where = f" for the prompt {quoted(rows[0].prompt)}" if rows else ""
            cause = None if isinstance(error, StopIteration) else error  # which contextlib would let through
            raise RewardError(f"the reward {self.name!r} failed{where}: {brief(error)}") from cause

    def _named(self, text: str) -> str:
        return text if self.name in text else f"the reward {self.name!r}: {text}"

    def load(self) -> None:
        """Let it open its files now.

        Raises: UsageError when one cannot be used.
        """
        with usage_errors(), self.blamed():
            getattr(self.call, "load", lambda: None)()

    def state_dict(self) -> dict[str, Any]:
        """What its next scores depend on; empty for a reward without a state."""
        with self.blamed():
            return dict(getattr(self.call, "state_dict", dict)())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `state_dict` returned; a reward without one is left alone."""
        if hasattr(self.call, "load_state_dict"):
            with self.blamed():
                self.call.load_state_dict(dict(state))

    def offload(self) -> None:
        """Tell a reward that it will not be called for a while."""
        with self.blamed():
            getattr(self.call, "offload", lambda: None)()

    def failure(self, scores: Tensor, rows: Sequence[Row]) -> str | None:
        """A message on the first failed score of (B,); None when there is none."""
        failed = (~scores.isfinite()).nonzero()
        if not len(failed):
            return None
        errors = getattr(self.call, "errors", None)
        reason = errors[-1] if errors else "it returned a score that is not finite"
        return f"the reward {self.name!r} failed for the prompt {quoted(rows[int(failed[0])].prompt)}: {reason}"


@contextmanager
def usage_errors() -> Iterator[None]:
    """Within it, before a run has begun, a reward's failure is bad input.

    Raises: UsageError.
    """
    try:
        yield
    except RewardError as error:
        raise UsageError(str(error)) from error


def make_reward(name: str, options: Mapping[str, Any], section: str = "rewards") -> Reward:
    """A registered reward with the options of its config section; a class is constructed with them.

    Raises: UsageError when that fails.
    """
    options, plugin = dict(options), registry.find(name)
    weight, batch, target = options.pop("weight", 1.0), options.pop("batch", 64), plugin.target
    smoothing = options.pop("smoothing", 0.0)
    with usage_errors(), Reward(name, weight, target, section=section).blamed():
        call: Any = target(**options) if inspect.isclass(target) else functools.partial(target, **options)
    asked = json.dumps([name, options, smoothing], sort_keys=True, default=str)
    cache = _cache_of(target, asked) if plugin.cached else None
    return Reward(name, weight, call, plugin.differentiable, cache, batch, plugin.per == "group", smoothing, section)


@functools.cache
def _cache_of(target: Callable[..., Any], reward: str) -> dict[bytes, float]:
    """One cache for all that ask for the same reward with the same options; one that is defined anew has another."""
    return {}


def digest(sample: Tensor, row: Row) -> bytes:
    """A digest that is the same for the same sample, prompt and metadata."""
    values = sample.detach().float().cpu().contiguous()
    made_for = json.dumps([row.prompt, row.metadata, list(values.shape)], sort_keys=True, default=str)
    return hashlib.sha256(values.numpy().tobytes() + made_for.encode()).digest()


@dataclass(frozen=True)
class Scores:
    """Scores of B samples by each reward, and their weighted sum `total` (B,); nan where a score failed."""

    each: dict[str, Tensor]
    total: Tensor
    failure: str | None = None  # a message on the first that failed


def first_failure(failures: Sequence[str | None]) -> str:
    """The first message; where no reward failed it is their sum that did."""
    return next(filter(None, failures), "the weighted sum of the rewards is not finite: lower their weights")


def weighted(each: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The weighted sum (B,) of scores (B,) by reward."""
    return torch.stack([weights[name] * values for name, values in each.items()]).sum(0)


def score(rewards: Sequence[Reward], samples: Tensor, rows: Sequence[Row]) -> Scores:
    """Score samples (B, ...) with every reward, in parts; in grad mode with gradients. A row's samples are adjacent.

    Raises: RunError when images are not in [0, 1], or when a reward fails.
    """
    if not samples.isfinite().all():
        raise RunError(
            "the samples are not finite: the policy or its sampler has gone wrong; try a lower train.lr, or a lower "
            "strength of the LoRA"
        )
    if samples.dim() == 4 and not (samples.min() >= 0 and samples.max() <= 1):
        low, high = samples.min().item(), samples.max().item()
        raise RunError(f"rewards take images in [0, 1], but the model decoded values from {low:.3f} to {high:.3f}")
    each: dict[str, Tensor] = {}
    failures = []
    for r in rewards:
        parts = []
        for part in r.parts(rows):
            parts.append(r(samples[part], rows[part]).to(samples.device))
            failures.append(r.failure(parts[-1], rows[part]))
        each[r.name] = torch.cat(parts)
    total = weighted(each, {r.name: r.weight for r in rewards})
    return Scores(each, total, next((text for text in failures if text), None))
