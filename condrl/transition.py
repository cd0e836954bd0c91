"""The affine Gaussian step x' ~ N(A x + B a, S^2 I): its mean, sample, log-probability and KL divergence.

An action `a` is a score. A sampler is the three numbers (A, B, S) of every step; whatever is learned, measured or
differentiated follows from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from condrl.config import TrainConfig
from condrl.errors import UsageError

Act = Callable[[Tensor, Tensor], Tensor]  # (x, t) -> score


@dataclass(frozen=True)
class Transition:
    """The law N(mean, std^2 I) of the next state; mean (B, ...), std broadcastable to it."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean + self.std * noise

    def log_prob(self, x: Tensor) -> Tensor:
        """log N(x; mean, std^2 I) in nats, summed over dimensions in float64, (B,).

        The ratio of two such sums is near 1 while each sum is thousands of nats: float32 would round it away.
        """
        z = (x - self.mean) / self.std
        constant = self.std.log() + 0.5 * math.log(2 * math.pi)
        return -(0.5 * z.square() + constant).flatten(1).sum(1, dtype=torch.float64)

    def kl(self, other: Transition) -> Tensor:
        """KL(self || other) in nats, summed over dimensions, (B,)."""
        ratio = self.std / other.std
        shift = (self.mean - other.mean) / other.std
        return (0.5 * (ratio.square() + shift.square() - 1) - ratio.log()).expand_as(shift).flatten(1).sum(1)


class Sampler(Protocol):
    """What a sampler plugin returns: times (K + 1,) and the law of each of its K steps."""

    @property
    def times(self) -> Tensor: ...

    @property
    def stochastic(self) -> Tensor:
        """(K,) bool: the steps that have a log-probability."""
        ...

    def step(self, k: Tensor, x: Tensor, act: Act) -> Transition:
        """The law of the state after step k (B,) from x (B, ...), calling `act` for scores."""
        ...


@dataclass(frozen=True)
class Coefficients:
    """A one-stage sampler: x_{k+1} ~ N(A_k x_k + B_k a_k, S_k^2 I), a_k the score at (x_k, times[k])."""

    times: Tensor  # (K + 1,) float64
    A: Tensor  # (K,)
    B: Tensor  # (K,)
    S: Tensor  # (K,)

    @property
    def stochastic(self) -> Tensor:
        return self.S > 0

    def step(self, k: Tensor, x: Tensor, act: Act) -> Transition:
        action = act(x, self.times[k])
        shape = (-1, *[1] * (x.dim() - 1))
        A, B, S = (c[k].to(x.device, x.dtype).reshape(shape) for c in (self.A, self.B, self.S))
        return Transition(A * x + B * action, S)


def trained_steps(sampler: Sampler, train: TrainConfig) -> Tensor:
    """The steps that have a log-probability and that the config trains.

    Raises: UsageError when the config names another step, or wants more per image than there are.
    """
    stochastic = sampler.stochastic.nonzero().flatten().tolist()
    chosen = stochastic if train.steps is None else train.steps
    wrong = sorted(set(chosen) - set(stochastic))
    if wrong or not chosen:
        raise UsageError(f"config train.steps: {wrong or chosen} are not among the steps with noise, {stochastic}")
    if train.steps_per_image is not None and not 1 <= train.steps_per_image <= len(chosen):
        raise UsageError(f"config train.steps_per_image: {train.steps_per_image} of the {len(chosen)} trained steps")
    return torch.tensor(sorted(set(chosen)))


def randn(shape: tuple[int, ...], generator: torch.Generator | list[torch.Generator], device: torch.device) -> Tensor:
    """Standard normal noise (B, ...), drawn on the CPU so that a seed gives the same noise on every device.

    With a list, row i is drawn by generator i alone, so it does not depend on its batch.
    """
    if isinstance(generator, list):
        return torch.cat([torch.randn((1, *shape[1:]), generator=g) for g in generator]).to(device)
    return torch.randn(shape, generator=generator).to(device)
