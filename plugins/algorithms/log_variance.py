"""Log-variance: a chain is optimal where its density ratio explains the reward (Nuesken and Richter 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import condrl
from condrl.algorithms.base import Algorithm, Experience
from condrl.algorithms.credit import leave_one_out
from condrl.algorithms.examples import Examples, Metrics, per_chain, per_image
from condrl.algorithms.needs import Need, Setting, groups, markov_steps, noisy_steps, trained_steps
from condrl.config import TrainConfig
from condrl.diffusion.noise import Noise
from condrl.diffusion.path_kl import base_log_probs
from condrl.diffusion.policy import Policy


@dataclass(frozen=True, kw_only=True)
class Chains(Examples):
    """An epoch's trajectories, each one step of learning."""

    states: Tensor = per_chain()  # (K + 1, B, ...)
    base_log_prob: Tensor = per_chain()  # (K, B) of the pretrained model
    reward: Tensor = per_image()  # less kappa log P / P_pre of the steps that are not trained
    constant: Tensor = per_image()  # what r - kappa log P / P_pre was for the prompt's other images
    trained: Tensor  # (n,) the steps that are


def whole_chains(setting: Setting) -> None:
    """The same steps of every image."""
    if setting.config.train.steps_per_image is not None:
        raise condrl.UsageError(
            f"config train.steps_per_image: has no effect, the algorithm {setting.algorithm} sums over all "
            "trained steps of an image: leave it out, or choose some by train.steps"
        )


@condrl.algorithm(name="log_variance")
@dataclass(kw_only=True)
class LogVariance(Algorithm):
    """Makes r - kappa log P / P_pre the same for all images of a prompt that start alike (docs/theory.md 21).

    They are the same exactly at the optimum of E r - kappa KL over all chains: there the loss of each image is 0, and
    so is the noise of its gradient. Over the policy's own trajectories the mean gradient is that of E r - kappa KL. The
    reward need not be differentiable; the graph of a whole chain is kept, as in draft.
    """

    kappa: float = 1.0  # reward per nat of path KL to the pretrained model

    def __post_init__(self) -> None:
        self.require_positive("kappa")

    @property
    def needs(self) -> tuple[Need, ...]:
        return (noisy_steps, whole_chains, groups, markov_steps)

    def examples(self, policy: Policy, experience: Experience, train: TrainConfig, noise: Noise) -> Chains:
        r, rewards = experience.rollout, experience.scores.total
        base, trained = base_log_probs(policy, r, train.rollout_batch), trained_steps(policy.sampler, train)
        log_ratios = (r.log_probs - base).where(policy.sampler.stochastic[:, None].to(base.device), 0.0)
        log_ratio = log_ratios.sum(0)
        kept = rewards - self.kappa * log_ratio
        centred = experience.credit(leave_one_out, kept)
        return Chains(
            condition=r.condition,
            k=torch.zeros(1, dtype=torch.long),
            states=r.states,
            base_log_prob=base,
            reward=kept + self.kappa * log_ratios[trained.to(base.device)].sum(0),
            constant=kept - centred,
            trained=trained,
            metrics={
                "log_variance": (centred / self.kappa).square().mean(),
                "path_kl": log_ratio.mean(),
                "objective": kept.nanmean(),
            },
        )

    def loss(self, policy: Policy, batch: Chains) -> tuple[Tensor, Metrics]:
        """(r - kappa log P / P_pre - constant)^2 / (2 kappa) of each image (B,)."""
        k, rows = batch.trained.repeat_interleave(batch.count), batch.trained.to(batch.states.device)
        x, next_x, base = batch.states[rows], batch.states[rows + 1], batch.base_log_prob[rows]
        transition = policy.transition(x.flatten(0, 1), k, batch.condition.repeat(len(rows)))
        log_ratio = (transition.log_prob(next_x.flatten(0, 1)).view_as(base) - base).sum(0)
        error = batch.reward - self.kappa * log_ratio - batch.constant
        return error.square().float() / (2 * self.kappa), {}
