"""Put a run together from its config."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

import condrl
from condrl.algorithms import Algorithm
from condrl.checkpoint import newest_checkpoint, read_checkpoint, unlike
from condrl.config import Config, GridConfig, to_yaml
from condrl.errors import UsageError
from condrl.folder import RunFolder
from condrl.policy import Model, Policy
from condrl.processes import Processes, asks_for_shards
from condrl.prompts import Row, duplicate_note
from condrl.record import from_json
from condrl.registry import REGISTRIES
from condrl.rewards import Reward, make_reward
from condrl.schedule import DIFFUSERS_SPACINGS, OU, DiscreteSchedule, Schedule, schedule_from_diffusers
from condrl.trainer import Trainer
from condrl.transition import Coefficients, Sampler, trained_steps
from condrl.words import expanded, read_word

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "open_clip_torch", "numpy")
UNSUPPORTED = ("DEEPSPEED", "MEGATRON_LM")  # of accelerate's distributed types
TRACKED = "condrl"  # the trackers' folder in a run's, and their project


def make(kind: str, section: Mapping[str, Any], *arguments: Any) -> Any:
    """Call a plugin with the options of its config section."""
    options = {key: value for key, value in section.items() if key != "name"}
    return REGISTRIES[kind].find(section["name"]).target(*arguments, **options)


def make_sampler(section: Mapping[str, Any], schedule: Schedule) -> Sampler:
    """The config's sampler on the time grid it asks for."""
    grid = {field.name for field in dataclasses.fields(GridConfig)}
    options = {key: value for key, value in section.items() if key not in grid}
    times, chosen = schedule.grid(section["steps"], section["spacing"]), section.get("noise_steps")
    sampler: Sampler = make("sampler", options, schedule, times)
    if not schedule.alpha(times[0]) > 0:
        check_start(sampler, schedule, section["name"])
    return sampler if chosen is None else quietened(sampler, chosen, section["name"])


def check_start(sampler: Sampler, schedule: Schedule, name: str) -> None:
    """Check that a chain can start where there is no signal, at zero terminal SNR.

    Raises: UsageError when the model's prediction or the sampler's coefficients say nothing there.
    """
    if isinstance(schedule, DiscreteSchedule) and schedule.prediction == "epsilon":
        raise UsageError(
            "the sampler starts where there is no signal (zero terminal SNR), and the noise that the model predicts "
            "says nothing there: use sampler.spacing=leading"
        )
    first = sampler.step(torch.zeros(1, dtype=torch.long), torch.ones(1, 1), lambda x, t: torch.zeros_like(x))
    if not (first.mean.isfinite().all() and first.std.isfinite().all()):
        raise UsageError(
            f"the sampler {name} cannot start where there is no signal (zero terminal SNR): use sampler.name=ddim, or "
            "sampler.spacing=leading"
        )


def quietened(sampler: Any, chosen: Sequence[int], name: str) -> Sampler:
    """The sampler with noise at the chosen steps alone (THEORY 7.5, partial SDE).

    Raises: UsageError when there are no such steps, or when the sampler cannot leave its noise out.
    """
    count = len(sampler.times) - 1
    if not set(chosen) <= set(range(count)):
        raise UsageError(f"config sampler.noise_steps: {chosen} are not all among the {count} steps")
    if not hasattr(sampler, "with_noise"):
        raise UsageError(
            f"config sampler.noise_steps: the sampler {name} has no with_noise, which would leave noise out"
        )
    mask = torch.zeros(count, dtype=torch.bool)
    mask[list(chosen)] = True
    quiet: Sampler = sampler.with_noise(mask)
    return quiet


def make_rewards(config: Config) -> list[Reward]:
    """The rewards with a weight that is not zero.

    Raises: UsageError when there is none.
    """
    rewards = [make_reward(name, options) for name, options in config.rewards.items() if options["weight"] != 0]
    if not rewards:
        raise UsageError("config rewards: no reward has a weight; add one, as in rewards.shapes.weight=1")
    return rewards


def make_measures(config: Config) -> list[Reward]:
    """What to report on held-out prompts: `evaluate.measures` and the rewards."""
    measures = [make_reward(name, options) for name, options in config.evaluate.measures.items()]
    return measures + [r for r in make_rewards(config) if r.name not in config.evaluate.measures]


