"""Feynman-Kac: the value of the optimal control as a network, learned from the pretrained model's own chains."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import softplus

import condrl
from condrl.algorithms.base import Algorithm, Experience, OwnNetwork
from condrl.algorithms.credit import leave_one_out
from condrl.algorithms.examples import Examples, Metrics, per_image, per_step
from condrl.algorithms.needs import Need, Setting, groups, markov_steps, noisy_steps, trained_steps
from condrl.algorithms.values import StepValue
from condrl.config import TrainConfig
from condrl.diffusion.noise import Noise
from condrl.diffusion.policy import Policy
from condrl.diffusion.rollout import Rollout, rollout
from condrl.diffusion.transition import Transition

LARGEST = 80.0  # nats: float32 holds exp of 88


@dataclass(frozen=True, kw_only=True)
class Steps(Rollout):
    """Trajectories with the means of their steps."""

    means: Tensor  # (K, B, ...)


class Recorded(Policy):
    """A policy that keeps the means (B, ...) of the steps that it takes."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy.model, policy.sampler, policy.rollout_dtype)
        self.means: list[Tensor] = []

    def step(
        self, x: Tensor, k: Tensor, condition: Tensor, solver_state: Tensor | None
    ) -> tuple[Transition, Tensor | None]:
        transition, solver_state = super().step(x, k, condition, solver_state)
        self.means.append(transition.mean)
        return transition, solver_state


@dataclass(frozen=True, kw_only=True)
class Targets(Examples):
    """The pretrained model's steps, and what their samples were worth."""

    x: Tensor = per_step()
    mean: Tensor = per_step()  # of the pretrained step from x
    log_weight: Tensor = per_image()  # r / kappa, less its mean over the prompt's other images


def every_noisy_step(setting: Setting) -> None:
    """The same noise in every epoch, and all of its steps learned."""
    for name in ("steps", "window"):
        if getattr(setting.config.train, name) is not None:
            raise condrl.UsageError(
                f"config train.{name}: the algorithm {setting.algorithm} learns the value of every step with noise: "
                "leave it out; train.steps_per_image saves time"
            )


@condrl.algorithm(name="feynman_kac")
@dataclass(kw_only=True)
class FeynmanKac(Algorithm):
    """Learns log E_pre[exp(r / kappa) | step] as a network, whose gradient is the optimal control (docs/theory.md 22).

    All images are the pretrained model's own, and rewards need no gradient. Afterwards `--steer value,run=...` draws
    with the network, and a LoRA that was taught its control draws without it.
    """

    kappa: float = 1.0  # reward per nat of path KL to the pretrained model
    distil: bool = True  # teach the LoRA the control; false: it stays as it is, and updates cost next to nothing
    value_lr: float = 3e-3  # learning rate of the network
    value_steps: int = 1  # its optimiser steps for each update
    value_width: int = 64  # its hidden units

    value: StepValue = field(init=False)

    off_policy = True

    def __post_init__(self) -> None:
        self.require_positive("kappa", "value_lr", "value_width")
        self.require_at_least(1, "value_steps")
        self.trains_policy = self.distil

    @property
    def needs(self) -> tuple[Need, ...]:
        return (noisy_steps, every_noisy_step, groups, markov_steps)

    def setup(self, policy: Policy) -> None:
        self.value = StepValue(policy, self.value_width)

    def networks(self) -> dict[str, OwnNetwork]:
        steady = (0.9, 0.999)  # weights have heavy tails: a short memory of their squares lets one image move it far
        return {"value": OwnNetwork(self.value, self.value_lr, steady, extra_steps=self.value_steps - 1, is_kept=True)}

    def rollout(self, policy: Policy, condition: Tensor, noise: Noise, batch: int) -> Steps:
        recorded = Recorded(policy)
        with policy.model.reference():
            r = rollout(recorded, condition, noise, batch)
        K, means = policy.steps, recorded.means
        parts = [torch.stack(means[first : first + K]) for first in range(0, len(means), K)]
        return Steps(r.states, r.log_probs, r.condition, means=torch.cat(parts, 1))

    def examples(self, policy: Policy, experience: Experience, train: TrainConfig, noise: Noise) -> Targets:
        r, rewards = experience.rollout, experience.scores.total
        assert isinstance(r, Steps)  # from our own rollout
        centred = experience.credit(leave_one_out, rewards)
        log_weight = centred / self.kappa
        if log_weight.max() > LARGEST:
            raise condrl.RunError(
                f"config algorithm.kappa: {self.kappa:g} is too small to learn from: an image's reward is "
                f"{log_weight.max():.0f} kappa above its prompt's others, and counts exp of that as often; raise it"
            )
        shares = experience.gather(experience.credit(group_shares, rewards / self.kappa))[experience.scored]
        return Targets(
            condition=r.condition,
            k=trained_steps(policy.sampler, train),
            x=r.states[:-1],
            mean=r.means,
            log_weight=log_weight,
            metrics={"effective_share": 1 / shares.square().mean()},
        )

    def own_loss(self, name: str, policy: Policy, batch: Targets) -> Tensor:
        """log(1 + e^V) + w log(1 + e^-V) of each pair (B,), least in the mean at e^V = E[w | step]."""
        found = self.value(batch.mean, batch.k, policy.model.features(batch.condition))
        return softplus(found) + batch.log_weight.exp().to(found) * softplus(-found)

    def loss(self, policy: Policy, batch: Targets) -> tuple[Tensor, Metrics]:
        """The value's, and the KL of the step to the one that the value controls (B,), nats."""
        error = self.own_loss("value", policy, batch)
        metrics = {"value_loss": error.detach().mean()}
        if not self.distil:
            return error, metrics
        transition = policy.transition(batch.x, batch.k, batch.condition)
        control = self.value.control(batch.mean, batch.k, policy.model.features(batch.condition))
        wrong = (transition.mean - batch.mean) / transition.std - transition.std * control
        return error + wrong.square().flatten(1).sum(1) / 2, metrics


def group_shares(scaled: Tensor, groups: Tensor) -> Tensor:
    """exp(r / kappa) over its mean in each image's group, (B,) from r / kappa (B,)."""
    found = torch.empty_like(scaled)
    for group in groups.unique():
        rows = groups == group
        found[rows] = scaled[rows].softmax(0) * rows.sum()
    return found
