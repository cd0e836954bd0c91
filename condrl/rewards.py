"""A set of weighted rewards: they are called, checked and added up here, so that a reward is only a function."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from condrl.errors import RunError
from condrl.prompts import Row
from condrl.registry import reward as registry

MOST_KNOWN = 100_000  # scores that a reward remembers


@dataclass(frozen=True)
class Reward:
    """A reward with its options set, called as `reward(samples, rows)`."""

    name: str
    weight: float
    call: Callable[..., Any]
    differentiable: bool = True
    known: dict[bytes, float] | None = None  # scores by digest of image and row, of a reward that remembers them

    @functools.cached_property
    def takes_metadata(self) -> bool:
        """Whether it has a parameter `metadata` that is not an option."""
        parameter = inspect.signature(self.call).parameters.get("metadata")
        return parameter is not None and parameter.kind is not parameter.KEYWORD_ONLY

    def __call__(self, samples: Tensor, rows: Sequence[Row]) -> Tensor:
        """Scores (B,) float32 of samples (B, ...), row i of which was made for `rows[i]`; nan where one failed.

        Raises: RunError naming the reward and the prompt when a score is missing.
        """
        if self.known is None or (torch.is_grad_enabled() and samples.requires_grad):
            return self._scored(samples, rows)
        keys = [digest(sample, row) for sample, row in zip(samples, rows, strict=True)]
        new = {key: i for i, key in enumerate(keys) if key not in self.known}
        found = {key: self.known[key] for key in keys if key in self.known}
        if new:
            scores = self._scored(samples[list(new.values())], [rows[i] for i in new.values()])
            found |= zip(new, scores.tolist(), strict=True)
            self.known.update((key, value) for key, value in found.items() if math.isfinite(value))
            for oldest in list(self.known)[: max(0, len(self.known) - MOST_KNOWN)]:
                del self.known[oldest]
        return torch.tensor([found[key] for key in keys], device=samples.device)

    def _scored(self, samples: Tensor, rows: Sequence[Row]) -> Tensor:
        prompts = [row.prompt for row in rows]
        extra = {"metadata": [row.metadata for row in rows]} if self.takes_metadata else {}
        scores = self.call(samples, prompts, **extra)
        if not isinstance(scores, Tensor) or scores.shape != (len(rows),):
            got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
            raise RunError(
                f"the reward {self.name!r} returned {got} for {len(rows)} samples, the first of prompt {prompts[0]!r}: "
                f"it should return a tensor of shape ({len(rows)},)"
            )
        return scores.float().where(scores.isfinite(), torch.nan)

    def state_dict(self) -> dict[str, Any]:
        return getattr(self.call, "state_dict", dict)()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        getattr(self.call, "load_state_dict", lambda _: None)(state)

    def rest(self) -> None:
        """Tell a reward that it will not be called for a while."""
        getattr(self.call, "rest", lambda: None)()

    def failure(self, scores: Tensor, rows: Sequence[Row]) -> str | None:
        """What to say of the first failed score of (B,); None when there is none."""
        failed = (~scores.isfinite()).nonzero()
        if not len(failed):
            return None
        errors = getattr(self.call, "errors", None)
        reason = errors[-1] if errors else "it returned a score that is not finite"
        return f"the reward {self.name!r} failed for the prompt {rows[int(failed[0])].prompt!r}: {reason}"


def make_reward(name: str, options: Mapping[str, Any]) -> Reward:
    """A registered reward with the options of its config section; a class is constructed with them."""
    options, plugin = dict(options), registry.find(name)
    weight, target = options.pop("weight", 1.0), plugin.target
    call: Any = target(**options) if inspect.isclass(target) else functools.partial(target, **options)
    known = _known(json.dumps([name, options], sort_keys=True, default=str)) if plugin.cached else None
    return Reward(name, weight, call, plugin.differentiable, known)


@functools.cache
def _known(reward: str) -> dict[bytes, float]:
    """One for all that ask for the same reward with the same options."""
    return {}


def digest(sample: Tensor, row: Row) -> bytes:
    """The same for the same sample, prompt and metadata."""
    values = sample.detach().float().cpu().contiguous()
    made_for = json.dumps([row.prompt, row.metadata, list(values.shape)], sort_keys=True, default=str)
    return hashlib.sha256(values.numpy().tobytes() + made_for.encode()).digest()


@dataclass(frozen=True)
class Scores:
    """Scores of B samples by each reward, and their weighted sum `total` (B,); nan where a score failed."""

    each: dict[str, Tensor]
    total: Tensor
    failure: str | None = None  # what to say of the first that failed


def weighted(each: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The weighted sum (B,) of scores (B,) by reward."""
    return torch.stack([weights[name] * values for name, values in each.items()]).sum(0)


def score(rewards: Sequence[Reward], samples: Tensor, rows: Sequence[Row], batch: int = 64) -> Scores:
    """Score samples (B, ...) with every reward, `batch` at a time; in grad mode with gradients.

    Raises: RunError when images are not in [0, 1], or when a reward fails.
    """
    if samples.dim() == 4 and not (samples.min() >= 0 and samples.max() <= 1):
        low, high = samples.min().item(), samples.max().item()
        raise RunError(f"rewards take images in [0, 1], but the model decoded values from {low:.3f} to {high:.3f}")
    each: dict[str, Tensor] = {}
    failures = []
    for r in rewards:
        parts = []
        for start in range(0, len(rows), batch):
            some = rows[start : start + batch]
            parts.append(r(samples[start : start + batch], some).to(samples.device))
            failures.append(r.failure(parts[-1], some))
        each[r.name] = torch.cat(parts)
    total = weighted(each, {r.name: r.weight for r in rewards})
    return Scores(each, total, next((text for text in failures if text), None))
