"""condrl: fine-tune text-conditioned diffusion models with rewards; the score is the action."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from condrl.errors import RunError, UsageError
from condrl.registry import algorithm, model, reward, sampler, steering

if TYPE_CHECKING:
    from PIL.Image import Image

__version__ = "0.1.0"
__all__ = [
    "RunError",
    "UsageError",
    "algorithm",
    "evaluate",
    "finetune",
    "model",
    "reward",
    "sample",
    "sampler",
    "steering",
]


def finetune(*arguments: str | PathLike[str]) -> dict[str, Any]:
    """Run `condrl finetune` with these arguments; returns the content of result.json, empty after a dry run.

    Raises: UsageError on bad input, RunError when the run has to stop.
    """
    from condrl.commands.finetune import finetune

    return finetune(_words(arguments))


def sample(
    *arguments: str | PathLike[str],
    prompts: str | Sequence[str],
    seeds: Iterable[int] = (0,),
    strength: float = 1.0,
    steer: str | None = None,
    batch: int = 16,
    device: str | None = None,
) -> list[Image]:
    """Draw each prompt from each seed as `condrl sample` does with these arguments; nothing is written.

    Raises: UsageError on bad input.
    """
    from condrl.commands.sample import drawn

    numbers = _each("seeds", seeds, operator.index)
    return drawn(_words(arguments), _each("prompts", prompts, str), numbers, strength, steer, batch, device)


def evaluate(
    *arguments: str | PathLike[str],
    prompts: str | PathLike[str] | None = None,
    samplers: str | Sequence[str] = (),
    steps: int | Iterable[int] = (),
    strengths: float | Iterable[float] = (1.0,),
    steer: str | None = None,
    pictures: int = 8,
    out: str | PathLike[str] | None = None,
    overwrite: bool = False,
    trust: bool = False,
    batch: int | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Run `condrl evaluate` with these arguments and options; returns the content of evaluation.json.

    Raises: UsageError on bad input, RunError when a measure fails.
    """
    from condrl.commands.evaluate import evaluated

    lists = {"samplers": _each("samplers", samplers, str), "steps": _each("steps", steps, operator.index)}
    lists["strength"] = _each("strengths", strengths, float)
    where = {"out": out, "overwrite": overwrite, "trust": trust, "device": device}
    rows = os.fspath(prompts) if prompts is not None else None
    return evaluated(_words(arguments), prompts=rows, steer=steer, pictures=pictures, batch=batch, **lists, **where)


def _words(arguments: Iterable[str | PathLike[str]]) -> list[str]:
    """Arguments as a command has them.

    Raises: UsageError when one is neither text nor a path.
    """
    arguments = list(arguments)
    if wrong := [argument for argument in arguments if not isinstance(argument, str | PathLike)]:
        raise UsageError(f"expected text or paths, such as 'train.lr=1e-4', got {wrong[0]!r}")
    return [os.fspath(argument) for argument in arguments]


def _each(name: str, given: Any, kind: Callable[[Any], Any]) -> list[Any]:
    """One value or several, as a list of that kind.

    Raises: UsageError when they are something else.
    """
    several = [given] if isinstance(given, str) or not isinstance(given, Iterable) else given
    try:
        return [kind(value) for value in several]
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name}: {error}, got {given!r}") from error
