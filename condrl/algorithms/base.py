"""What an algorithm is given, and what it provides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from condrl.algorithms.examples import Examples, Metrics
from condrl.algorithms.needs import Need
from condrl.config import TrainConfig
from condrl.diffusion.noise import Noise
from condrl.diffusion.policy import Policy
from condrl.diffusion.rollout import Rollout, rollout
from condrl.errors import UsageError
from condrl.processes import Processes
from condrl.prompts import Row
from condrl.rewards.scoring import Scores


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What an epoch learns from; B rows are this process's share of all. Offline algorithms add fields of their own."""

    rows: list[Row]
    processes: Processes
    indices: range  # of these rows among those of all processes
    total: int  # how many there are
    scored: Tensor  # (total,) bool: which of those can be learned from

    @property
    def groups(self) -> Tensor:
        """(B,) the prompt row of each image."""
        return torch.tensor([row.index for row in self.rows], device=self.scored.device)

    def gather(self, x: Tensor) -> Tensor:
        """Values (..., total) of all processes' images from those of these (..., B)."""
        return self.processes.gather(x, self.indices, self.total)


@dataclass(frozen=True, kw_only=True)
class Experience(Collected):
    """An epoch's trajectories with their scores; `scored` says which images have one."""

    rollout: Rollout
    scores: Scores
    preview: Tensor  # (P, ...) the first sample of the first prompts
    score: Callable[[Tensor, Tensor], Tensor]  # the total reward (b,) of samples (b, ...) for the images (b,)'s rows

    def credit(self, f: Callable[[Tensor, Tensor], Tensor], values: Tensor) -> Tensor:
        """f(values, groups) of all processes' images that have a score, (..., B) of these; 0 for those that do not."""
        whole, scored = self.gather(values), self.scored
        found = torch.zeros_like(whole)
        found[..., scored] = f(whole[..., scored], self.gather(self.groups)[scored])
        return found[..., self.indices.start : self.indices.stop]


@dataclass(frozen=True)
class Context:
    """What an epoch is collected with."""

    policy: Policy
    train: TrainConfig
    noise: Noise
    processes: Processes
    indices: range  # of this process's rows among those of all
    total: int  # how many there are
    score: Callable[[Rollout, list[Row]], Experience]  # decodes the samples of trajectories and scores them


@dataclass(frozen=True)
class OwnNetwork:
    """A network that an algorithm trains beside the policy."""

    module: nn.Module
    lr: float  # AdamW learning rate
    betas: tuple[float, float] | None = None  # AdamW moments; None: those of the policy
    weight_decay: float | None = None  # AdamW weight decay; None: that of the policy
    extra_steps: int = 0  # optimiser steps of its own after each update, by `Algorithm.own_loss`
    is_kept: bool = False  # whether a run leaves it in the folder of its name, for drawing with it


class Algorithm:
    """The base of algorithm plugins, which are dataclasses whose fields are options; what they leave out is as here."""

    kappa: float | None = None  # reward per nat of path KL to the pretrained model; None where there is no such option
    off_policy = False  # whether what it rolls out is not the policy's own
    trains_policy = True  # whether it changes the policy, and not its own networks alone
    depends_on_epochs = False  # whether what an epoch does depends on how many the run has
    uses_rewards = True  # whether a run needs rewards
    keep_graph = False  # whether the graphs of an epoch's roll-out are held until its rewards are known
    calls_evenly = True  # whether as many images in a process take as many calls of the network in another

    def require_positive(self, *options: str) -> None:
        """Raises: UsageError on an option that is 0 or less."""
        for name in options:
            if getattr(self, name) <= 0:
                raise UsageError(f"config algorithm.{name}: must be positive, got {getattr(self, name)}")

    def require_at_least(self, least: int, *options: str) -> None:
        """Raises: UsageError on an option that is less."""
        for name in options:
            if getattr(self, name) < least:
                raise UsageError(f"config algorithm.{name}: must be at least {least}, got {getattr(self, name)}")

    @property
    def needs(self) -> tuple[Need, ...]:
        """What it cannot do without (condrl.algorithms.needs, or functions of its own)."""
        return ()

    def setup(self, policy: Policy) -> None:
        """Make what depends on the policy."""

    def check_rows(self, policy: Policy, rows: Sequence[Row]) -> None:
        """Raises: UsageError naming a prompt row without what it needs."""

    def measures(self, policy: Policy, rows: Sequence[Row], name: str, train: TrainConfig) -> dict[str, Tensor]:
        """What it measures of each row (P,) of prompts.<name> beside `evaluate.measures`, before tuning and after.

        Raises: UsageError naming a row without what it needs.
        """
        return {}

    def networks(self) -> dict[str, OwnNetwork]:
        """Networks of its own that are trained with the policy, by name."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What else it remembers from epoch to epoch: dicts and lists of tensors and JSON values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""

    def collect(self, context: Context, rows: list[Row]) -> Collected:
        """What an epoch learns from: trajectories for the prompts of rows (B), with their scores.

        An offline algorithm reads its data from the rows instead.
        """
        condition = context.policy.model.encode([row.prompt for row in rows])
        trajectories = self.rollout(context.policy, condition, context.noise, context.train.rollout_batch)
        return context.score(trajectories, rows)

    def rollout(self, policy: Policy, condition: Tensor, noise: Noise, batch: int) -> Rollout:
        """Trajectories for conditions (B,), `batch` at a time."""
        return rollout(policy, condition, noise, batch)

    def examples(self, policy: Policy, experience: Any, train: TrainConfig, noise: Noise) -> Examples:
        """What `loss` is given pairs of, with the credit of each image or step; `experience` is from `collect`."""
        raise NotImplementedError

    def loss(self, policy: Policy, batch: Any) -> tuple[Tensor, Metrics]:
        """The loss of each of B pairs (B,), and what to log: numbers, or values (B,); `batch` is from `Examples.at`."""
        raise NotImplementedError

    def own_loss(self, name: str, policy: Policy, batch: Any) -> Tensor:
        """The loss of each pair (B,) for the extra steps of the own network `name`."""
        raise NotImplementedError

    def after_update(self, policy: Policy) -> None:
        """Called after each update of the policy, as a moving reference needs."""
