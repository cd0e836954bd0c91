"""What losses are computed on: an epoch's images by steps, and the pairs of both that an update takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from condrl.diffusion.policy import Policy
from condrl.errors import RunError

Metrics = dict[str, Tensor]
RATIO_TOLERANCE = {"full": 1e-3, "half": 2e-2}  # by the precision of the frozen weights


def per_image(**options: Any) -> Any:
    """A field (B, ...) of `Examples`; of n pairs it is (n, ...)."""
    return _tagged(lambda values, images, k: values[images], options, axis=0)


def per_step(**options: Any) -> Any:
    """A field (K, B, ...) of `Examples`; of n pairs it is (n, ...)."""
    return _tagged(lambda values, images, k: values[k, images], options, axis=1, by_step=True)


def per_chain(**options: Any) -> Any:
    """A field (K, B, ...) of `Examples` that is never split by steps; of n pairs it is (K, n, ...)."""
    return _tagged(lambda values, images, k: values[:, images], options, axis=1)


def _tagged(
    take: Callable[[Tensor, Tensor, Tensor], Tensor], options: dict[str, Any], axis: int, by_step: bool = False
) -> Any:
    """A field with images along an axis, from which `take` takes those of pairs, by their steps if it is `by_step`."""
    return field(metadata={"take": take, "axis": axis, "by_step": by_step}, **options)


@dataclass(frozen=True, kw_only=True)
class Examples:
    """An epoch's B images by K steps; `at` gives some pairs of them, as the same class.

    A subclass is a frozen, keyword-only dataclass whose fields say with `per_image`, `per_step` or `per_chain` how
    pairs are taken from them; other fields are the same for all. A loss is averaged over images, summed over steps.
    """

    condition: Tensor = per_image()  # (B,) the prompts' numbers
    k: Tensor  # (n,) the steps that are trained; of pairs, the step of each
    metrics: Metrics = field(default_factory=dict)  # to log: numbers, or values (B,) whose mean is logged

    @property
    def count(self) -> int:
        """B; of pairs, their number."""
        return len(self.condition)

    def at(self, images: Tensor, k: Tensor) -> Self:
        """The pairs (images[i], k[i])."""
        parts = {f.name: (f.metadata.get("take"), getattr(self, f.name)) for f in fields(self)}
        taken = {
            name: take(value, images.to(value.device), k.to(value.device))
            for name, (take, value) in parts.items()
            if take is not None and value is not None
        }
        return replace(self, k=k, **taken)

    def every_pair(self) -> Tensor:
        """All (image, step) pairs, (B * n, 2), ordered by step as a roll-out is."""
        return torch.cartesian_prod(self.k, torch.arange(self.count)).flip(1)


def parts_of(pairs: Tensor, batch: int) -> list[Tensor]:
    """Pairs (N, 2) in parts of `batch`, where there are as many: the last one begins among those of the one before."""
    starts = range(0, len(pairs), batch)
    return [pairs[max(0, min(start, len(pairs) - batch)) :][:batch] for start in starts]


@dataclass(frozen=True, kw_only=True)
class RatioExamples(Examples, ABC):
    """Examples whose loss weighs likelihood ratios, so that their log-probabilities have to be the policy's own."""

    old_log_prob: Tensor = per_step()  # nats, of the policy that rolled out

    @abstractmethod
    def log_prob(self, policy: Policy) -> Tensor:
        """What `old_log_prob` of pairs (B,) is under this policy."""


def recomputed(examples: RatioExamples, policy: Policy, batch: int) -> RatioExamples:
    """The examples with their log-probabilities recomputed, `batch` pairs at a time as an update does.

    In half precision the result of a network depends on the size of its batch by far more than a ratio may be off, and
    that of a compiled one on whether it has gradients.
    """
    log_probs = torch.full_like(examples.old_log_prob, torch.nan)
    for part in parts_of(examples.every_pair(), batch):
        images, k = part.to(log_probs.device).unbind(1)
        with torch.set_grad_enabled(is_compiled(policy)):
            log_probs[k, images] = examples.at(*part.unbind(1)).log_prob(policy).detach()
    return replace(examples, old_log_prob=log_probs)


def check_ratios(examples: RatioExamples, policy: Policy, batch: int, most: int | None = None) -> None:
    """Compare the update's own log-probabilities, of at most `most` pairs, with those that it takes for the roll-out's.

    `batch` pairs are taken at a time, as an update does.

    Raises: RunError unless every likelihood ratio is 1.
    """
    pairs = examples.every_pair()
    pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))][:most]
    off = []
    for part in parts_of(pairs, batch):
        some = examples.at(*part.unbind(1))
        log_prob = some.log_prob(policy).detach()  # with gradients, as the update does; one graph at a time
        off.append((log_prob - some.old_log_prob).exp().sub(1).abs().max())
    worst = torch.stack(off).max().item()  # nan, if one is
    allowed = RATIO_TOLERANCE["half" if has_half_precision(policy) else "full"]
    if not worst <= allowed:
        raise RunError(
            f"before the first update every likelihood ratio should be 1, but one is off by {worst:.2g} "
            f"(allowed: {allowed:g}): the loss does not see the policy that was rolled out. Dropout, or kernels "
            "whose result depends on the batch, can cause this; model.dtype=float32 reduces it, and in float32 "
            "train.loss_batch=train.rollout_batch; run.check_ratios=false continues regardless."
        )


def is_compiled(policy: Policy) -> bool:
    """Whether the network is compiled."""
    return bool(getattr(policy.model, "compile", False))


def has_half_precision(policy: Policy) -> bool:
    """Whether the frozen weights have half precision."""
    return any(p.dtype.itemsize == 2 for p in policy.model.module.parameters())
