"""DRaFT: the reward's own gradient, back through the denoising steps (Clark et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import condrl
from condrl.algorithms.reward_gradient import ChainGradient
from condrl.diffusion.noise import Noise
from condrl.diffusion.policy import Policy


@condrl.algorithm(name="draft")
@dataclass(kw_only=True)
class DRaFT(ChainGradient):
    """Maximises E r - kappa KL by differentiating the chain and the reward (Clark et al. 2024; docs/theory.md 14).

    With `last` steps only, the earlier ones are taken as given: cheaper, and biased.
    """

    last: int | None = None  # steps to differentiate, counted from the end; null: all

    def __post_init__(self) -> None:
        self.require_at_least(0, "kappa")
        if self.last is not None:
            self.require_at_least(1, "last")

    def first_steps(self, policy: Policy, images: int, noise: Noise) -> Tensor:
        return torch.full((images,), max(0, policy.steps - (self.last or policy.steps)))