def weights_in_words(config: Config) -> str:
    """The rewards with their weights."""
    return ", ".join(f"{name} (weight {options['weight']:g})" for name, options in config.rewards.items())


def announcement(config: Config, train: Sequence[Row], heldout: Sequence[Row]) -> list[str]:
    """What counts in a run, in lines to print before it."""
    lines = [f"rewards: {weights_in_words(config)}", f"prompts: {config.prompts.train} ({len(train)})"]
    for name, rows in (("train", train), ("heldout", heldout)):
        if note := duplicate_note(rows):
            lines.append(f"prompts.{name}: {note}")
    if both := {row.prompt for row in train} & {row.prompt for row in heldout}:
        lines.append(f"warning: {len(both)} of the held-out prompts are trained on too, such as {min(both)!r}")
    if heldout:
        rewards = [name for name, options in config.rewards.items() if options["weight"] != 0]
        names = ", ".join(dict.fromkeys([*config.evaluate.measures, *rewards]))
        lines.append(f"measured on {config.prompts.heldout} ({len(heldout)}), base and tuned: {names}")
    elif config.evaluate.measures or config.evaluate.every or config.evaluate.sampler:
        lines.append("evaluate.* has no effect without prompts.heldout: nothing will be measured")
    return lines


def find_device(name: str | None) -> torch.device:
    """The device of that name, by default a GPU where there is one.

    Raises: UsageError when there is no such device here, or none that computes.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # no such name, none here, one without numbers
        raise UsageError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return torch.device(name)


def make_policy(config: Config, device: torch.device) -> Policy:
    model: Model = make("model", config.model, device)
    return Policy(model, make_sampler(config.sampler, model.schedule))


def deployed(config: Config, policy: Policy) -> Policy:
    """The policy with the sampler that it is evaluated with."""
    if not config.evaluate.sampler:
        return policy
    return Policy(policy.model, make_sampler(config.evaluate.sampler, policy.model.schedule))


def noise_level(sampler: Sampler) -> float | None:
    """A sampler's eta; None where its steps differ or it does not say."""
    levels: Tensor | None = getattr(sampler, "eta", None)
    return levels[0].item() if levels is not None and (levels == levels[0]).all() else None


def transfer(eta: float, deployed: float) -> float:
    """M(eta, eta'): how far a policy tuned at eta moves the mean when sampled at eta', over what kappa asks for.

    Exact for a Gaussian and a linear reward (THEORY 3.4). 1 for eta = 1.
    """
    return 2 * eta**2 * (1 + deployed**2) / ((1 + eta**2) * (eta**2 + deployed**2))


def transfer_warning(config: Config) -> str | None:
    """What to say of a config that tunes at one noise level and evaluates at another; None when there is nothing."""
    algorithm: Algorithm = make("algorithm", config.algorithm)
    if not config.evaluate.sampler or not {"stochastic steps", "affine steps"} & set(algorithm.needs):
        return None
    tuned, used = (noise_level(make_sampler(s, stand_in(s))) for s in (config.sampler, config.evaluate.sampler))
    if not tuned or used is None or tuned in (1.0, used):
        return None
    return (
        f"tuned at eta={tuned:.3g}, evaluated at eta={used:.3g}: a Gaussian's mean would move "
        f"{transfer(tuned, used):.2f} times as far as it should; "
        "only what is tuned at eta=1 can be sampled at any eta"
    )


def make_trainer(
    config: Config, train: Sequence[Row], heldout: Sequence[Row] = (), processes: Processes | None = None
) -> Trainer:
    """The model that knows the prompts, and what tunes it."""
    processes = processes or Processes(make_accelerator(config))
    policy = make_policy(config, processes.accelerator.device)
    policy.model.encode([row.prompt for row in [*train, *heldout]])
    if processes.sharded:
        policy.model.shard()  # type: ignore[attr-defined]
    algorithm: Algorithm = make("algorithm", config.algorithm)
    if "stochastic steps" in algorithm.needs:
        trained_steps(policy.sampler, config.train)  # now with the model's own schedule
    if "affine steps" in algorithm.needs and not policy.model.schedule.alpha(policy.sampler.times[0]) > 0:
        raise UsageError(
            f"the algorithm {config.algorithm['name']} needs the score at every step, which says nothing where "
            "there is no signal (zero terminal SNR): use sampler.spacing=leading"
        )
    return Trainer(config, policy, algorithm, make_rewards(config), train, processes)


