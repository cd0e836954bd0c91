"""GRPO on denoising steps (Shao et al. 2024; Liu et al. 2025, Flow-GRPO)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import condrl
from condrl.algorithms.credit import group_advantages
from condrl.algorithms.examples import Metrics
from condrl.algorithms.policy_gradient import MAX_LOG_RATIO, ClippedPolicyGradient, Steps, clipped
from condrl.diffusion.policy import Policy
from condrl.diffusion.transition import Transition


@condrl.algorithm
@dataclass(kw_only=True)
class GRPO(ClippedPolicyGradient):
    """Group-relative advantages and clipped weights with Flow-GRPO's defaults (Liu et al. 2025; docs/theory.md 10).

    As published, means over the D dimensions take the place of other algorithms' sums: the clip range bounds the ratio
    per dimension, exp(log w / D). The gradient is that of the sum, so kappa keeps its unit. For MixGRPO's moving window
    of noisy steps set train.window (Li et al. 2025; docs/theory.md 3).
    """

    clip_range: float = 1e-4  # bound on |ratio per dimension - 1|, the same for every step
    global_std: bool = True  # divide by the standard deviation of all rewards of the epoch, not of a prompt's

    def scale(self, rewards: Tensor, groups: Tensor) -> Tensor:
        if not self.global_std:
            return super().scale(rewards, groups)
        std = rewards.std(correction=0)
        return torch.zeros_like(rewards).where(std < 1e-6, 1 / (std + 1e-4))

    def advantages(self, rewards: Tensor, groups: Tensor) -> Tensor:
        if not self.normalise:
            return super().advantages(rewards, groups)
        centred = group_advantages(rewards, groups, False, bool(self.leave_one_out))
        return self.bounded(centred * self.scale(rewards, groups))

    def surrogate(self, policy: Policy, transition: Transition, batch: Steps) -> tuple[Tensor, Metrics]:
        dimensions = batch.next_x[0].numel()
        log_ratio = transition.log_prob(batch.next_x) - batch.old_log_prob
        loss, metrics = clipped(log_ratio / dimensions, batch.advantage, self.clip_range)
        with torch.no_grad():
            gained = torch.expm1(log_ratio.clamp(max=MAX_LOG_RATIO))
            metrics["approx_kl"] = (gained - log_ratio).float().mean()  # nats per step
        return dimensions * loss, metrics
