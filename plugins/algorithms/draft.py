"""DRaFT: the reward's own gradient, back through the denoising steps (Clark et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import condrl
from condrl.algorithms.base import Algorithm, Examples, Experience, Metrics, Need
from condrl.config import TrainConfig
from condrl.diffusion.noise import Noise
from condrl.diffusion.policy import Policy


@dataclass(frozen=True)
class Chains:
    """B trajectories from the first differentiated step on."""

    states: Tensor  # (n + 1, B, ...)
    condition: Tensor  # (B,)
    score: Callable[[Tensor], Tensor]  # the total reward (B,) of other samples (B, ...) for these images


@dataclass(frozen=True)
class WholeChains:
    """An epoch's trajectories; the only column is all of an image's differentiated steps."""

    experience: Experience
    first: int
    columns: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.long))
    metrics: Metrics = field(default_factory=dict)

    @property
    def images(self) -> int:
        return len(self.experience.rows)

    def minibatch(self, images: Tensor, columns: Tensor) -> Chains:
        r = self.experience.rollout
        states = r.states[self.first :, images.to(r.states.device)]
        return Chains(states, r.condition[images], lambda samples: self.experience.score(samples, images))


@condrl.algorithm(name="draft")
@dataclass(kw_only=True)
class DRaFT(Algorithm):
    """Maximises E r - kappa KL by differentiating the chain and the reward (Clark et al. 2024; THEORY 7.2).

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
    def needs(self) -> Sequence[Need]:
        return ("reward gradients", "Markov steps", "one pass", *(("noise",) if self.kappa > 0 else ()))

    def examples(self, policy: Policy, experience: Experience, train: TrainConfig, noise: Noise) -> Examples:
        return WholeChains(experience, max(0, policy.steps - (self.last or policy.steps)))

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