def stand_in(sampler: Mapping[str, Any]) -> Schedule:
    """A schedule on which a sampler's section can be tried before any model is loaded."""
    discrete = schedule_from_diffusers({"num_train_timesteps": 1000, "set_alpha_to_one": False})
    return discrete if sampler["steps"] <= 1000 or sampler["spacing"] in DIFFUSERS_SPACINGS else OU()


def check_combination(config: Config) -> None:
    """Check what depends on the sampler, on a stand-in schedule: no model is loaded.

    Raises: UsageError when the sampler cannot give the algorithm or the config what it needs.
    """
    sampler = make_sampler(config.sampler, stand_in(config.sampler))
    if config.evaluate.sampler:
        make_sampler(config.evaluate.sampler, stand_in(config.evaluate.sampler))
    algorithm: Algorithm = make("algorithm", config.algorithm)
    if "groups" in algorithm.needs and config.train.images_per_prompt < 2:
        raise UsageError(
            f"the algorithm {config.algorithm['name']} compares images of one prompt with each other, and "
            "train.images_per_prompt=1 leaves nothing to compare: raise it, or use ddpo with algorithm.advantage=prompt"
        )
    if config.train.kl_budget is not None:
        check_budget(config, sampler, algorithm)
    if "one pass" in algorithm.needs and config.train.inner_epochs > 1:
        raise UsageError(
            f"the algorithm {config.algorithm['name']} has no importance weights: set train.inner_epochs=1, or use ddpo"
        )
    if "reward gradients" in algorithm.needs:
        for reward in make_rewards(config):
            if not reward.differentiable:
                raise UsageError(
                    f"the algorithm {config.algorithm['name']} differentiates the reward, and {reward.name} has no "
                    "gradient: use nft, ddpo or another algorithm that needs none"
                )
    if "Markov steps" in algorithm.needs and getattr(sampler, "has_memory", False):
        raise UsageError(
            f"the algorithm {config.algorithm['name']}, as configured, needs a sampler whose steps depend on the state "
            f"alone, and {config.sampler['name']} remembers earlier steps: use another sampler (a policy gradient: or "
            "algorithm.kappa=0)"
        )
    if "affine steps" in algorithm.needs and not isinstance(sampler, Coefficients):
        raise UsageError(
            f"the algorithm {config.algorithm['name']} needs a sampler whose steps are affine in the score, and "
            f"{config.sampler['name']} is not: use ddim, exponential or euler_maruyama"
        )
    if {"stochastic steps", "noise"} & set(algorithm.needs) and not sampler.stochastic.any():
        advice = "set sampler.eta=1, or look at the sampler's own options"
        if config.sampler["steps"] == 1:
            advice = "its one step goes to the data, where no noise is added; raise sampler.steps"
        raise UsageError(
            f"the algorithm {config.algorithm['name']} needs steps with noise, and the sampler "
            f"{config.sampler['name']} has none as configured: {advice}"
        )
    if "stochastic steps" not in algorithm.needs:
        if config.train.steps is not None or config.train.steps_per_image is not None:
            raise UsageError(
                f"the algorithm {config.algorithm['name']} does not choose among denoising steps: leave train.steps "
                "and train.steps_per_image out"
            )
        return
    trained_steps(sampler, config.train)


def check_equal_calls(config: Config, processes: int) -> None:
    """Check that all processes will call a sharded network equally often.

    Raises: UsageError naming the setting that stands against it.
    """
    train = config.train
    if not hasattr(REGISTRIES["model"].find(config.model["name"]).target, "shard"):
        raise UsageError(f"the model {config.model['name']} cannot be sharded: use another of configs/accelerate")
    for wrong, key, text in (
        (train.prompts_per_epoch % processes, "prompts_per_epoch", f"be a multiple of the {processes} processes"),
        (train.images_per_prompt % train.updates_per_epoch, "images_per_prompt", "be a multiple of updates_per_epoch"),
        (train.max_failed, "max_failed", "be 0"),
        (train.kl_budget is not None, "kl_budget", "be left out"),
    ):
        if wrong:
            raise UsageError(f"config train.{key}: has to {text} with FSDP, where all processes compute in step")


