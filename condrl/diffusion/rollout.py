"""Run the chain of a policy and keep what learning needs."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from condrl.diffusion.noise import Noise, Source, randn, start_noise
from condrl.diffusion.policy import Policy
from condrl.diffusion.transition import Transition


@dataclass(frozen=True)
class Place:
    """Where B chains are."""

    x: Tensor  # (B, ...)
    k: int  # the step that comes next; K at the end
    solver_state: Tensor | None  # (B, ...) before it, of a sampler that has one

    def __getitem__(self, rows: Tensor) -> Place:
        """The chains of some rows, which may repeat, as resampling needs."""
        return Place(self.x[rows], self.k, None if self.solver_state is None else self.solver_state[rows])


@dataclass(frozen=True)
class Rollout:
    """B trajectories of K steps."""

    states: Tensor  # (K + 1, B, ...) float32: x_0 is noise, x_K the sample
    log_probs: Tensor  # (K, B) float64, nats; nan where the step is deterministic
    condition: Tensor  # (B,) the prompts' numbers, as the model counts them
    solver_states: Tensor | None = None  # (K, B, ...) before each step; None if steps depend on the state alone

    @property
    def samples(self) -> Tensor:
        return self.states[-1]

    def place(self, k: int, images: Tensor) -> Place:
        """Where some images (n,) were before step k."""
        solver_state = None if self.solver_states is None else self.solver_states[k, images]
        return Place(self.states[k, images], k, solver_state)

    def first(self, count: int) -> Rollout:
        """The first `count` of them."""
        solver_states = None if self.solver_states is None else self.solver_states[:, :count]
        return Rollout(self.states[:, :count], self.log_probs[:, :count], self.condition[:count], solver_states)


def start(policy: Policy, count: int, noise: Source) -> Place:
    """The beginning of `count` chains: noise."""
    x = start_noise((count, *policy.model.state_shape), noise, policy.model.device) * policy.model.schedule.prior_std
    return Place(x, 0, policy.sampler.init(x))


def advance(policy: Policy, place: Place, condition: Tensor, noise: Source) -> tuple[Transition, Place]:
    """Take the next step of chains with conditions (B,): its distribution, and where they are after it."""
    k = torch.full((len(condition),), place.k)
    transition, solver_state = policy.step(place.x, k, condition, place.solver_state)
    x = transition.mean
    if policy.sampler.stochastic[place.k]:
        x = transition.sample(randn(tuple(x.shape), noise, x.device))
    return transition, Place(x, place.k + 1, solver_state)


@torch.no_grad()
def rollout(
    policy: Policy, condition: Tensor, noise: Noise | torch.Generator, batch: int, graph_of: Collection[int] = ()
) -> Rollout:
    """Trajectories for conditions (B,), `batch` at a time.

    The log-probabilities of the steps `graph_of` keep their graph.
    """
    model, count = policy.model, len(condition)
    states = torch.empty((policy.steps + 1, count, *model.state_shape), device=model.device)
    log_probs = torch.full((policy.steps, count), torch.nan, dtype=torch.float64, device=model.device)
    solver_states = None if policy.sampler.is_markov else torch.empty_like(states[1:])
    with nullcontext() if graph_of else policy.rolling_out():  # a merged LoRA has no gradient
        for first in range(0, count, batch):
            rows = slice(first, first + batch)
            part = noise[rows] if isinstance(noise, Noise) else noise
            place = start(policy, len(condition[rows]), part)
            states[0, rows] = place.x
            while place.k < policy.steps:
                k, solver_state = place.k, place.solver_state
                with torch.set_grad_enabled(k in graph_of):
                    transition, after = advance(policy, place, condition[rows], part)
                    place = replace(after, x=after.x.detach())
                    if policy.sampler.stochastic[k]:
                        log_probs[k, rows] = transition.log_prob(place.x)
                states[place.k, rows] = place.x
                if solver_states is not None and solver_state is not None:
                    solver_states[k, rows] = solver_state
    return Rollout(states, log_probs, condition, solver_states)


@torch.no_grad()
def sample(policy: Policy, condition: Tensor, generators: list[torch.Generator], batch: int) -> Tensor:
    """Final states (B, ...) only, image i drawn by generator i: the same whatever the batch."""
    final = []
    with policy.model.merged():
        for first in range(0, len(condition), batch):
            rows = slice(first, first + batch)
            place = start(policy, len(condition[rows]), generators[rows])
            while place.k < policy.steps:
                _, place = advance(policy, place, condition[rows], generators[rows])
            final.append(place.x)
    return torch.cat(final)
