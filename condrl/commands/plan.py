"""What an evaluation is to measure, and where it is written: read from its arguments, and checked without the model."""

from __future__ import annotations

import argparse
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from condrl.commands.arguments import HOME, check_json, default_config, find, in_run, split_words, with_rank
from condrl.config import Config
from condrl.errors import UsageError, print_main
from condrl.io.files import check_folder, exists, locate
from condrl.io.overrides import read_named, setting_keys
from condrl.loading import load_for_evaluation

if TYPE_CHECKING:
    import torch

    from condrl.prompts import Row
    from condrl.rewards.scoring import Reward
    from condrl.training.evaluate import Pair
    from condrl.training.folder import RunFolder
    from condrl.training.steering import Steer

RECORD, SUMMARY = "evaluation.jsonl", "evaluation.json"  # in its folder


@dataclass(frozen=True)
class Plan:
    """What is to be measured, and where it is written."""

    configs: list[Config]  # one for each sampler, alike in all else
    tuned: Path | None  # a LoRA's file, or a folder with a network of points; None: the base alone
    source: Path | None  # the run that it belongs to
    rows: list[Row]
    strengths: list[float]
    steer: Steer | None
    folder: RunFolder
    pictures: int
    batch: int
    device: torch.device

    @property
    def config(self) -> Config:
        return self.configs[0]

    @property
    def samplers(self) -> list[dict[str, Any]]:
        return [config.evaluate.sampler or config.sampler for config in self.configs]

    @property
    def per_prompt(self) -> int:
        return self.config.evaluate.images_per_prompt

    @property
    def names(self) -> Pair:
        """What is compared with what, in the records."""
        return ("plain", "steered") if self.steer else ("base", "tuned")


def read_plan(args: argparse.Namespace) -> Plan:
    """Raises: UsageError on what cannot be evaluated."""
    from condrl.training.folder import RunFolder
    from condrl.training.host import find_device
    from condrl.training.steering import read_steer

    check_numbers(args)
    named, settings = split_words(args.words)
    if named is None and args.steer is None:
        raise UsageError(
            "nothing to evaluate: name a run or a LoRA, as in condrl evaluate runs/quickstart, or --steer the base"
        )
    tuned, run = find(named) if named else (None, None)
    check_strengths(args.strength, tuned)
    configs = read_configs(args, settings, tuned, run)
    folder = RunFolder(args.out or in_run((run or HOME) / "evaluation"))
    check_out(folder, args.overwrite)
    rows = read_rows(args.prompts, configs[0], run, settings)
    check_base(configs[0])
    for measure in measures_of(configs[0]):
        measure.load()
    steer = None if args.steer is None else read_steer(args.steer, configs[0])
    strengths, batch = args.strength if tuned else [], args.batch or configs[0].train.rollout_batch
    device = find_device(args.device)
    return Plan(configs, tuned, run, rows, strengths, steer, folder, args.pictures, batch, device)


def check_numbers(args: argparse.Namespace) -> None:
    """Raises: UsageError on options out of range, and on one that is given twice."""
    if (args.batch is not None and args.batch < 1) or args.pictures < 0:
        raise UsageError("--batch must be at least 1, and --pictures at least 0")
    for name in ("steps", "samplers", "strength"):
        values = getattr(args, name)
        if twice := [value for value in values if values.count(value) > 1]:
            raise UsageError(f"--{name} has {twice[0]} twice")
    if args.json:
        check_json(args.json)


def check_strengths(strengths: Sequence[float], tuned: Path | None) -> None:
    """Raises: UsageError on strengths that are not valid."""
    if not all(map(math.isfinite, strengths)):
        raise UsageError(f"--strength must be finite numbers, got {' '.join(map(str, strengths))}")
    if list(strengths) != [1] and (tuned is None or tuned.is_dir()):
        why = f"{tuned} holds a network of points" if tuned else "none is named"
        raise UsageError(f"--strength is of a LoRA, and {why}")


