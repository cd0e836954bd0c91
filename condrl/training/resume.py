"""What a run continues from, and what of its folder may be replaced."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from condrl.config import Config, to_yaml
from condrl.errors import UsageError, brief
from condrl.io.files import expanded
from condrl.io.overrides import flatten, read_argument, section_at
from condrl.io.records import from_json
from condrl.models.latent import LAYOUTS
from condrl.training.build import make_algorithm
from condrl.training.checkpoint import newest_checkpoint, read_checkpoint, unlike
from condrl.training.folder import RunFolder
from condrl.training.optimizer import negative_moment, state_of_a_step
from condrl.training.trainer import Trainer

PLACES = re.compile(r"model\.(offload_vae|embeddings_gb|release_encoders)|rewards\..*\.offload")  # of the same numbers


def check_run_folder(config: Config, is_locked: bool = False) -> None:
    """Raises: UsageError when a run cannot write to its folder, or would replace another without being told to."""
    folder = RunFolder(config.folder)
    folder.check(is_locked)
    if folder.holds_run and not config.run.overwrite and config.run.resume == "never":
        raise UsageError(
            f"{config.folder} holds a run already: choose another run.name=, or run.overwrite=true to replace it, or "
            "run.resume=auto to resume it"
        )


def find_checkpoint(config: Config) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that `run.resume` asks for, and its path; None to start from the beginning.

    What the config leaves to a trial (`auto`) becomes what that run chose, so that it resumes exactly.

    Raises: UsageError when there is no complete checkpoint where it points, when the run had other settings or more
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
        saved = found[0].resolve().parents[1] / "config.yaml"
        keep_choices(config, saved)
        check_same_settings(config, saved)
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
        what = f"has {len(content):,} of the {needed:,} bytes" if record.exists() else "is missing, with the lines"
        raise UsageError(
            f"run.resume: {record} {what} that were written before {checkpoint.name}: put it back, or resume in "
            f"another folder with run.name=... run.resume={checkpoint}"
        )
    for number, line in enumerate(content[:needed].splitlines(), 1):
        try:
            row = from_json(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not {"epoch", "images", "updates"} <= row.keys():
            raise UsageError(f"{record}, line {number}: is not a line that a run records")


def keep_choices(config: Config, saved: Path) -> None:
    """Replace what is `auto` by what the run with that config had chosen on the machine it started on."""
    if not saved.exists():
        return
    values = read_argument(str(saved)).values
    dtype, layout = section_at(values, "train").get("rollout_dtype"), section_at(values, "model").get("memory_format")
    if config.train.rollout_dtype == "auto" and dtype in (None, "bfloat16", "float16"):
        config.train.rollout_dtype = dtype
    if config.model.get("memory_format") == "auto" and layout in LAYOUTS:
        config.model["memory_format"] = layout


def check_same_settings(config: Config, saved: Path) -> None:
    """Raises: UsageError naming the first setting, of those that training depends on, that a run did not have."""
    if not saved.exists():
        return
    read: Any = OmegaConf.to_container(OmegaConf.create(to_yaml(config)))
    then, now = flatten(read_argument(str(saved)).values), flatten(read)
    fixed = config.train.lr_decay != "none" or make_algorithm(config).depends_on_epochs
    free = set() if fixed else {"train.epochs"}
    for key in sorted({*then, *now} - free):
        matters = key == "run.seed" or not (key.startswith(("run.", "evaluate.")) or PLACES.fullmatch(key))
        if key == "train.epochs" and then.get(key) != now.get(key):
            from_lora = f": start another run from what it learned, with model.lora={saved.parent / 'lora'}"
            raise UsageError(
                f"run.resume: that run was planned for {then.get(key)} epochs (train.lr_decay=linear, or an algorithm "
                f"in stages), so it cannot be made longer{from_lora if 'lora' in config.model else ''}"
            )
        if matters and then.get(key) != now.get(key):
            raise UsageError(
                f"run.resume: that run had {key}={then.get(key)}, and this config has {now.get(key)}: "
                "use its settings, or another run.name="
            )


def check_state(trainer: Trainer, state: dict[str, Any], path: Path) -> None:
    """Check that a checkpoint is like one that this run would write; what is loaded for that is restored.

    Raises: UsageError saying what differs.
    """
    before, why = copy.deepcopy(trainer.state_dict()), difference(trainer, state)
    if not why:
        try:
            trainer.load_memories(state)
        except Exception as error:  # the algorithm, a reward or a generator cannot load its part
            why = f"its algorithm, rewards or rng: {brief(error)}"
        with suppress(Exception) if why else nullcontext():  # what cannot load says so once
            trainer.load_memories(before)
    if why:
        raise UsageError(f"the checkpoint {path} is not one of this run: {why}")


def difference(trainer: Trainer, state: dict[str, Any]) -> str | None:
    """How a checkpoint differs from those of this run, apart from what `load_memories` loads; None when it does not."""
    try:
        moments, groups = state["optimizer"]["state"], state["optimizer"]["param_groups"]
        found = {"state": moments, "param_groups": [{"lr": group["lr"]} for group in groups]}
        used = [i for i in range(len(trainer.learner.parameters)) if i in moments]
    except (LookupError, TypeError) as error:
        return f"its optimizer lacks a state, or param_groups with an lr ({brief(error)})"
    made = state_of_a_step(trainer.config.train, [trainer.learner.parameters[i] for i in used])
    kept = dict(zip(used, made.values(), strict=True))
    expected = {"state": kept, "param_groups": [{"lr": lr} for lr in trainer.learner.rates]}
    memories = dict.fromkeys(("first", "best", "rewards", "algorithm", "rng"))
    own = {**trainer.state_dict(), **memories, "optimizer": expected}
    if why := unlike(own, {**state, **{name: None for name in memories if name in state}, "optimizer": found}):
        return why
    if below := negative_moment(moments):
        return f"optimizer.{below} is below zero"
    train = trainer.config.train
    if state["updates"] > state["epoch"] * train.inner_epochs * train.updates_per_epoch:
        return f"it has more updates ({state['updates']}) than there are in {state['epoch']} epochs"
    best = state["best"]
    if not isinstance(best, dict) or is_not_best(best):
        return "best is not the best epoch of a run"
    if best["weights"] and (why := unlike({"weights": list(trainer.learner.weights)}, {"weights": best["weights"]})):
        return f"best: {why}"
    if not isinstance(state["first"], dict) or not all(isinstance(v, int | float) for v in state["first"].values()):
        return "first is not what an epoch recorded"
    return None


def is_not_best(best: Mapping[str, Any]) -> bool:
    """Whether what a checkpoint has as the best epoch cannot be one."""
    counts, value = [best.get("epoch"), best.get("waited")], best.get("value")
    whole = all(isinstance(count, int) and count >= 0 for count in counts) and len(best) == 4
    kept = isinstance(best.get("weights"), list) and bool(best["weights"]) == bool(best["epoch"])
    return not kept or not whole or not (value is None or (isinstance(value, int | float) and math.isfinite(value)))
