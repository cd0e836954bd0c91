"""Held-out prompts, base beside tuned, from the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from condrl.noise import seeded
from condrl.policy import Policy
from condrl.processes import Processes
from condrl.prompts import Row
from condrl.rewards import Reward, score
from condrl.rollout import sample


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its 95 % confidence interval (normal approximation, prompts as the unit)."""

    mean: float
    ci95: tuple[float, float] | None  # None for a single prompt
    failed: int = 0  # scores that are left out of it


@dataclass(frozen=True)
class Evaluation:
    """What each measure says of a policy on the held-out prompts."""

    measures: dict[str, Estimate]
    pictures: list[Tensor]  # the first images (3, H, W) in [0, 1]
    labels: list[str]


def estimate(scores: Tensor, images_per_prompt: int) -> Estimate:
    """Mean and interval of scores (P * images_per_prompt,), a prompt's images next to each other; nan are left out."""
    means = scores.double().reshape(-1, images_per_prompt).nanmean(1)
    means, failed = means[means.isfinite()], int(scores.isnan().sum())
    mean = means.mean().item()
    if len(means) <= 1:
        return Estimate(mean, None, failed)
    half = 1.96 * means.std().item() / len(means) ** 0.5
    return Estimate(mean, (mean - half, mean + half), failed)


@torch.no_grad()
def evaluate(
    policy: Policy,
    rows: Sequence[Row],
    measures: Sequence[Reward],
    seed: int,
    per_prompt: int,
    batch: int,
    pictures: int,
    processes: Processes | None = None,
) -> Evaluation:
    """Sample `per_prompt` images of each row, image i from seed + i, and score them, each process its share.

    Two policies evaluated with the same arguments start from the same noise. The first process has the pictures.
    """
    count = len(rows) * per_prompt
    share = processes.share(len(rows)) if processes else range(len(rows))
    places = range(share.start * per_prompt, share.stop * per_prompt)
    more = [rows[0]] * processes.padding(len(rows)) if processes else []  # sampled, and left out of what is measured
    rows = [row for row in [*(rows[i] for i in share), *more] for _ in range(per_prompt)]
    condition = policy.model.encode([row.prompt for row in rows])
    scores: dict[str, list[Tensor]] = {measure.name: [] for measure in measures}
    shown: list[Tensor] = []
    for start in range(0, len(rows), batch):
        part = slice(start, start + batch)
        seeds = [seed + places.start + i for i in range(len(rows))[part]]
        images = policy.model.decode(sample(policy, condition[part], seeded(seeds), batch))
        for name, values in score(measures, images, rows[part]).each.items():
            scores[name].append(values.cpu())
        shown.extend(images[: max(0, min(pictures, len(places)) - len(shown))].cpu())
    for measure in measures:
        measure.rest()
    found = {name: torch.cat([*values, torch.zeros(0)])[: len(places)] for name, values in scores.items()}
    if processes:
        found = {name: processes.gather(values, places, count) for name, values in found.items()}
    measured = {name: estimate(values, per_prompt) for name, values in found.items()}
    return Evaluation(measured, shown, [row.prompt for row in rows[: len(shown)]])