def read_configs(args: argparse.Namespace, settings: list[str], tuned: Path | None, run: Path | None) -> list[Config]:
    """A config for each sampler.

    Raises: UsageError on invalid settings and samplers, and when nothing says what to measure.
    """
    from condrl.training.build import make_sampler, stand_in

    if tuned and run is None:
        check_alone(tuned, settings, args.prompts)
        settings = settings if tuned.is_dir() else with_rank(tuned, settings)
    file = run / "config.yaml" if run else default_config(settings)
    overrides = [[*settings, *more] for more in sampler_overrides(args.samplers, args.steps)]
    configs = [load_for_evaluation(file, each, args.trust) for each in overrides]
    samplers = [config.evaluate.sampler or config.sampler for config in configs]
    for section in samplers:
        make_sampler(section, stand_in(section))
        if samplers.count(section) > 1:
            raise UsageError(f"--samplers: two of them are the same, {section}")
    return configs


def check_alone(tuned: Path, settings: Sequence[str], prompts: str | None) -> None:
    """Raises: UsageError when a LoRA without a run comes without a measure or prompts."""
    measured = [setting for setting in settings if re.match(r"rewards\b|evaluate\.measures\b", setting)]
    if not measured or not prompts:
        raise UsageError(
            f"{tuned} belongs to no run, so nothing says what to measure: name a measure and prompts, as in "
            "rewards.clip.weight=1 --prompts my_prompts.txt, and the model with model.path="
        )


def sampler_overrides(samplers: Sequence[str], steps: Sequence[int]) -> list[list[str]]:
    """The settings of each sampler with each number of steps.

    Raises: UsageError on what is not NAME or NAME,option=value.
    """
    named: list[list[str]] = []
    for sampler in samplers:
        name, options = read_named(sampler, "--samplers", "ddim,eta=0")
        named.append([f"evaluate.sampler.{option}" for option in (f"name={name}", *options)])
    counts = [[f"evaluate.sampler.steps={count}"] for count in steps]
    return [[*one, *other] for one, other in itertools.product(named or [[]], counts or [[]])]


def read_rows(prompts: str | None, config: Config, run: Path | None, settings: Sequence[str]) -> list[Row]:
    """The prompts to measure on.

    Raises: UsageError when there are none.
    """
    from condrl.prompts import load_prompts

    if not prompts and not config.prompts.heldout:
        raise UsageError(f"{run or 'the base model'} has no held-out prompts: give --prompts FILE")
    given = (prompts, "--prompts") if prompts else (config.prompts.heldout or "", "prompts.heldout")
    rows = load_prompts(*given)
    is_counted = not prompts or any(setting_keys(setting) == ["evaluate", "prompts"] for setting in settings)
    rows = rows[: config.evaluate.prompts] if is_counted else rows
    if run and exists(locate(config.prompts.train)):
        warn_of_training_prompts(rows, load_prompts(config.prompts.train, "prompts.train"))
    return rows


def warn_of_training_prompts(rows: Sequence[Row], train: Sequence[Row]) -> None:
    both = {row.prompt for row in rows} & {row.prompt for row in train}
    if both:
        print_main(f"warning: {len(both)} of the prompts were trained on, such as {min(both)!r}")


def check_base(config: Config) -> None:
    """Raises: UsageError when the LoRA that a run started from is gone."""
    from condrl.models.lora import find_lora

    if lora := config.model.get("lora"):
        try:
            find_lora(locate(lora))
        except UsageError as error:
            raise UsageError(
                f"the run started from a LoRA, which is its base, and {error}; model.lora=null compares with the model"
            ) from error


def check_out(folder: RunFolder, is_replaced: bool) -> None:
    """Raises: UsageError when nothing can be written there, or something would be lost."""
    check_folder(folder.path)
    there = sorted(path.name for path in folder.path.iterdir()) if folder.path.is_dir() else []
    if there and RECORD not in folder.listed:
        raise UsageError(f"{folder.path} holds {there[0]}, which no evaluation wrote: choose another folder with --out")
    if there and not is_replaced:
        raise UsageError(f"{folder.path} holds an evaluation: choose another folder with --out, or --overwrite it")


def measures_of(config: Config) -> list[Reward]:
    """The run's measures, or those that were named.

    Raises: UsageError when there are none, or when one cannot be made.
    """
    from condrl.training.build import make_measures

    if measures := make_measures(config):
        return measures
    raise UsageError("there is nothing to measure: name a measure, as in evaluate.measures.brightness={}")
