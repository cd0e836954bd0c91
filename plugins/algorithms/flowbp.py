"""FlowBP-Sparse: the reward's gradient at the real sample, sent to a few steps by the sampler's numbers alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import condrl
from condrl.algorithms.base import Algorithm, Experience
from condrl.algorithms.examples import Examples, Metrics, per_step
from condrl.algorithms.needs import Need, affine_steps, one_pass, reward_gradients
from condrl.config import TrainConfig
from condrl.diffusion.noise import Noise
from condrl.diffusion.policy import Policy
from condrl.diffusion.transition import Coefficients


@dataclass(frozen=True, kw_only=True)
class ActiveSteps(Examples):
    """The steps of each image that are differentiated; a step of learning is one of them."""

    x: Tensor = per_step()
    step: Tensor = per_step()  # (n, B)
    pull: Tensor = per_step()  # what a step's mean should follow to raise the reward of the sample


@condrl.algorithm(name="flowbp")
@dataclass(kw_only=True)
class FlowBP(Algorithm):
    """Maximises E r by a few steps, without the network's Jacobians between them (Wang et al. 2026; docs/theory.md 14).

    Later steps are taken to keep their velocities: the rest of the path is then a sum, and so is the gradient. A step
    is as cheap as one of a policy gradient, at any length of chain. A step's credit is biased, so there is no kappa.
    """

    active: int = 3  # steps that are differentiated for each image

    def __post_init__(self) -> None:
        self.require_positive("active")

    @property
    def needs(self) -> tuple[Need, ...]:
        return (reward_gradients, affine_steps, one_pass)

    def examples(self, policy: Policy, experience: Experience, train: TrainConfig, noise: Noise) -> ActiveSteps:
        r, sampler, images = experience.rollout, policy.sampler.affine, torch.arange(len(experience.rollout.condition))
        assert sampler is not None  # affine_steps
        step = noise.uniform((policy.steps,)).argsort(1)[:, : self.active].T
        carried = remaining_gain(sampler).to(r.states)[step]
        parts = images.split(min(train.rollout_batch, train.loss_batch))
        gradient = torch.cat([self._gradient(policy, experience, part) for part in parts])
        return ActiveSteps(
            condition=r.condition,
            k=torch.arange(len(step)),
            x=r.states[step, images],
            step=step,
            pull=carried.view(*step.shape, *[1] * (gradient.dim() - 1)) * gradient,
        )

    def _gradient(self, policy: Policy, experience: Experience, images: Tensor) -> Tensor:
        """Of the reward at the samples of some images, (b, ...)."""
        x = experience.rollout.samples[images].requires_grad_()
        return torch.autograd.grad(experience.score(policy.model.decode(x), images).sum(), x)[0]

    def loss(self, policy: Policy, batch: ActiveSteps) -> tuple[Tensor, Metrics]:
        """-<pull, mean> of each step, (B,), as of all K steps where the n active ones stand for them."""
        mean = policy.transition(batch.x, batch.step, batch.condition).mean
        share = min(self.active, policy.steps) / policy.steps
        return -(batch.pull * mean).flatten(1).sum(1) / share, {}


def remaining_gain(sampler: Coefficients) -> Tensor:
    """What the steps after k multiply a state by while they keep their velocities, (K,).

    The velocity is eps - x0, of the straight path of x / (alpha + sigma) that every forward process has.
    """
    alpha, sigma = sampler.schedule.alpha(sampler.times[:-1]), sampler.schedule.sigma(sampler.times[:-1])
    gain = sampler.A - sampler.B / (sigma * (alpha + sigma))
    return torch.cat([gain[1:], gain.new_ones(1)]).flip(0).cumprod(0).flip(0)
