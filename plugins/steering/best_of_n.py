"""Best of n: draw several images and keep the one with the highest reward."""

import torch
from torch import Tensor

import condrl
from condrl.diffusion.rollout import sample
from condrl.diffusion.steering import Draws


@condrl.steering
def best_of_n(
    draws: Draws,
    *,
    n: int = 4,  # images drawn for each that is kept
) -> Tensor:
    """The best of n samples, whose KL to the policy's distribution is at most log n - (n - 1) / n nats."""
    if n < 1:
        raise condrl.UsageError(f"steering best_of_n: n must be at least 1, got {n}")
    images, condition, generators = draws.repeated(n)
    states = sample(draws.policy, condition, generators, len(condition))
    best = draws.score(states, images).view(-1, n).argmax(1)
    return states[torch.arange(len(best)) * n + best.cpu()]
