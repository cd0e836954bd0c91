"""References that move: weights of earlier policies, which can stand in for the newest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from condrl.diffusion.policy import Policy, acting, trained_weights


class MovingReference:
    """average <- decay average + (1 - decay) weights after each update; at first it is the policy itself."""

    def __init__(self, policy: Policy, decay: float) -> None:
        self.decay = decay
        self.average = weights_of(policy)

    @torch.no_grad()
    def update(self, policy: Policy) -> None:
        """Move towards the policy's weights."""
        for average, weight in zip(self.average, trained_weights(policy.model.module), strict=True):
            average.lerp_(weight, 1 - self.decay)

    @contextmanager
    def active(self, policy: Policy) -> Iterator[None]:
        """Within it, the policy acts with the average of its weights."""
        with acting(trained_weights(policy.model.module), self.average):
            yield

    def state_dict(self) -> dict[str, Any]:
        return {"average": list(self.average)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises: ValueError when the weights are others."""
        check_like(state["average"], self.average)
        for average, value in zip(self.average, state["average"], strict=True):
            average.copy_(value)


class StagedReference:
    """The policy with which the stage began that a run is in; its stages are equal parts of its epochs."""

    def __init__(self, policy: Policy, stages: int) -> None:
        self.stages, self.epoch = stages, 0
        self.weights = weights_of(policy)

    def begin_epoch(self, policy: Policy, epochs: int) -> None:
        """Count an epoch of so many, and take the policy's weights if a stage begins with it."""
        if self.epoch * self.stages // epochs != (self.epoch - 1) * self.stages // epochs:
            self.weights = weights_of(policy)
        self.epoch += 1

    def active(self, policy: Policy) -> AbstractContextManager[None]:
        """Within it, the policy acts with the weights that the stage began with."""
        return acting(trained_weights(policy.model.module), self.weights)

    def state_dict(self) -> dict[str, Any]:
        return {"anchor": list(self.weights), "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises: ValueError when the weights are others."""
        check_like(state["anchor"], self.weights)
        self.weights, self.epoch = [value.clone() for value in state["anchor"]], int(state["epoch"])


def weights_of(policy: Policy) -> list[Tensor]:
    """A copy of what is trained of a policy's network."""
    return [weight.detach().clone() for weight in trained_weights(policy.model.module)]


def check_like(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Raises: ValueError when weights do not have the shapes that are expected."""
    if [value.shape for value in found] != [value.shape for value in expected]:
        raise ValueError("these are other weights")
