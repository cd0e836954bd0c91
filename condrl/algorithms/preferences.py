"""Learning from preferences: of two images of a prompt, one is preferred as far as their implicit rewards say."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from condrl.algorithms.base import Algorithm
from condrl.algorithms.examples import Examples, Metrics, per_image, per_step
from condrl.algorithms.forward import noised
from condrl.algorithms.needs import Need, Setting
from condrl.diffusion.noise import Noise
from condrl.diffusion.policy import Policy
from condrl.diffusion.schedule import like
from condrl.errors import UsageError


def preference_loss(margin: Tensor, preferred: Tensor | None = None) -> tuple[Tensor, Metrics]:
    """-log sigmoid(margin) of pairs (B,), the margin being that of the better image; and means to log.

    Where the better one is only preferred with a probability (B,), it is the cross entropy to that.
    """
    loss = -logsigmoid(margin)
    if preferred is not None:
        loss = preferred * loss - (1 - preferred) * logsigmoid(-margin)
    accuracy = (margin > 0).float().mean()
    return loss, {"implicit_accuracy": accuracy, "implicit_margin": margin.detach().mean()}


def extremes(rewards: Tensor, size: int) -> Tensor:
    """The best and the worst (B, 2) of each image's set, `size` images (B,) in a row; failed ones are neither."""
    sets = rewards.view(-1, size)
    scored = sets.isfinite()
    best, worst = sets.where(scored, -torch.inf).argmax(1), sets.where(scored, torch.inf).argmin(1)
    pairs = torch.stack([best, worst], 1) + size * torch.arange(len(sets), device=rewards.device)[:, None]
    return pairs.repeat_interleave(size, 0)


def contests(size: int) -> Need:
    """Groups that are divided into sets of `size` images."""

    def divided(setting: Setting) -> None:
        images = setting.config.train.images_per_prompt
        if images % size:
            raise UsageError(
                f"config algorithm.contest: {size} does not divide train.images_per_prompt={images}, the images of a "
                "prompt that are compared with each other"
            )

    return divided


def odds(rewards: Tensor, pairs: Tensor) -> Tensor:
    """The probability (n,) by which the first of pairs (n, 2) is preferred: with odds exp(r - r')."""
    better, worse = rewards[pairs].unbind(1)
    return (better - worse).sigmoid()


@dataclass(frozen=True, kw_only=True)
class NoisedPairs(Examples):
    """Pairs, each noised n times; a draw is a step of learning, and both images have its noise and its time."""

    states: Tensor = per_image()  # (B, 2, ...) of the better and the worse image
    noise: Tensor = per_step()
    step: Tensor = per_step()  # the denoising step of each draw
    base_errors: Tensor = per_step()  # (n, B, 2) nats, of the pretrained model
    preferred: Tensor | None = per_image(default=None)  # the probability that the first is the better one; None: 1


@dataclass(kw_only=True)
class NoisedPreferences(Algorithm):
    """Raises the better image's likelihood over the worse one's, by their evidence bounds (docs/theory.md 16)."""

    kappa: float = 1.0  # reward per nat of path KL to the pretrained model
    draws: int = 1  # times at which each pair is noised
    weighting: Literal["path", "epsilon"] = "path"  # of steps: the chain's own; or published, alike for the noise

    def __post_init__(self) -> None:
        self.require_positive("kappa")
        self.require_at_least(1, "draws")

    def draw(
        self,
        policy: Policy,
        states: Tensor,
        condition: Tensor,
        batch: int,
        noise: Noise,
        preferred: Tensor | None = None,
    ) -> NoisedPairs:
        """Pairs (B, 2, ...) at random steps with noise, `batch` draws at a time."""
        noisy, count = policy.sampler.stochastic.nonzero().flatten(), len(states)
        chosen = (noise.uniform((self.draws,)).T * len(noisy)).long()
        errors = noise.normal((self.draws, *states.shape[2:])).transpose(0, 1).to(states.device)
        whole = NoisedPairs(
            condition=condition,
            k=torch.arange(self.draws),
            states=states,
            noise=errors,
            step=noisy[chosen],
            base_errors=torch.zeros(self.draws, count, 2, device=states.device),
            preferred=preferred,
        )
        with torch.no_grad(), policy.model.reference():
            parts = [self.errors(policy, whole.at(*p.unbind(1))) for p in whole.every_pair().split(batch)]
        return replace(whole, base_errors=torch.cat(parts).view(self.draws, count, 2))

    def errors(self, policy: Policy, batch: NoisedPairs) -> Tensor:
        """The KL (B, 2) in nats of the true denoising step of each image, which knows its end, to the policy's."""
        schedule, t = policy.model.schedule, policy.sampler.times[batch.step].repeat_interleave(2)
        clean, error = batch.states.flatten(0, 1), batch.noise.repeat_interleave(2, 0)
        x = noised(schedule, clean, t, error)
        action = policy.model.score(x, t, batch.condition.repeat_interleave(2))
        true = (-error / like(schedule.sigma(t), x)).where(like(schedule.alpha(t), x) > 0, clean)
        distance = (action - true).square().flatten(1).sum(1)
        weights = self.weights(policy)[batch.step].to(distance)
        return weights[:, None] * distance.view(-1, 2)

    def weights(self, policy: Policy) -> Tensor:
        """What |action - true action|^2 is multiplied by at each step, (K,): B^2 / 2 S^2, 0 without noise.

        Without a signal the noise is known, so no error of it counts.

        Raises: UsageError where only such a step has noise.
        """
        sampler, noisy = policy.sampler.affine, policy.sampler.stochastic
        assert sampler is not None  # needs
        path = (sampler.B.square() / (2 * sampler.S.square())).where(noisy, 0.0)
        if self.weighting == "path":
            return path
        variance = policy.model.schedule.sigma(sampler.times[:-1]).square()
        counted = noisy & (policy.model.schedule.alpha(sampler.times[:-1]) > 0)
        if not counted.any():
            raise UsageError(
                "config algorithm.weighting: epsilon needs steps with noise and a signal: raise sampler.steps"
            )
        return variance.where(counted, 0.0) * (path / variance)[counted].sum() / counted.sum()

    def margin(self, policy: Policy, batch: NoisedPairs) -> Tensor:
        """kappa n (gain of the better - gain of the worse) of each draw (B,), n the number of steps with noise."""
        better, worse = (batch.base_errors - self.errors(policy, batch)).unbind(1)
        return self.kappa * policy.sampler.stochastic.sum() * (better - worse)

    def loss(self, policy: Policy, batch: NoisedPairs) -> tuple[Tensor, Metrics]:
        """-log sigmoid of the margin of each draw (B,), or the cross entropy where preferences are uncertain."""
        return preference_loss(self.margin(policy, batch), batch.preferred)
