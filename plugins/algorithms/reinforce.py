"""REINFORCE on denoising steps, the DDPO-SF of Black et al. 2024."""

from dataclasses import dataclass

import torch
from torch import Tensor

import condrl
from condrl.algorithms.base import Collected, Context, Experience
from condrl.algorithms.examples import Examples, Metrics
from condrl.algorithms.needs import Need, Setting, one_pass, trained_steps
from condrl.algorithms.policy_gradient import PolicyGradient, Steps
from condrl.config import TrainConfig
from condrl.diffusion.noise import Noise
from condrl.diffusion.policy import Policy, trained_weights
from condrl.diffusion.rollout import rollout
from condrl.diffusion.transition import Transition
from condrl.prompts import Row


@dataclass(frozen=True, kw_only=True)
class Differentiated(Examples):
    """An epoch's images, whose loss is differentiated already."""

    gradient: list[Tensor]  # of the sum of this process's losses, by each trained weight
    pairs: int  # of this process, over which that sum is spread


@condrl.algorithm
@dataclass(kw_only=True)
class REINFORCE(PolicyGradient):
    """DDPO-SF: A grad log p, for one update on each image (Black et al. 2024, eq. 4; docs/theory.md 8)."""

    keep_graph: bool = False  # differentiate the roll-out itself: no second forward pass, but all graphs at once

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_graph and self.kappa:
            raise condrl.UsageError("config algorithm.keep_graph: the KL needs a pass of its own: leave out kappa")

    @property
    def needs(self) -> tuple[Need, ...]:
        return (*super().needs, one_pass, *((one_update,) if self.keep_graph else ()))

    def collect(self, context: Context, rows: list[Row]) -> Collected:
        if not self.keep_graph:
            return super().collect(context, rows)
        policy, train = context.policy, context.train
        condition = policy.model.encode([row.prompt for row in rows])
        trained = trained_steps(policy.sampler, train).tolist()
        return context.score(rollout(policy, condition, context.noise, train.rollout_batch, trained), rows)

    def examples(self, policy: Policy, experience: Experience, train: TrainConfig, noise: Noise) -> Examples:
        if not self.keep_graph:
            return super().examples(policy, experience, train, noise)
        r, trained = experience.rollout, trained_steps(policy.sampler, train)
        advantages = experience.credit(self.advantages, experience.scores.total)
        weights = trained_weights(policy.model.module)
        (-advantages * r.log_probs[trained].float()).sum().backward()
        gradient = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
        for weight in weights:
            weight.grad = None
        scored = experience.scored[experience.indices.start : experience.indices.stop].sum().item()
        return Differentiated(
            condition=r.condition, k=trained, gradient=gradient, pairs=max(1, int(scored) * len(trained))
        )

    def loss(self, policy: Policy, batch: Steps | Differentiated) -> tuple[Tensor, Metrics]:
        if isinstance(batch, Steps):
            return super().loss(policy, batch)
        weights = trained_weights(policy.model.module)
        along = torch.stack([(w * g).sum() for w, g in zip(weights, batch.gradient, strict=True)]).sum()
        return ((along - along.detach()) / batch.pairs).expand(batch.count), {}

    def surrogate(self, policy: Policy, transition: Transition, batch: Steps) -> tuple[Tensor, Metrics]:
        return -batch.advantage * (transition.log_prob(batch.next_x) - batch.old_log_prob).float(), {}


def one_update(setting: Setting) -> None:
    """One update of an epoch's images and steps, in the network's own arithmetic."""
    train = setting.config.train
    for wrong, key, text in (
        (train.updates_per_epoch > 1, "updates_per_epoch", "must be 1, as a graph is differentiated once"),
        (train.steps_per_image is not None, "steps_per_image", "must be null; train.steps chooses steps"),
        (train.rollout_dtype is not None, "rollout_dtype", "must be null, as the roll-out is what is learned from"),
    ):
        if wrong:
            raise condrl.UsageError(f"config train.{key}: with algorithm.keep_graph it {text}")
