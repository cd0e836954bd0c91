"""GRPO on denoising steps (Shao et al. 2024; Liu et al. 2025, Flow-GRPO)."""

from dataclasses import dataclass

import condrl
from condrl.algorithms import ClippedPolicyGradient


@condrl.algorithm
@dataclass(kw_only=True)
class GRPO(ClippedPolicyGradient):
    """Group-relative advantages, clipped weights, an exact KL (Liu et al. 2025; THEORY 7.4).

    For MixGRPO's window of noisy steps set sampler.noise_steps (Li et al. 2025; THEORY 7.5).
    """
