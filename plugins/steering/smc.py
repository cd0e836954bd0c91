"""Sequential Monte Carlo: particles that promise more reward are copied on the way, others are dropped."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

import condrl
from condrl.diffusion.rollout import advance, start
from condrl.diffusion.steering import Draws


@condrl.steering
def smc(
    draws: Draws,
    *,
    particles: int = 8,  # chains of each image
    kappa: float = 1.0,  # the target is p exp(r / kappa), p the policy's own distribution
    potential: Literal["difference", "max", "sum"] = "difference",  # what of the predictions' rewards a step weighs by
    resample_below: float = 0.5,  # when the effective number of particles falls below this share of them
) -> Tensor:
    """Feynman-Kac steering by the rewards of denoised predictions (Singhal et al. 2025; docs/theory.md 19).

    A step is one network call for each particle: the prediction that its transition was made of is scored. The weights
    amount to r(x_K) / kappa, so as the number of particles grows the result is exact, whatever the predictions say.
    """
    if particles < 1 or kappa <= 0 or not 0 <= resample_below <= 1:
        raise condrl.UsageError(
            "steering smc: particles must be at least 1, kappa above 0, and resample_below in [0, 1], got "
            f"{particles}, {kappa:g} and {resample_below:g}"
        )
    policy, (images, condition, generators) = draws.policy, draws.repeated(particles)
    if particles > 1 and not policy.sampler.stochastic.any():
        raise condrl.UsageError("steering smc: the sampler has no noise, so copies would stay alike: set sampler.eta=1")
    place = start(policy, len(images), generators)
    log_weights = torch.zeros(len(draws.condition), particles)
    first, weigh = POTENTIALS[potential]
    running = torch.full_like(log_weights, first)
    weighed = torch.zeros_like(log_weights)  # what a particle's path was weighed by so far, times kappa
    while place.k < policy.steps:
        transition, place = advance(policy, place, condition, generators)
        found = draws.score(transition.denoised, images).view_as(log_weights).cpu()
        running, gain = weigh(running, found)
        log_weights, weighed = log_weights + gain / kappa, weighed + gain
        chosen, log_weights = resampled(log_weights, resample_below, draws.generators)
        running, weighed = running.gather(1, chosen), weighed.gather(1, chosen)
        place = place[(chosen + particles * torch.arange(len(chosen))[:, None]).flatten()]
    found = draws.score(place.x, images).view_as(log_weights).cpu()
    weights = (log_weights + (found - weighed) / kappa).softmax(1)
    last = torch.stack([torch.multinomial(w, 1, generator=g) for w, g in zip(weights, draws.generators, strict=True)])
    return place.x[last[:, 0] + particles * torch.arange(len(last))]


def difference(last: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """What is promised, and how much more than before."""
    return found, found - last


def maximum(most: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """The most that was promised so far, twice."""
    most = torch.maximum(most, found)
    return most, most


def accumulated(total: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of all that was promised so far, twice."""
    return total + found, total + found


Weigh = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (state, reward) -> (state, log-weight of the step * kappa)
POTENTIALS: dict[str, tuple[float, Weigh]] = {  # with the state before the first step
    "difference": (0.0, difference),
    "max": (-torch.inf, maximum),
    "sum": (0.0, accumulated),
}


def resampled(log_weights: Tensor, least: float, generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
    """The particles that continue, (B, n), and their log-weights: systematically redrawn where too few count."""
    count = log_weights.shape[1]
    weights, every = log_weights.softmax(1), torch.arange(count)
    few = 1 / weights.square().sum(1) < least * count
    offsets = torch.zeros(len(few), 1)
    for i in few.nonzero().flatten().tolist():
        offsets[i] = torch.rand(1, generator=generators[i])
    points = (offsets + every) / count
    redrawn = torch.searchsorted(weights.cumsum(1), points).clamp(max=count - 1)
    even = log_weights.logsumexp(1, keepdim=True).expand_as(log_weights) - torch.tensor(count).log()
    return redrawn.where(few[:, None], every), even.where(few[:, None], log_weights)
