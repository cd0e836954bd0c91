"""Diffusion-DPO: preferences between images that a user already has, without a reward (Wallace et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import condrl
from condrl.algorithms.base import Collected, Context
from condrl.algorithms.needs import Need, Setting, affine_steps, no_rollouts, noise
from condrl.algorithms.preferences import NoisedPairs, NoisedPreferences
from condrl.config import TrainConfig
from condrl.diffusion.noise import Noise
from condrl.diffusion.policy import Policy
from condrl.prompts import SIDES, Row
from condrl.rewards.pixels import read_image

VERSION = 1  # of a pair's record
HELDOUT_DRAWS = 10  # times at which a held-out pair is noised


@dataclass(frozen=True, kw_only=True)
class Pairs(Collected):
    """The pairs of an epoch's rows, as the model's states."""

    condition: Tensor  # (B,)
    states: Tensor  # (2, B, ...) of the better and the worse image


def one_image_a_row(setting: Setting) -> None:
    """Rows that hold a pair each."""
    if setting.config.train.images_per_prompt != 1:
        raise condrl.UsageError(
            f"the algorithm {setting.algorithm} reads one pair from each row: set train.images_per_prompt=1 "
            "(algorithm.draws noises each several times)"
        )


@condrl.algorithm(name="diffusion_dpo")
@dataclass(kw_only=True)
class DiffusionDPO(NoisedPreferences):
    """Raises the better image's likelihood over the worse one's, from pairs in prompts.train (Wallace et al. 2024).

    A row has "prompt", "better" and "worse", image files or a toy's points; docs/running.md has the format, and that of
    folders. -log sigmoid(kappa (ratio of the better - ratio of the worse)) is minimised, ratios being the evidence
    bounds of log p_theta / p_pre under the sampler's own chain, so kappa is the weight of the path KL for rewards by
    which a pair is preferred with odds exp(r - r').
    """

    uses_rewards = False

    @property
    def needs(self) -> tuple[Need, ...]:
        return (one_image_a_row, affine_steps, noise, no_rollouts)

    # ------------------------------------------------------------------------------------------ pairs

    def check_rows(self, policy: Policy, rows: Sequence[Row]) -> None:
        check_pairs(policy, rows, "train")

    def collect(self, context: Context, rows: list[Row]) -> Pairs:
        model = context.policy.model
        return Pairs(
            rows=rows,
            processes=context.processes,
            indices=context.indices,
            total=context.total,
            scored=torch.ones(context.total, dtype=torch.bool, device=model.device),
            condition=model.encode([row.prompt for row in rows]),
            states=encoded(context.policy, rows),
        )

    def examples(self, policy: Policy, experience: Pairs, train: TrainConfig, noise: Noise) -> NoisedPairs:
        states = experience.states.transpose(0, 1)
        return self.draw(policy, states, experience.condition, train.loss_batch, noise)

    # ------------------------------------------------------------------------------------------ held-out pairs

    def measures(self, policy: Policy, rows: Sequence[Row], name: str, train: TrainConfig) -> dict[str, Tensor]:
        """Whether the implicit reward orders each pair as it was given, by the same noise each time."""
        if not any(side in row.metadata for row in rows for side in SIDES):
            return {}
        check_pairs(policy, rows, name)
        starts = range(0, len(rows), train.loss_batch)
        margins = torch.cat([self._margins(policy, rows, slice(i, i + train.loss_batch), train) for i in starts])
        right = (margins > 0).float() + (margins == 0).float() / 2
        return {"implicit_accuracy": right.cpu(), "implicit_margin": margins.cpu()}

    @torch.no_grad()
    def _margins(self, policy: Policy, rows: Sequence[Row], part: slice, train: TrainConfig) -> Tensor:
        """The margins of some rows' pairs (b,), means over draws."""
        own, some = replace(self, draws=HELDOUT_DRAWS), rows[part]
        condition = policy.model.encode([row.prompt for row in some])
        noise = Noise("held-out pairs", range(len(rows)), 1)[part]
        draws = own.draw(policy, encoded(policy, some).transpose(0, 1), condition, train.loss_batch, noise)
        parts = draws.every_pair().split(train.loss_batch)
        margins = [own.margin(policy, draws.at(*pairs.unbind(1))) for pairs in parts]
        return torch.cat(margins).view(HELDOUT_DRAWS, -1).mean(0)


@torch.no_grad()
def encoded(policy: Policy, rows: Sequence[Row]) -> Tensor:
    """The states (2, B, ...) of the better and the worse images of rows."""
    sides = [torch.stack([read_side(row, side) for row in rows]) for side in SIDES]
    return torch.stack([policy.model.encode_images(images) for images in sides])


def check_pairs(policy: Policy, rows: Sequence[Row], name: str) -> None:
    """Raises: UsageError naming a row of prompts.<name> that has no pair, or one of another version."""
    for row in rows:
        if row.metadata.get("version", VERSION) != VERSION:
            raise condrl.UsageError(
                f'config prompts.{name}: row {row.index + 1} has "version" {row.metadata["version"]!r}: diffusion_dpo '
                f"reads pairs of version {VERSION} (docs/running.md)"
            )
        for side in SIDES:
            check_side(row, side, policy.model.sample_shape, name)


def check_side(row: Row, side: str, shape: tuple[int, ...], name: str) -> None:
    """Raises: UsageError naming a row whose `side` is neither an image of the model's size nor one of its points."""
    where, value = f"config prompts.{name}: row {row.index + 1}", row.metadata.get(side)
    if value is None:
        raise condrl.UsageError(f'{where} has no "{side}": diffusion_dpo needs "prompt", "better" and "worse"')
    if len(shape) == 1:
        if not isinstance(value, list) or len(value) != shape[0] or not all(isinstance(v, int | float) for v in value):
            raise condrl.UsageError(f'{where}: "{side}" should be a point, a list of {shape[0]} numbers')
        return
    if not isinstance(value, str):
        raise condrl.UsageError(f'{where}: "{side}" should be the path of an image')
    path = row.folder / value
    height, width = read_image(path, where).shape[1:]  # as a whole: a file may be cut short
    if (height, width) != shape[1:]:
        raise condrl.UsageError(
            f"{where}: {path} has {width} x {height} pixels, and the model draws {shape[2]} x {shape[1]}: resize it"
        )


def read_side(row: Row, side: str) -> Tensor:
    """An image (3, H, W) in [0, 1], or a point (d,)."""
    value: Any = row.metadata[side]
    return (
        read_image(row.folder / value, f"row {row.index + 1}")
        if isinstance(value, str)
        else torch.tensor(value, dtype=torch.float32)
    )
