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
from condrl.errors import RewardError, UsageError, blaming
from condrl.io.overrides import merged, read_argument, read_named, retyped
from condrl.prompts import Row
from condrl.registry import REGISTRIES, Plugin
from condrl.rewards.scoring import Reward, score
from condrl.training.build import make_rewards
from condrl.training.returned import described


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

        Raises: RewardError when a score fails; UsageError when the plugin refuses or fails, or returns something else.
        """
        name = self.section["name"]

        def total(states: Tensor, images: Tensor) -> Tensor:
            check_asked(states, images, len(condition), name)
            found = score(self.rewards, policy.model.decode(states), [rows[i] for i in images.tolist()])
            if found.failure:
                raise RewardError(f"{found.failure}: without every score nothing can be steered")
            return found.total

        steered = policy.model.reference() if self.learned else nullcontext()
        with steered, policy.model.merged(), blaming("steering", name):
            states = self.plugin(Draws(policy, condition, generators, total))
        check_states(states, (len(condition), *policy.model.state_shape), name)
        return states


def check_asked(states: Any, images: Any, count: int, name: str) -> None:
    """Raises: UsageError when a plugin asks for the reward of something else than finite states of some images."""
    is_numbered = isinstance(images, Tensor) and not images.is_floating_point() and images.dim() == 1
    if not isinstance(states, Tensor) or not is_numbered or len(images) != len(states):
        raise UsageError(
            f"the steering {name!r} called score({described(states)}, {described(images)}): it takes states (n, ...) "
            "and the numbers (n,) of the images that they are drawn for"
        )
    if not ((images >= 0) & (images < count)).all():
        raise UsageError(f"the steering {name!r} called score for images that are not among 0 to {count - 1}")
    check_finite(states, f"asked for the reward of {len(states)} states", name)


def check_states(states: Any, shape: tuple[int, ...], name: str) -> None:
    """Raises: UsageError when a plugin returned something else than finite states of a shape, in float32."""
    if not isinstance(states, Tensor) or states.shape != shape or states.dtype != torch.float32:
        raise UsageError(
            f"the steering {name!r} returned {described(states)}: it should return the final states, of shape {shape} "
            "in float32"
        )
    check_finite(states, f"returned {len(states)} states", name)


def check_finite(states: Tensor, what: str, name: str) -> None:
    """Raises: UsageError when states are not finite."""
    broken = int((~states.flatten(1).isfinite().all(1)).sum())
    if broken:
        raise UsageError(
            f"the steering {name!r} {what}, {broken} of which are not finite: it went too far; lower its strength"
        )


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
