"""Diffusion-DPO: preferences between images that a user already has, without a reward (Wallace et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import condrl
from condrl.algorithms.base import Algorithm, Collected, Context
from condrl.algorithms.examples import Examples, Metrics, per_image, per_step
from condrl.algorithms.forward import noised
from condrl.algorithms.needs import Need, Setting, affine_steps, no_rollouts, noise
from condrl.config import TrainConfig
from condrl.diffusion.noise import Noise
from condrl.diffusion.policy import Policy
from condrl.diffusion.schedule import like
from condrl.prompts import Row
from condrl.rewards.pixels import read_image

SIDES = ("better", "worse")


@dataclass(frozen=True, kw_only=True)
class Pairs(Collected):
    """The pairs of an epoch's rows, as the model's states."""

    condition: Tensor  # (B,)
    states: Tensor  # (2, B, ...) of the better and the worse image


@dataclass(frozen=True, kw_only=True)
class NoisedPairs(Examples):
    """The pairs, each noised n times; a draw is a step of learning, and both images have its noise and its time."""

    states: Tensor = per_image()  # (B, 2, ...)
    noise: Tensor = per_step()
    step: Tensor = per_step()  # the denoising step of each draw
    base_errors: Tensor = per_step()  # (n, B, 2) nats, of the pretrained model


def one_image_a_row(setting: Setting) -> None:
    """Rows that hold a pair each."""
    if setting.config.train.images_per_prompt != 1:
        raise condrl.UsageError(
            f"the algorithm {setting.algorithm} reads one pair from each row: set train.images_per_prompt=1 "
            "(algorithm.draws noises each several times)"
        )


@condrl.algorithm(name="diffusion_dpo")
@dataclass(kw_only=True)
class DiffusionDPO(Algorithm):
    """Raises the better image's likelihood over the worse one's, from pairs in prompts.train (Wallace et al. 2024).

    A row has "prompt", "better" and "worse": image files, or points of a toy. -log sigmoid(kappa (ratio of the better -
    ratio of the worse)) is minimised, ratios being the evidence bounds of log p_theta / p_pre under the sampler's own
    chain, so kappa is the weight of the path KL for rewards by which a pair is preferred with odds exp(r - r').
    """

    kappa: float = 1.0  # reward per nat of path KL to the pretrained model
    draws: int = 1  # times at which each pair is noised
    weighting: Literal["path", "epsilon"] = "path"  # of steps: the chain's own; or published, alike for the noise

    uses_rewards = False

    def __post_init__(self) -> None:
        self.require_positive("kappa")
        self.require_at_least(1, "draws")

    @property
    def needs(self) -> tuple[Need, ...]:
        return (one_image_a_row, affine_steps, noise, no_rollouts)

    # ------------------------------------------------------------------------------------------ pairs

    def check_rows(self, policy: Policy, rows: Sequence[Row]) -> None:
        for row in rows:
            for side in SIDES:
                check_side(row, side, policy.model.sample_shape)

    def collect(self, context: Context, rows: list[Row]) -> Pairs:
        model = context.policy.model
        with torch.no_grad():
            states = [model.encode_images(torch.stack([read_side(row, side) for row in rows])) for side in SIDES]
        return Pairs(
            rows=rows,
            processes=context.processes,
            indices=context.indices,
            total=context.total,
            scored=torch.ones(context.total, dtype=torch.bool, device=model.device),
            condition=model.encode([row.prompt for row in rows]),
            states=torch.stack(states),
        )

    # ------------------------------------------------------------------------------------------ loss

    def examples(self, policy: Policy, experience: Pairs, train: TrainConfig, noise: Noise) -> NoisedPairs:
        states, noisy = experience.states.transpose(0, 1), policy.sampler.stochastic.nonzero().flatten()
        count = len(states)
        chosen = (noise.uniform((self.draws,)).T * len(noisy)).long()
        errors = noise.normal((self.draws, *states.shape[2:])).transpose(0, 1).to(states.device)
        whole = NoisedPairs(
            condition=experience.condition,
            k=torch.arange(self.draws),
            states=states,
            noise=errors,
            step=noisy[chosen],
            base_errors=torch.zeros(self.draws, count, 2, device=states.device),
        )
        with torch.no_grad(), policy.model.reference():
            parts = [self.errors(policy, whole.at(*p.unbind(1))) for p in whole.every_pair().split(train.loss_batch)]
        return replace(whole, base_errors=torch.cat(parts).view(self.draws, count, 2))

    def errors(self, policy: Policy, batch: NoisedPairs) -> Tensor:
        """The KL (B, 2) in nats of the true denoising step of each image, which knows its end, to the policy's."""
        schedule, t = policy.model.schedule, policy.sampler.times[batch.step].repeat_interleave(2)
        clean, error = batch.states.flatten(0, 1), batch.noise.repeat_interleave(2, 0)
        x = noised(schedule, clean, t, error)
        score = policy.model.score(x, t, batch.condition.repeat_interleave(2))
        distance = (score + error / like(schedule.sigma(t), x)).square().flatten(1).sum(1)
        weights = self.weights(policy)[batch.step].to(distance)
        return weights[:, None] * distance.view(-1, 2)

    def weights(self, policy: Policy) -> Tensor:
        """What |score - true score|^2 is multiplied by at each step, (K,): B^2 / 2 S^2, 0 without noise."""
        sampler, noisy = policy.sampler.affine, policy.sampler.stochastic
        assert sampler is not None  # needs
        path = (sampler.B.square() / (2 * sampler.S.square())).where(noisy, 0.0)
        if self.weighting == "path":
            return path
        variance = policy.model.schedule.sigma(sampler.times[:-1]).square()
        return variance.where(noisy, 0.0) * (path / variance).sum() / noisy.sum()

    def loss(self, policy: Policy, batch: NoisedPairs) -> tuple[Tensor, Metrics]:
        """-log sigmoid(kappa n (margin)) of each draw (B,); the bound has n terms, one per step with noise."""
        better, worse = (batch.base_errors - self.errors(policy, batch)).unbind(1)
        margin = self.kappa * policy.sampler.stochastic.sum() * (better - worse)
        accuracy = (margin > 0).float().mean()
        return -logsigmoid(margin), {"implicit_accuracy": accuracy, "implicit_margin": margin.detach().mean()}


def check_side(row: Row, side: str, shape: tuple[int, ...]) -> None:
    """Raises: UsageError naming a row whose `side` is neither an image of the model's size nor one of its points."""
    where, value = f"config prompts.train: row {row.index + 1}", row.metadata.get(side)
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