def check_budget(config: Config, sampler: Sampler, algorithm: Algorithm) -> None:
    """Raises: UsageError when `train.kl_budget` cannot be kept to."""
    if algorithm.off_policy:
        raise UsageError(
            "config train.kl_budget: what the algorithm rolls out, as configured, is not the policy: leave it out"
        )
    if not sampler.stochastic.any() or getattr(sampler, "has_memory", False):
        raise UsageError(
            "config train.kl_budget: the path KL needs steps with noise that depend on the state alone: use ddim with "
            "sampler.eta=1"
        )
    if config.train.over_budget == "adapt" and not config.algorithm.get("kappa"):
        raise UsageError("config train.over_budget: adapt changes algorithm.kappa, which is to be above 0 for that")


def check_folder(config: Config, is_locked: bool = False) -> None:
    """Raises: UsageError when a run cannot write to its folder, or would replace another without being told to."""
    folder = RunFolder(config.folder)
    folder.check(is_locked)
    if folder.holds_run and not config.run.overwrite and config.run.resume == "never":
        raise UsageError(
            f"{config.folder} holds a run already: choose another run.name=, or run.overwrite=true to replace it, or "
            "run.resume=auto to go on"
        )


def check_launcher() -> None:
    """Raises: UsageError on an option of `accelerate launch` that would have no effect."""
    for variable, without, option, instead in (
        ("ACCELERATE_MIXED_PRECISION", "no", "--mixed_precision", "use --mixed_precision no, and model.dtype=bfloat16"),
        ("ACCELERATE_DYNAMO_BACKEND", "no", "--dynamo_backend", "use --dynamo_backend no"),
        (
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            "1",
            "--gradient_accumulation_steps",
            "gradients are summed over train.loss_batch pairs at a time: use --gradient_accumulation_steps 1",
        ),
    ):
        given = os.environ.get(variable, without)
        if given.lower() != without:
            raise UsageError(f"accelerate launch {option} {given.lower()} has no effect here: {instead}")


def find_checkpoint(config: Config) -> tuple[Path, dict[str, Any]] | None:
    """What to go on from, as `run.resume` says, and where it was; None to start anew.

    Raises: UsageError when there is no whole checkpoint where it points, when the run had other settings or more
    epochs, or when a run in the folder would be lost.
    """
    if config.run.resume == "never":
        return None
    if config.run.resume == "auto":
        found = newest_checkpoint(config.folder / "checkpoints")
        lost = found is None and any((config.folder / name).exists() for name in ("result.json", "lora"))
    else:
        path = expanded(config.run.resume).resolve()
        found = path, read_checkpoint(path)
        lost = not continues(config, path) and RunFolder(config.folder).holds_run
    if lost and not config.run.overwrite:
        raise UsageError(
            f"{config.folder} holds a run that would be lost: choose another run.name=, or run.overwrite=true to "
            "replace it"
        )
    if found is not None:
        numbers = {"epoch": 0, "metrics_bytes": 0}
        if why := unlike(numbers, {name: found[1].get(name) for name in numbers}):
            raise UsageError(f"the checkpoint {found[0]} is not one of a run: {why}")
        if continues(config, found[0]):
            check_record(config.folder / "metrics.jsonl", *found)
        check_same_settings(config, found[0].resolve().parents[1] / "config.yaml")
        if found[1]["epoch"] > config.train.epochs:
            raise UsageError(
                f"run.resume: that run has had {found[1]['epoch']} epochs already, more than train.epochs="
                f"{config.train.epochs}"
            )
    return found


def continues(config: Config, checkpoint: Path) -> bool:
    """Whether a checkpoint is of the run in the config's own folder."""
    return checkpoint.resolve().parent == (config.folder / "checkpoints").resolve()


