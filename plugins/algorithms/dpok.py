"""DPOK: policy gradient with a KL to the pretrained chain (Fan et al. 2023)."""

from dataclasses import dataclass

import torch
from torch import Tensor

import condrl
from condrl.algorithms import Metrics, PathKL, PolicyGradient, Steps, clipped
from condrl.policy import Policy
from condrl.transition import Transition


@condrl.algorithm
@dataclass(kw_only=True)
class DPOK(PolicyGradient):
    """E r - kappa KL with importance weights; kappa is their beta / alpha (Fan et al. 2023; THEORY 4.4)."""

    kappa: float = 0.1  # reward per nat of path KL to the pretrained model
    normalise: bool = False  # divide by the standard deviation of the rewards of a prompt's images
    clip_range: float = 0.2  # bound on |ratio - 1| of a step
    truncated: bool = False  # as published: without the KL of later steps in a step's return, which is biased

    def kl_to_go(self, base: PathKL) -> Tensor:
        return torch.zeros_like(base.kl) if self.truncated else base.to_go

    def surrogate(self, policy: Policy, law: Transition, batch: Steps) -> tuple[Tensor, Metrics]:
        return clipped(law.log_prob(batch.next_x) - batch.old_log_prob, batch.advantage, self.clip_range)
