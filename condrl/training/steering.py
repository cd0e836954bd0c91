"""Drawing with rewards and without training, by the plugin that `--steer` names."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from condrl.config import Config, typed_options
from condrl.diffusion.policy import Policy
from condrl.diffusion.steering import Draws
from condrl.errors import RewardError, UsageError
from condrl.io.overrides import merged, read_argument, read_named, retyped
from condrl.prompts import Row
from condrl.registry import REGISTRIES, Plugin
from condrl.rewards.scoring import Reward, score
from condrl.training.build import make_rewards


@dataclass(frozen=True)
class Steer:
    """Draws images by a steering plugin, which is given rewards."""

    section: dict[str, Any]  # the plugin's name and options, and its rewards' options by their names
    plugin: Callable[[Draws], Tensor]
    rewards: Sequence[Reward]
    learned: bool = False  # whether it is the pretrained model that is steered, whatever LoRA is loaded

    @torch.no_grad()
    def __call__(
        self, policy: Policy, condition: Tensor, generators: list[torch.Generator], rows: Sequence[Row]
    ) -> Tensor:
        """The final states (B, ...) of images with conditions (B,), each for its row and from its generator.

        Raises: RewardError when a score fails; UsageError when the plugin refuses, or returns something else.
        """

        def total(states: Tensor, images: Tensor) -> Tensor:
            found = score(self.rewards, policy.model.decode(states), [rows[i] for i in images.tolist()])
            if found.failure:
                raise RewardError(f"{found.failure}: without every score nothing can be steered")
            return found.total

        with policy.model.reference() if self.learned else nullcontext(), policy.model.merged():
            states = self.plugin(Draws(policy, condition, generators, total))
        check_states(states, (len(condition), *policy.model.state_shape))
        return states


def check_states(states: Any, shape: tuple[int, ...]) -> None:
    """Raises: UsageError when a plugin returned something else than finite states of a shape."""
    if not isinstance(states, Tensor) or states.shape != shape or not states.isfinite().all():
        got = f"a tensor of shape {tuple(states.shape)}" if isinstance(states, Tensor) else type(states).__name__
        raise UsageError(f"--steer: the plugin should return a finite tensor of shape {shape}, the final states: {got}")


def read_steer(argument: str, config: Config) -> Steer:
    """The steering plugin that NAME or NAME,option=value names, and the config's rewards to steer by.

    Raises: UsageError when it is neither, on invalid options, and on rewards that it cannot use.
    """
    name, settings = read_named(argument, "--steer", "smc,particles=8")
    plugin = REGISTRIES["steering"].find(name)
    types = {option.name: option.type for option in plugin.options.values()}
    values = merged([retyped(read_argument(setting), types) for setting in settings])
    options = typed_options(plugin, values, "--steer")
    rewards = [] if plugin.learned else make_rewards(config)
    if not plugin.learned:
        check_rewards(plugin, rewards)
    for reward in rewards:
        reward.load()
    section = {"name": name, **options, "rewards": {reward.name: config.rewards[reward.name] for reward in rewards}}
    return Steer(section, functools.partial(plugin.target, **options), rewards, plugin.learned)


def steers_by_rewards(argument: str) -> bool:
    """Whether the plugin that NAME,option=value names steers by rewards, as one does that is not registered yet."""
    try:
        return not REGISTRIES["steering"].find(argument.partition(",")[0]).learned
    except UsageError:
        return True


def check_rewards(plugin: Plugin, rewards: Sequence[Reward]) -> None:
    """Raises: UsageError when a plugin cannot steer by these rewards."""
    if not rewards:
        raise UsageError("--steer needs rewards to draw with, as in rewards.shapes.weight=1")
    if grouped := [reward.name for reward in rewards if reward.per_group]:
        raise UsageError(f"--steer: the reward {grouped[0]!r} compares the images of a prompt, and cannot steer one")
    rigid = [reward.name for reward in rewards if not reward.differentiable]
    if plugin.differentiates and rigid:
        raise UsageError(
            f"--steer {plugin.name} differentiates the reward, and {rigid[0]} has no gradient: use smc or best_of_n"
        )