def check_record(record: Path, checkpoint: Path, state: Mapping[str, Any]) -> None:
    """Raises: UsageError when a record lacks epochs from before the checkpoint, or has lines that no run wrote."""
    content, needed = record.read_bytes() if record.exists() else b"", state["metrics_bytes"]
    if len(content) < needed:
        what = f"has {len(content):,} of the {needed:,} bytes" if record.exists() else "is missing: it had lines"
        raise UsageError(
            f"run.resume: {record} {what} that were written before {checkpoint.name}: put it back, or go on in another "
            f"folder with run.name=... run.resume={checkpoint}"
        )
    for number, line in enumerate(content[:needed].splitlines(), 1):
        try:
            row = from_json(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not {"epoch", "images", "updates", "reward/total"} <= row.keys():
            raise UsageError(f"{record}, line {number}: is not what a run records")


def check_same_settings(config: Config, saved: Path) -> None:
    """Raises: UsageError naming the first setting, of those that training depends on, that a run did not have."""
    if not saved.exists():
        return
    read: Any = OmegaConf.to_container(OmegaConf.create(to_yaml(config)))
    then, now = flatten(read_word(str(saved)).values), flatten(read)
    free = {"train.epochs"} if config.train.lr_decay == "none" else set()
    for key in sorted({*then, *now} - free):
        matters = key == "run.seed" or not key.startswith(("run.", "evaluate."))
        if key == "train.epochs" and then.get(key) != now.get(key):
            raise UsageError(
                f"run.resume: that run's learning rate falls to zero at the end of its {then.get(key)} epochs "
                "(train.lr_decay=linear), so it cannot be made longer: start another run from what it learned, with "
                f"model.lora={saved.parent / 'lora'}"
            )
        if matters and then.get(key) != now.get(key):
            raise UsageError(
                f"run.resume: that run had {key}={then.get(key)}, and this config has {now.get(key)}: "
                "use its settings, or another run.name="
            )


def make_accelerator(config: Config) -> Any:
    """An Accelerator that leaves precision to `model.dtype`; `start_trackers` when the run's folder is ready.

    Raises: UsageError when a tracker is not installed, or on a way to spread a model that is not supported.
    """
    from accelerate import Accelerator

    for tracker in config.run.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise UsageError(f"config run.trackers: {tracker} is not installed: pip install 'condrl[{tracker}]'")
    if sys.platform == "linux":
        keep_freed_memory()
    accelerator = Accelerator(
        mixed_precision="no", log_with=config.run.trackers or None, project_dir=str(config.folder)
    )
    if str(accelerator.distributed_type).split(".")[-1] in UNSUPPORTED:
        raise UsageError(f"{accelerator.distributed_type} is not supported: use one of configs/accelerate")
    if config.train.prompts_per_epoch < accelerator.num_processes:
        raise UsageError(
            f"config train.prompts_per_epoch: {config.train.prompts_per_epoch} prompts cannot be shared out to "
            f"{accelerator.num_processes} processes: raise it, or start fewer"
        )
    if asks_for_shards(accelerator):
        check_equal_calls(config, accelerator.num_processes)
    return accelerator


def keep_freed_memory() -> None:
    """Let glibc keep what tensors free for the next ones; asking for fresh pages costs 5 to 30 % of an epoch on a CPU.

    The peak stays the same (measured on the quickstart and on configs/paper).
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option:
        for option, size in ((-3, 1 << 25), (-1, 1 << 30)):  # M_MMAP_THRESHOLD, at its most, and M_TRIM_THRESHOLD
            set_option(option, size)


def start_trackers(config: Config, processes: Processes, folder: RunFolder) -> None:
    """Start what `run.trackers` names, with the config beside the metrics."""
    if processes.first and config.run.trackers:
        (folder.path / TRACKED).mkdir(exist_ok=True)
    before = folder.files_in(TRACKED)
    here = {"wandb": {"dir": str(folder.path / TRACKED)}} if "wandb" in config.run.trackers else {}
    processes.accelerator.init_trackers(TRACKED, config=flatten(dataclasses.asdict(config)), init_kwargs=here)
    if processes.first:
        folder.adopt(folder.files_in(TRACKED) - before)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `section.key`, with what trackers cannot take written as text."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat


def provenance() -> dict[str, Any]:
    """Versions, git revision and command of this process."""
    return {
        "versions": {"condrl": condrl.__version__, "python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
        "revision": git_revision(Path(__file__).resolve().parents[1]),
        "command": sys.argv,
    }


def git_revision(checkout: Path) -> str | None:
    """The commit of condrl's own checkout; None when it is installed from a wheel or git is missing."""
    if not (checkout / ".git").exists() or not shutil.which("git"):
        return None
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=checkout)
    return git.stdout.strip() or None


def peak_memory_gb(device: torch.device) -> float:
    """Highest memory so far in GB (1e9 bytes): allocated on a GPU, resident in a CPU process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
