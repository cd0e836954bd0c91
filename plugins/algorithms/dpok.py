"""DPOK: policy gradient with a KL to the pretrained chain (Fan et al. 2023)."""

from dataclasses import dataclass

import torch
from torch import Tensor

import condrl
from condrl.algorithms.policy_gradient import ClippedPolicyGradient
from condrl.diffusion.path_kl import PathKL


@condrl.algorithm
@dataclass(kw_only=True)
class DPOK(ClippedPolicyGradient):
    """E r - kappa KL with importance weights; kappa is their beta / alpha (Fan et al. 2023; docs/theory.md 8)."""

    kappa: float = 0.1  # reward per nat of path KL to the pretrained model
    normalise: bool = False  # divide by the standard deviation of the rewards of a prompt's images
    truncated: bool = False  # as published: without the KL of later steps in a step's return, which is biased

    def kl_to_go(self, base: PathKL) -> Tensor:
        return torch.zeros_like(base.kl) if self.truncated else base.to_go
