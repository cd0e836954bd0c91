"""condrl: fine-tune text-conditioned diffusion models with rewards; the score is the action."""

from __future__ import annotations

from collections.abc import Sequence
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


def finetune(*arguments: str) -> dict[str, Any]:
    """Run `condrl finetune` with these arguments; returns the content of result.json, empty after a dry run.

    Raises: UsageError on bad input, RunError when the run has to stop.
    """
    from condrl.commands.finetune import finetune

    return finetune(list(arguments))


def sample(
    *arguments: str,
    prompts: Sequence[str],
    seeds: Sequence[int] = (0,),
    strength: float = 1.0,
    steer: str | None = None,
    batch: int = 16,
    device: str | None = None,
) -> list[Image]:
    """Draw each prompt from each seed as `condrl sample` does with these arguments; nothing is written.

    Raises: UsageError on bad input.
    """
    from condrl.commands.sample import drawn

    return drawn(arguments, prompts, seeds, strength, steer, batch, device)


def evaluate(
    *arguments: str,
    prompts: str | None = None,
    samplers: Sequence[str] = (),
    steps: Sequence[int] = (),
    strengths: Sequence[float] = (1.0,),
    steer: str | None = None,
    pictures: int = 8,
    out: str | None = None,
    overwrite: bool = False,
    trust: bool = False,
    batch: int | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Run `condrl evaluate` with these arguments and options; returns the content of evaluation.json.

    Raises: UsageError on bad input, RunError when a measure fails.
    """
    from condrl.commands.evaluate import evaluated

    lists = {"samplers": list(samplers), "steps": list(steps), "strength": list(strengths)}
    where = {"out": out, "overwrite": overwrite, "trust": trust, "device": device}
    return evaluated(arguments, prompts=prompts, steer=steer, pictures=pictures, batch=batch, **lists, **where)
