"""Put a run together from its config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from condrl.algorithms.base import Algorithm
from condrl.algorithms.needs import Setting, check_needs
from condrl.config import GRID, Config
from condrl.diffusion.model import Model
from condrl.diffusion.policy import Policy
from condrl.diffusion.schedule import DIFFUSERS_SPACINGS, OU, Schedule
from condrl.diffusion.schedulers import DiscreteSchedule, schedule_from_diffusers
from condrl.diffusion.transition import Sampler
from condrl.errors import UsageError, blaming
from condrl.models.latent import kept_on_host
from condrl.processes import Processes
from condrl.prompts import Row
from condrl.registry import REGISTRIES
from condrl.rewards.scoring import Reward, make_reward
from condrl.training.host import make_accelerator
from condrl.training.optimizer import check_runs
from condrl.training.precision import set_memory_format, set_rollout_dtype
from condrl.training.returned import check_numbers, check_parts, check_steps, check_times
from condrl.training.trainer import Trainer

MADE = " when it was made"


def make(kind: str, section: Mapping[str, Any], *arguments: Any) -> Any:
    """Call a plugin with the options of its config section."""
    options = {key: value for key, value in section.items() if key != "name"}
    return REGISTRIES[kind].find(section["name"]).target(*arguments, **options)


def make_sampler(section: Mapping[str, Any], schedule: Schedule) -> Sampler:
    """The config's sampler on the time grid it asks for.

    Raises: UsageError when the plugin fails, or returns something else.
    """
    name, options = section["name"], {key: value for key, value in section.items() if key not in GRID}
    times, chosen = schedule.grid(section["steps"], section["spacing"]), section.get("noise_steps")
    with blaming("sampler", name, MADE):
        sampler: Sampler = make("sampler", options, schedule, times)
        check_times(sampler, times, name)
        if not schedule.alpha(times[0]) > 0:
            check_start(sampler, schedule, name)
        if sampler.affine is not None:
            check_numbers(sampler.affine, name)
        else:
            check_steps(sampler, name)
        return sampler if chosen is None else with_noise_at(sampler, chosen)


def check_start(sampler: Sampler, schedule: Schedule, name: str) -> None:
    """Check that a chain can start where there is no signal, at zero terminal SNR.

    Raises: UsageError when the model's prediction or the sampler's coefficients are meaningless there.
    """
    if isinstance(schedule, DiscreteSchedule) and schedule.prediction == "epsilon":
        raise UsageError(
            "the sampler starts where there is no signal (zero terminal SNR), and the noise that the model predicts "
            "is meaningless there: use sampler.spacing=leading"
        )
    x, k = torch.ones(1, 1), torch.zeros(1, dtype=torch.long)
    first, _ = sampler.step(k, x, lambda x, t: torch.zeros_like(x), sampler.init(x))
    if not (first.mean.isfinite().all() and first.std.isfinite().all()):
        advice = "sampler.name=ddim" + ", or sampler.spacing=leading" * isinstance(schedule, DiscreteSchedule)
        raise UsageError(f"the sampler {name} cannot start where there is no signal (zero terminal SNR): use {advice}")


def with_noise_at(sampler: Sampler, chosen: Sequence[int]) -> Sampler:
    """The sampler with noise at the chosen steps alone (docs/theory.md 3, partial SDE).

    Raises: UsageError when there are no such steps, or when the sampler cannot leave its noise out.
    """
    count = len(sampler.times) - 1
    if not set(chosen) <= set(range(count)):
        raise UsageError(f"config sampler.noise_steps: {chosen} are not all among the {count} steps")
    mask = torch.zeros(count, dtype=torch.bool)
    mask[list(chosen)] = True
    return sampler.with_noise(mask)


def make_algorithm(config: Config) -> Algorithm:
    """The config's algorithm.

    Raises: UsageError when the plugin is not one.
    """
    name = config.algorithm["name"]
    with blaming("algorithm", name, MADE):
        algorithm: Any = make("algorithm", config.algorithm)
    if not isinstance(algorithm, Algorithm):
        raise UsageError(f"the algorithm {name} should be a class derived from condrl.algorithms.base.Algorithm")
    for method in ("examples", "loss"):
        if getattr(type(algorithm), method) is getattr(Algorithm, method):
            raise UsageError(f"the algorithm {name} has no method {method}")
    own = [getattr(type(algorithm), m) is not getattr(Algorithm, m) for m in ("state_dict", "load_state_dict")]
    if own[0] != own[1]:
        raise UsageError(f"the algorithm {name} needs both state_dict and load_state_dict, or a resumed run forgets")
    return algorithm


def make_rewards(config: Config) -> list[Reward]:
    """The rewards with a weight that is not zero."""
    return [make_reward(name, config.rewards[name]) for name in config.weighted]


def make_measures(config: Config) -> list[Reward]:
    """What to report on held-out prompts: `evaluate.measures` and the rewards, these as they are without smoothing."""
    section = "evaluate.measures"
    measures = [make_reward(name, options, section) for name, options in config.evaluate.measures.items()]
    others = [name for name in config.weighted if name not in config.evaluate.measures]
    return measures + [make_reward(name, {**config.rewards[name], "smoothing": 0.0}) for name in others]


def weights_in_words(config: Config) -> str:
    """The rewards with their weights."""
    if not config.rewards:
        return "none"
    return ", ".join(f"{name} (weight {options['weight']:g})" for name, options in config.rewards.items())


def make_model(section: Mapping[str, Any], device: torch.device) -> Model:
    """A config section's model.

    Raises: UsageError when the plugin fails, or returns something else.
    """
    with blaming("model", section["name"], MADE):
        model: Model = make("model", section, device)
        check_parts(model, section["name"])
    return model


def make_policy(config: Config, device: torch.device, model: Model | None = None) -> Policy:
    model = model or make_model(config.model, device)
    return Policy(model, make_sampler(config.sampler, model.schedule))


def deployed(config: Config, policy: Policy) -> Policy:
    """The policy with the sampler that it is evaluated with."""
    return Policy(policy.model, make_sampler(config.evaluate.sampler or config.sampler, policy.model.schedule))


def make_trainer(
    config: Config,
    train: Sequence[Row],
    heldout: Sequence[Row] = (),
    processes: Processes | None = None,
    model: Model | None = None,
) -> Trainer:
    """The trainer of the config's model, or of another one, which has encoded the prompts.

    What the config leaves to a trial (`auto`) is set in it.
    """
    processes = processes or Processes(make_accelerator(config))
    check_runs(config.train, processes.accelerator.device)
    with kept_on_host(processes.sharded):
        policy = make_policy(config, processes.accelerator.device, model)
    with blaming("model", config.model["name"]):
        condition = policy.model.encode([row.prompt for row in [*train, *heldout]])
        if processes.sharded:
            policy.model.shard()
        if config.model.get("release_encoders"):
            latent: Any = policy.model
            latent.drop_encoders()
        set_memory_format(config, policy, condition, processes)
        set_rollout_dtype(config, policy, condition, processes)
    algorithm = make_algorithm(config)
    with blaming("algorithm", config.algorithm["name"]):
        check_needs(algorithm.needs, Setting(config, policy.sampler))  # now with the model's own schedule
        return Trainer(config, policy, algorithm, make_rewards(config), train, processes)


def stand_in(sampler: Mapping[str, Any]) -> Schedule:
    """A schedule on which a sampler's section can be tried before any model is loaded."""
    discrete = schedule_from_diffusers({"num_train_timesteps": 1000, "set_alpha_to_one": False})
    return discrete if sampler["steps"] <= 1000 or sampler["spacing"] in DIFFUSERS_SPACINGS else OU()
