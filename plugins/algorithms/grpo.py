"""GRPO on denoising steps (Shao et al. 2024; Liu et al. 2025, Flow-GRPO)."""

from dataclasses import dataclass

from torch import Tensor

import condrl
from condrl.algorithms import Metrics, PolicyGradient, Steps, clipped
from condrl.policy import Policy
from condrl.transition import Transition


@condrl.algorithm
@dataclass(kw_only=True)
class GRPO(PolicyGradient):
    """Group-relative advantages, one bound for every step's ratio, an exact KL (Liu et al. 2025; THEORY 7.4, 7.5).

    For MixGRPO's window of noisy steps set sampler.noise_steps.
    """

    clip_range: float = 0.2  # bound on |ratio - 1| of a step

    def surrogate(self, policy: Policy, law: Transition, batch: Steps) -> tuple[Tensor, Metrics]:
        return clipped(law.log_prob(batch.next_x) - batch.old_log_prob, batch.advantage, self.clip_range)
