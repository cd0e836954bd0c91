"""A policy: a model that acts with its score, and the sampler that turns actions into transitions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from condrl.diffusion.model import Model
from condrl.diffusion.transition import Sampler, Transition


def trained_weights(module: nn.Module) -> list[nn.Parameter]:
    """The weights of a network that are trained, in their order."""
    return [weight for weight in module.parameters() if weight.requires_grad]


@contextmanager
def acting(weights: Sequence[Tensor], others: Sequence[Tensor]) -> Iterator[None]:
    """Within it, weights hold the values of others of the same shapes: an average or an old policy acts, uncopied."""
    own = [weight.data for weight in weights]
    try:
        for weight, other in zip(weights, others, strict=True):
            weight.data = other
        yield
    finally:
        for weight, data in zip(weights, own, strict=True):
            weight.data = data


class Policy:
    """The Markov chain that a model and a sampler make; roll-outs and losses both call `transition`."""

    def __init__(self, model: Model, sampler: Sampler, rollout_dtype: torch.dtype | None = None) -> None:
        self.model, self.sampler, self.rollout_dtype = model, sampler, rollout_dtype
        self.steps = len(sampler.times) - 1

    @contextmanager
    def rolling_out(self) -> Iterator[None]:
        """Within it, without gradients, the network computes as roll-outs do: faster, and rounded if they are."""
        rounded, device = self.rollout_dtype is not None, self.model.device.type
        with self.model.merged(), torch.autocast(device, self.rollout_dtype, enabled=rounded):
            yield

    def step(
        self, x: Tensor, k: Tensor, condition: Tensor, solver_state: Tensor | None
    ) -> tuple[Transition, Tensor | None]:
        """The distribution of the state after step k (B,) from x (B, ...), and the solver state of the next step."""
        return self.sampler.step(k, x, lambda y, t: self.model.score(y, t, condition), solver_state)

    def transition(self, x: Tensor, k: Tensor, condition: Tensor, solver_state: Tensor | None = None) -> Transition:
        """The distribution of the state after step k (B,) from x (B, ...)."""
        return self.step(x, k, condition, solver_state)[0]

    def action(self, x: Tensor, k: Tensor, condition: Tensor) -> Tensor:
        """The score at x (B, ...) and the beginning of step k (B,)."""
        return self.model.score(x, self.sampler.times[k], condition)
