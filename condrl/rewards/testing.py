"""Checks for your own rewards.

    from condrl.rewards.testing import check_reward
    check_reward("redness", channel=1)

Each failure is an AssertionError that says what is wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from condrl.prompts import Row
from condrl.rewards.scoring import Reward, make_reward

PROMPTS = (
    "a red star",
    "two small blue circles",
    "a green square left of a yellow triangle",
    "three small yellow squares",
)


def check_reward(
    name: str,
    *,
    samples: Tensor | None = None,
    prompts: Sequence[str] = PROMPTS,
    metadata: Sequence[dict[str, Any]] | None = None,
    value_range: tuple[float, float] | None = None,
    tolerance: float = 1e-4,
    **options: Any,
) -> None:
    """Check a registered reward with these options: shape, type, device, determinism, batches, range and gradient.

    `samples` (B, ...) are made for `prompts` (B,), with `metadata` rows; smooth random images (B, 3, 64, 64) if not
    given. Scores of one sample alone and in a batch may differ by `tolerance`, relative to the largest.

    Raises: AssertionError saying what is wrong.
    """
    reward = dataclasses.replace(make_reward(name, options), cache=None)  # no cached scores
    x = smooth_images(len(prompts)) if samples is None else samples
    given = zip(prompts, metadata or [{}] * len(prompts), strict=True)
    rows = [Row(0 if reward.per_group else i, prompt, extra) for i, (prompt, extra) in enumerate(given)]
    with torch.no_grad():
        scores = reward(x, rows)
        again = reward(x, rows)
        ones = [] if reward.per_group else [reward(x[i : i + 1], rows[i : i + 1]) for i in range(len(x))]
        alone = torch.cat(ones) if ones else scores
        turned = reward(x.flip(0), rows[::-1]).flip(0)
    assert scores.isfinite().all(), f"the reward {name} gave {scores.tolist()}: every score should be a finite number"
    assert scores.device == x.device, f"the scores of {name} are on {scores.device}, the samples on {x.device}"
    allowed = tolerance * max(1.0, scores.abs().max().item())
    for what, other in (("a second time", again), ("one by one", alone), ("in the opposite order", turned)):
        off = (scores - other).abs().max().item()
        assert off <= allowed, f"the scores of {name} differ by {off:.2g} when the samples are scored {what}"
    if value_range:
        low, high = value_range
        inside = (scores >= low) & (scores <= high)
        assert inside.all(), f"the scores of {name}, {scores.tolist()}, are not all in [{low}, {high}]"
    if reward.differentiable:
        check_gradient(reward, x, rows)


def check_gradient(reward: Reward, x: Tensor, rows: Sequence[Row], step: float = 2e-3) -> None:
    """Compare the gradient of the scores, along a random smooth direction, with finite differences.

    Raises: AssertionError saying what is wrong.
    """
    x = x.clamp(0.1, 0.9) if x.dim() == 4 else x
    if x.dim() == 4:
        direction = 2 * smooth_images(len(x), x.shape[1], x.shape[2], x.shape[3], seed=1) - 1
    else:
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    direction = direction.to(x)
    samples = x.clone().requires_grad_()
    scores = reward(samples, rows)
    message = f"the reward {reward.name} has no gradient in the samples: use @condrl.reward(differentiable=False)"
    assert scores.requires_grad, message
    (gradient,) = torch.autograd.grad(scores.sum(), samples)
    assert gradient.isfinite().all(), f"the gradient of {reward.name} is not finite"
    slope = (gradient * direction).flatten(1).sum(1)
    with torch.no_grad():
        ahead, behind = (reward(x + sign * step * direction, rows) for sign in (1, -1))
    numeric = (ahead - behind) / (2 * step)
    if reward.per_group:  # a score depends on the other samples too
        slope, numeric = slope.sum(0), numeric.sum(0)
    noise = 1e-5 * max(1.0, scores.abs().max().item()) / step  # of scores in float32
    off = (slope - numeric).abs().max().item()
    message = f"{slope.tolist()} by autograd, {numeric.tolist()} by differences"
    assert off <= 0.05 * numeric.abs().max().item() + noise, f"the gradient of {reward.name} is wrong: {message}"


def smooth_images(count: int, channels: int = 3, height: int = 64, width: int = 64, seed: int = 0) -> Tensor:
    """Images (B, C, H, W) in [0, 1] without steps between neighbours."""
    coarse = torch.rand(count, channels, 6, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
