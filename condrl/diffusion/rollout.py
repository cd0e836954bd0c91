"""Run the chain of a policy and keep what learning needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from condrl.diffusion.noise import Noise, Source, randn
from condrl.diffusion.policy import Policy
from condrl.diffusion.transition import Transition
from condrl.errors import UsageError


@dataclass(frozen=True)
class Rollout:
    """B trajectories of K steps."""

    states: Tensor  # (K + 1, B, ...) float32: x_0 is noise, x_K the sample
    log_probs: Tensor  # (K, B) float64, nats; nan where the step is deterministic
    condition: Tensor  # (B,) the prompts' numbers, as the model counts them
    solver_states: Tensor | None = None  # (K, B, ...) what a multi-step sampler carried into each step

    @property
    def samples(self) -> Tensor:
        return self.states[-1]

    def first(self, count: int) -> Rollout:
        """The first so many of them."""
        solver_states = None if self.solver_states is None else self.solver_states[:, :count]
        return Rollout(self.states[:, :count], self.log_probs[:, :count], self.condition[:count], solver_states)


def chain(policy: Policy, condition: Tensor, noise: Source) -> Iterator[tuple[Tensor, Transition | None]]:
    """Yield x_0 with no distribution, then each next state with the distribution it was drawn from."""
    x = randn((len(condition), *policy.model.state_shape), noise, policy.model.device)
    x = x * policy.model.schedule.prior_std
    yield x, None
    yield from continued(policy, x, 0, condition, noise)


def continued(
    policy: Policy, x: Tensor, first: int, condition: Tensor, noise: Source, solver_state: Tensor | None = None
) -> Iterator[tuple[Tensor, Transition]]:
    """Yield the states after step `first` and later ones, from x (B, ...) before it, with their distributions.

    A multi-step sampler goes on from what it carried into that step (B, ...), as a roll-out's `solver_states` has it.

    Raises: UsageError when that is missing.
    """
    if first > 0 and solver_state is None and getattr(policy.sampler, "has_solver_state", False):
        raise UsageError(
            f"a chain of this sampler cannot be entered at step {first} without the memory of step {first - 1}"
        )
    for k in range(first, policy.steps):
        transition = policy.transition(x, torch.full((len(condition),), k), condition, solver_state)
        solver_state = transition.solver_state
        drawn = policy.sampler.stochastic[k]
        x = transition.sample(randn(tuple(x.shape), noise, x.device)) if drawn else transition.mean
        yield x, transition


@torch.no_grad()
def rollout(policy: Policy, condition: Tensor, noise: Noise | torch.Generator, batch: int) -> Rollout:
    """Trajectories for conditions (B,), `batch` at a time."""
    model, count = policy.model, len(condition)
    states = torch.empty((policy.steps + 1, count, *model.state_shape), device=model.device)
    log_probs = torch.full((policy.steps, count), torch.nan, dtype=torch.float64, device=model.device)
    solver_states = None
    with model.merged():
        for start in range(0, count, batch):
            rows = slice(start, start + batch)
            part = noise[rows] if isinstance(noise, Noise) else noise
            for k, (x, transition) in enumerate(chain(policy, condition[rows], part)):
                states[k, rows] = x
                if transition is not None and policy.sampler.stochastic[k - 1]:
                    log_probs[k - 1, rows] = transition.log_prob(x)
                if transition is not None and transition.solver_state is not None and k < policy.steps:
                    solver_states = torch.zeros_like(states[1:]) if solver_states is None else solver_states
                    solver_states[k, rows] = transition.solver_state
    return Rollout(states, log_probs, condition, solver_states)


@torch.no_grad()
def sample(policy: Policy, condition: Tensor, generators: list[torch.Generator], batch: int) -> Tensor:
    """Final states (B, ...) only, image i drawn by generator i: the same whatever the batch."""
    final = []
    with policy.model.merged():
        for start in range(0, len(condition), batch):
            rows = slice(start, start + batch)
            for state, _ in chain(policy, condition[rows], generators[rows]):
                x = state
            final.append(x)
    return torch.cat(final)
