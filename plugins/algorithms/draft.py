"""DRaFT: the reward's own gradient, back through the denoising steps (Clark et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import condrl
from condrl.algorithms import needs
from condrl.algorithms.base import Algorithm, Experience
from condrl.algorithms.examples import Examples, Metrics, per_chain, per_image
from condrl.algorithms.needs import Need, markov_steps, one_pass, reward_gradients
from condrl.config import TrainConfig
from condrl.diffusion.noise import Noise
from condrl.diffusion.policy import Policy


@dataclass(frozen=True, kw_only=True)
class Chains(Examples):
    """An epoch's trajectories from the first differentiated step on, which are one step of learning."""

    states: Tensor = per_chain()  # (n + 1, B, ...)
    images: Tensor = per_image()  # their indices in the experience
    experience: Experience

    def score(self, samples: Tensor) -> Tensor:
        """The total reward (B,) of other samples (B, ...) for these images."""
        return self.experience.score(samples, self.images)


@condrl.algorithm(name="draft")
@dataclass(kw_only=True)
class DRaFT(Algorithm):
    """Maximises E r - kappa KL by differentiating the chain and the reward (Clark et al. 2024; docs/theory.md 14).

    The gradient is taken along the visited states, as of a chain whose noise is held. With `last` steps only, the
    earlier ones are taken as given: cheaper, and biased.
    """

    kappa: float = 0.0  # reward per nat of path KL to the pretrained model
    last: int | None = None  # steps to differentiate, counted from the end; null: all

    def __post_init__(self) -> None:
        self.require_at_least(0, "kappa")
        if self.last is not None:
            self.require_at_least(1, "last")

    @property
    def needs(self) -> tuple[Need, ...]:
        return (reward_gradients, markov_steps, one_pass, *((needs.noise,) if self.kappa > 0 else ()))

    def examples(self, policy: Policy, experience: Experience, train: TrainConfig, noise: Noise) -> Chains:
        r, first = experience.rollout, max(0, policy.steps - (self.last or policy.steps))
        return Chains(
            condition=r.condition,
            k=torch.zeros(1, dtype=torch.long),
            states=r.states[first:],
            images=torch.arange(len(r.condition)),
            experience=experience,
        )

    def loss(self, policy: Policy, batch: Chains) -> tuple[Tensor, Metrics]:
        """-r + kappa KL of each image, (B,)."""
        x, kl = batch.states[0], torch.zeros(len(batch.condition), device=batch.states.device)
        first = policy.steps - len(batch.states) + 1
        for i, visited in enumerate(batch.states[1:]):
            k = torch.full((len(x),), first + i)
            transition = policy.transition(x, k, batch.condition)
            if self.kappa > 0 and policy.sampler.stochastic[first + i]:
                with policy.model.reference():
                    kl = kl + transition.kl(policy.transition(x, k, batch.condition))
            x = transition.mean + (visited - transition.mean).detach()  # the visited state, by the roll-out's own noise
        reward = batch.score(policy.model.decode(x))
        return self.kappa * kl - reward, {"path_kl": kl.mean()} if self.kappa > 0 else {}
