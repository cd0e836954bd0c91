"""Learning from the reward's own gradient, back through the denoising steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from condrl.algorithms import needs
from condrl.algorithms.base import Algorithm, Experience
from condrl.algorithms.examples import Examples, Metrics, per_chain, per_image
from condrl.algorithms.needs import Need, markov_steps, one_pass, reward_gradients
from condrl.config import TrainConfig
from condrl.diffusion.noise import Noise
from condrl.diffusion.policy import Policy
from condrl.diffusion.transition import Gaussian


@dataclass(frozen=True, kw_only=True)
class Scored(Examples):
    """Examples whose loss asks for the reward of other samples than were rolled out."""

    images: Tensor = per_image()  # their indices in the experience
    experience: Experience

    def score(self, samples: Tensor) -> Tensor:
        """The total reward (B,) of other samples (B, ...) for these images, with gradients."""
        return self.experience.score(samples, self.images)


@dataclass(frozen=True, kw_only=True)
class Chains(Scored):
    """An epoch's trajectories, each of which is one step of learning, from the first differentiated step of any on."""

    states: Tensor = per_chain()  # (n + 1, B, ...)
    first: Tensor = per_image()  # (B,) the step that each is differentiated from


@dataclass(kw_only=True)
class ChainGradient(Algorithm):
    """E r - kappa KL by differentiating the last steps of a chain and the reward (docs/theory.md 14).

    The gradient is taken along the visited states, as of a chain whose noise is held; an algorithm says how many steps.
    """

    kappa: float = 0.0  # reward per nat of path KL to the pretrained model

    @property
    def needs(self) -> tuple[Need, ...]:
        return (reward_gradients, markov_steps, one_pass, *((needs.noise,) if self.kappa > 0 else ()))

    def first_steps(self, policy: Policy, images: int, noise: Noise) -> Tensor:
        """The step that each image's chain is differentiated from, (images,)."""
        raise NotImplementedError

    def step_weights(self, policy: Policy) -> Tensor:
        """What the gradient in each step's own action is multiplied by, (K,)."""
        return torch.ones(policy.steps)

    def examples(self, policy: Policy, experience: Experience, train: TrainConfig, noise: Noise) -> Chains:
        r = experience.rollout
        first = self.first_steps(policy, len(r.condition), noise)
        return Chains(
            condition=r.condition,
            k=torch.zeros(1, dtype=torch.long),
            images=torch.arange(len(first)),
            experience=experience,
            states=r.states[int(first.min()) :],
            first=first,
        )

    def loss(self, policy: Policy, batch: Chains) -> tuple[Tensor, Metrics]:
        """-r + kappa KL of each image's differentiated steps, (B,)."""
        x, kl = batch.states[0], torch.zeros(len(batch.condition), device=batch.states.device)
        for k, visited in enumerate(batch.states[1:], policy.steps - len(batch.states) + 1):
            begun = (batch.first <= k).nonzero()[:, 0]
            if not len(begun):  # all are where the roll-out was
                x = visited
                continue
            rows, condition = begun.to(x.device), batch.condition[begun.to(batch.condition.device)]
            moved, cost = self._step(policy, k, x[rows], condition, visited[rows])
            x, kl = visited.index_copy(0, rows, moved), kl.index_add(0, rows, cost)
        reward = batch.score(policy.model.decode(x))
        return self.kappa * kl - reward, {"path_kl": kl.mean()} if self.kappa > 0 else {}

    def _step(self, policy: Policy, k: int, x: Tensor, condition: Tensor, visited: Tensor) -> tuple[Tensor, Tensor]:
        """The states after step k, the visited ones by the roll-out's own noise, and the KL of the step (B,)."""
        steps, weight = torch.full((len(x),), k), self.step_weights(policy)[k].item()
        transition = policy.transition(rescaled_gradient(x, 1 / weight), steps, condition)
        mean = rescaled_gradient(transition.mean, weight)  # of the action's own part alone: that of x is again 1
        kl = x.new_zeros(len(x))
        if self.kappa > 0 and policy.sampler.stochastic[k]:
            with policy.model.reference():
                kl = Gaussian(mean, transition.std).kl(policy.transition(x, steps, condition))
        return mean + (visited - mean).detach(), kl


def rescaled_gradient(x: Tensor, factor: float) -> Tensor:
    """x itself, with its gradient multiplied by a factor."""
    return x if factor == 1 else x.detach() + factor * (x - x.detach())
