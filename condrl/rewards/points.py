"""What rewards of points share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from condrl.errors import UsageError


def of_rows(
    samples: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]], name: str, default: Any
) -> Tensor:
    """Vectors (B, d) for points (B, d): each prompt row's own `name` in its metadata, else the default.

    Raises: UsageError naming the prompt when it is neither a number nor d numbers, or when the samples are not points.
    """
    if samples.dim() != 2:
        raise UsageError(f"{name!r} is for points (B, d), and the model makes samples of shape {tuple(samples.shape)}")
    values = [row.get(name, default) for row in metadata]
    dimensions = samples.shape[1]
    return samples.new_tensor(
        [_numbers(v, dimensions, name, prompt) for v, prompt in zip(values, prompts, strict=True)]
    )


def _numbers(value: Any, dimensions: int, name: str, prompt: str) -> list[float]:
    numbers = list(value) if isinstance(value, list | tuple) else [value]
    right = all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers)
    if not right or len(numbers) not in (1, dimensions):
        raise UsageError(
            f"{name!r} should be a number, or {dimensions} for points of {dimensions} dimensions; for the prompt "
            f"{prompt!r} it is {value!r}"
        )
    return numbers if len(numbers) == dimensions else numbers * dimensions
