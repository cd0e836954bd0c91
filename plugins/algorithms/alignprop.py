"""AlignProp: as DRaFT, through a random number of the last steps (Prabhudesai et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import condrl
from condrl.algorithms.reward_gradient import ChainGradient
from condrl.diffusion.noise import Noise
from condrl.diffusion.policy import Policy


@condrl.algorithm(name="alignprop")
@dataclass(kw_only=True)
class AlignProp(ChainGradient):
    """Maximises E r - kappa KL through the last steps, as many as are drawn for each image (docs/theory.md 14).

    The number is uniform, and drawn once for a trajectory. A step is differentiated less often the earlier it is; with
    `balance_steps` it counts as much more, and through up to all steps the gradient is that of E r - kappa KL.
    """

    shortest: int = 1  # least number of steps to differentiate, counted from the end
    longest: int | None = None  # greatest number of them; null: all
    balance_steps: bool = True  # weigh each step by 1 / the chance that it is differentiated; false: as published

    calls_evenly = False  # each image's number of steps is drawn

    def __post_init__(self) -> None:
        self.require_at_least(0, "kappa")
        self.require_at_least(1, "shortest")
        if self.longest is not None:
            self.require_at_least(self.shortest, "longest")

    def first_steps(self, policy: Policy, images: int, noise: Noise) -> Tensor:
        least, most = self._range(policy)
        return policy.steps - least - (noise.uniform(()) * (most - least + 1)).long()

    def step_weights(self, policy: Policy) -> Tensor:
        least, most = self._range(policy)
        needed = policy.steps - torch.arange(policy.steps)  # a step is differentiated where at least so many are
        chance = ((most - needed + 1) / (most - least + 1)).clamp(0, 1)
        return 1 / chance if self.balance_steps else torch.ones(policy.steps)

    def _range(self, policy: Policy) -> tuple[int, int]:
        """The least and the greatest number of steps, of those that there are."""
        return min(self.shortest, policy.steps), min(self.longest or policy.steps, policy.steps)
