"""What algorithms cannot do without: a need looks at a run's parts and says in one sentence what to change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from condrl.config import Config, TrainConfig
from condrl.diffusion.schedulers import DiscreteSchedule
from condrl.diffusion.transition import Sampler, windowed
from condrl.errors import UsageError
from condrl.registry import reward


@dataclass(frozen=True)
class Setting:
    """What an algorithm is to work with."""

    config: Config
    sampler: Sampler  # on the model's schedule, or before a model is loaded on one that stands in for it

    @property
    def algorithm(self) -> str:
        name: str = self.config.algorithm["name"]
        return name


Need = Callable[[Setting], None]  # raises a UsageError where it is not met


def groups(setting: Setting) -> None:
    """Several images of a prompt in an epoch."""
    if setting.config.train.images_per_prompt < 2:
        raise UsageError(
            f"the algorithm {setting.algorithm} compares images of one prompt with each other, and "
            "train.images_per_prompt=1 leaves nothing to compare: raise it, or use ddpo with algorithm.advantage=prompt"
        )


def epochs_for(option: str, parts: int) -> Need:
    """A run of as many epochs as the parts that it is divided into, at least."""

    def divided(setting: Setting) -> None:
        if setting.config.train.epochs < parts:
            raise UsageError(f"config algorithm.{option}: {parts} of them do not fit into train.epochs")

    return divided


def one_pass(setting: Setting) -> None:
    """One update on each image."""
    if setting.config.train.inner_epochs > 1:
        raise UsageError(
            f"the algorithm {setting.algorithm} has no importance weights: set train.inner_epochs=1, or use ddpo"
        )


def reward_gradients(setting: Setting) -> None:
    """Rewards that can be differentiated."""
    weighted = setting.config.weighted
    if rigid := [name for name in weighted if not reward.find(name).differentiable]:
        raise UsageError(
            f"the algorithm {setting.algorithm} differentiates the reward, and {rigid[0]} has no gradient: use nft, "
            "ddpo or another algorithm that needs none"
        )
    if grouped := [name for name in weighted if reward.find(name).per == "group"]:
        raise UsageError(
            f"the algorithm {setting.algorithm} differentiates the reward for some images at a time, and {grouped[0]} "
            "needs all images of a prompt: use nft, ddpo or another algorithm without reward gradients"
        )


def markov_steps(setting: Setting) -> None:
    """Steps that depend on the state alone."""
    if not setting.sampler.is_markov:
        raise UsageError(
            f"the algorithm {setting.algorithm}, as configured, needs a sampler whose steps depend on the state alone, "
            f"and {setting.config.sampler['name']} remembers earlier steps: use another sampler (a policy gradient: or "
            "algorithm.kappa=0)"
        )


def affine_steps(setting: Setting) -> None:
    """A sampler of three numbers per step."""
    if setting.sampler.affine is None:
        raise UsageError(
            f"the algorithm {setting.algorithm} needs a sampler whose steps are affine in the score, and "
            f"{setting.config.sampler['name']} is not: use ddim, exponential or euler_maruyama"
        )


def scores(setting: Setting) -> None:
    """The score at every step, also the first."""
    if setting.sampler.schedule.alpha(setting.sampler.times[0]) > 0:
        return
    has_table = isinstance(setting.sampler.schedule, DiscreteSchedule)
    advice = "sampler.spacing=leading" if has_table else "nft, grpo or ddpo, as a flow starts there"
    if "exploration" in setting.config.algorithm:
        advice += ", or algorithm.exploration=null"
    raise UsageError(
        f"the algorithm {setting.algorithm}, as configured, needs the score at every step, which is meaningless "
        f"without a signal (zero terminal SNR): use {advice}"
    )


def noise(setting: Setting) -> None:
    """At least one step with noise."""
    if setting.sampler.stochastic.any():
        return
    advice = "set sampler.eta=1, or look at the sampler's own options"
    if setting.config.sampler["steps"] == 1:
        advice = "its one step goes to the data, where no noise is added; raise sampler.steps"
    raise UsageError(
        f"the algorithm {setting.algorithm} needs steps with noise, and the sampler "
        f"{setting.config.sampler['name']} has none as configured: {advice}"
    )


def noisy_steps(setting: Setting) -> None:
    """Steps with noise, among which `train.steps` or `train.window` chooses."""
    noise(setting)
    train, noisy = setting.config.train, int(setting.sampler.stochastic.sum())
    if train.window is None:
        trained_steps(setting.sampler, train)
        return
    if train.steps is not None:
        raise UsageError("config train.steps: has no effect beside train.window, whose steps are trained")
    if not 1 <= train.window <= noisy:
        raise UsageError(
            f"config train.window: must be from 1 to {noisy}, the number of steps with noise, got {train.window}"
        )
    trained_steps(windowed(setting.sampler, train.window, 0), train)


def no_rollouts(setting: Setting) -> None:
    """Nothing that concerns roll-outs, where there are none."""
    for name in ("same_start", "rollout_dtype"):
        if getattr(setting.config.train, name) != getattr(TrainConfig(), name):
            raise UsageError(f"config train.{name}: has no effect, the algorithm {setting.algorithm} rolls nothing out")


def check_needs(needs: tuple[Need, ...], setting: Setting) -> None:
    """Raises: UsageError on the first need that is not met, or on a choice of steps that has no effect."""
    if not isinstance(needs, tuple) or not all(map(callable, needs)):
        raise UsageError(
            f"the algorithm {setting.algorithm}: needs should be a property that returns a tuple of functions, as of "
            "condrl.algorithms.needs"
        )
    for need in needs:
        need(setting)
    train = setting.config.train
    chosen = [name for name in ("steps", "steps_per_image", "window") if getattr(train, name) is not None]
    if noisy_steps not in needs and chosen:
        raise UsageError(
            f"the algorithm {setting.algorithm} does not choose among denoising steps: leave train.{chosen[0]} out"
        )


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
        raise UsageError(
            f"config train.steps_per_image: must be from 1 to {len(chosen)}, the number of trained steps, got "
            f"{train.steps_per_image}"
        )
    return torch.tensor(sorted(set(chosen)))
