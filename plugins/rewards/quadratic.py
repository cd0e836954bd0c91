"""A quadratic function of points, which may differ from prompt to prompt."""

from typing import Any

import torch
from torch import Tensor

import condrl


@condrl.reward
def quadratic(
    samples: Tensor,
    prompts: list[str],
    metadata: list[dict[str, Any]],
    *,
    linear: tuple[float, ...] = (1.0,),  # b, one number per dimension or one for all
    curvature: tuple[float, ...] = (0.0,),  # the diagonal of Q, likewise
    constant: float = 0.0,  # c
) -> Tensor:
    """<b, x> - x^T Q x / 2 + c of points (B, d); a prompt row's own "linear" and "curvature" come first."""

    def of_rows(name: str, default: Any) -> Tensor:
        values = [row.get(name, default) for row in metadata]
        return torch.stack([_vector(value, samples, p) for value, p in zip(values, prompts, strict=True)])

    b, Q = of_rows("linear", linear), of_rows("curvature", curvature)
    return (b * samples - Q * samples.square() / 2).sum(1) + constant


def _vector(value: Any, samples: Tensor, prompt: str) -> Tensor:
    """A number or a list of numbers as (d,).

    Raises: RunError when it has another length than 1 or d.
    """
    vector = torch.as_tensor(value).to(samples).flatten()
    if len(vector) not in (1, samples.shape[1]):
        raise condrl.RunError(
            f"the reward quadratic has {len(vector)} coefficients for points of {samples.shape[1]} dimensions, at the "
            f"prompt {prompt!r}"
        )
    return vector.expand(samples.shape[1])
