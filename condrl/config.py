"""A tree of values -> one typed, checked Config, and back to YAML; every error is a single line.

`model`, `sampler` and `algorithm` hold a plugin's name and its options; `rewards` and `evaluate.measures` map a
reward's name to its weight and options.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from condrl.errors import UsageError
from condrl.io.files import exists, expanded, locate
from condrl.io.overrides import escaped, one_line
from condrl.io.plugin_files import load_file
from condrl.registry import REGISTRIES, Option, Plugin, comments, suggestion, type_hints

Spacing = Literal["leading", "linspace", "trailing", "uniform", "log_snr"]


@dataclass
class RunConfig:
    name: str = "run"  # the run's folder is runs/<name>
    dir: str | None = None  # the run's folder, instead of runs/<name>
    seed: int = 0  # of everything that is drawn at random
    threads: int | None = None  # CPU threads; null: torch's own choice
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)  # where else to log
    overwrite: bool = False  # replace what an earlier run left in the folder
    check_ratios: bool = True  # stop unless every likelihood ratio is 1 before the first update
    resume: str = "never"  # auto: from the newest checkpoint in the run's folder; or a checkpoint's folder
    checkpoint_seconds: float = 60.0  # least time between checkpoints, each written at the end of an epoch
    keep_checkpoints: int = 2  # how many of the newest to keep


@dataclass
class PromptsConfig:
    train: str = ""  # .txt (a prompt per line), .jsonl (rows with "prompt" and metadata), or a folder of pairs
    heldout: str | None = None  # prompts never trained on, for evaluation
    validation: str | None = None  # others, by which the best epoch is chosen (with evaluate.every); null: none is


@dataclass
class TrainConfig:
    epochs: int = 100  # roll-outs, each followed by its updates
    prompts_per_epoch: int = 8  # prompts rolled out in an epoch, distinct if there are as many
    images_per_prompt: int = 8  # a group: images of one prompt row in an epoch
    rollout_batch: int = 64  # images denoised together
    rollout_dtype: Literal["auto", "bfloat16", "float16"] | None = None  # of roll-outs; null: model's; auto: the faster
    updates_per_epoch: int = 2  # optimiser steps in a pass over the epoch's images
    inner_epochs: int = 1  # passes over the epoch's images
    normalise_rewards: bool = False  # each over its standard deviation in the epoch, so that weights compare
    steps: list[int] | None = None  # indices of the denoising steps that are trained; null: all
    window: int | None = None  # neighbouring steps with noise, which move with each epoch; others have none; null: all
    same_start: bool = False  # start the images of a prompt from the same noise, so that only their steps' differ
    steps_per_image: int | None = None  # how many of them to train per image, redrawn in each pass; null: all
    loss_batch: int = 64  # (image, step) pairs in one forward and backward, at most
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"  # adamw8bit: bitsandbytes', whose moments take a quarter
    lr: float = 3e-4  # AdamW learning rate
    warmup: int = 0  # optimiser steps of linear warm-up
    lr_decay: Literal["none", "linear"] = "none"  # linear: to zero at the last optimiser step
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW moments
    weight_decay: float = 1e-4  # AdamW weight decay
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm
    kl_budget: float | None = None  # nats of path KL to the base model that a run may spend; null: no limit
    over_budget: Literal["stop", "adapt"] = "stop"  # beyond it, end the run; or raise algorithm.kappa until it is met
    ema: float = 0.0  # decay, at each update, of an average of the weights, which is measured and saved; 0: the newest
    patience: int | None = None  # end after this many evaluations on validation prompts without a better one
    max_failed: float = 0.1  # stop when a larger share of an epoch's scores failed; fewer are left out
    max_bad_updates: int = 3  # stop after this many in a row whose gradient is not finite; fewer are skipped


@dataclass
class EvaluateConfig:
    measures: dict[str, Any] = field(default_factory=dict)  # rewards to report on held-out prompts: name -> options
    sampler: dict[str, Any] = field(default_factory=dict)  # what differs from the sampler that tunes
    prompts: int | None = None  # how many of the held-out prompts, from the first; null: all
    every: int | None = None  # also every this many epochs, to see whether the reward is exploited; null: never
    images_per_prompt: int = 1  # each with its own seed, the same for base and tuned
    pictures: int = 8  # images in the before | after picture


@dataclass
class GridConfig:
    steps: int = 50  # denoising steps
    spacing: Spacing | None = None  # of their times; null: the model scheduler's, or uniform if it has none
    noise_steps: list[int] | None = None  # the steps that keep their noise, the others being deterministic; null: all


@dataclass
class MeasureConfig:
    batch: int = 64  # images scored at a time


@dataclass
class RewardConfig(MeasureConfig):
    weight: float = 1.0  # in the sum of rewards
    smoothing: float = 0.0  # score the worst image within this root mean square distance; 0: the image itself


@dataclass
class Config:
    model: Any = field(default_factory=dict)  # name and options, as `condrl plugins` lists them
    sampler: Any = field(default_factory=dict)  # name and options
    algorithm: Any = field(default_factory=dict)  # name and options
    rewards: dict[str, Any] = field(default_factory=dict)  # reward name -> weight and options
    plugins: list[str] = field(default_factory=list)  # your own plugin files
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def folder(self) -> Path:
        return expanded(self.run.dir or f"runs/{self.run.name}")

    @property
    def weighted(self) -> list[str]:
        """The rewards whose weight is not zero."""
        return [name for name, options in self.rewards.items() if options["weight"] != 0]

    @property
    def images_per_epoch(self) -> int:
        return self.train.prompts_per_epoch * self.train.images_per_prompt

    def pairs_at_once(self, steps: int, processes: int) -> int:
        """(image, step) pairs in one forward and backward, where `steps` of an image's steps can be trained.

        The fewest that `loss_batch` allows of equal parts of a process's update.
        """
        train = self.train
        images = math.ceil(self.images_per_epoch / train.updates_per_epoch / processes)
        pairs = images * (train.steps_per_image or steps)
        return math.ceil(pairs / math.ceil(pairs / train.loss_batch))


SECTIONS: dict[str, Any] = {
    "prompts": PromptsConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "run": RunConfig,
}
PATHS = ("path", "lora", "single_file_config", "images")  # options that name a file or folder, if there is one
WITH_LORA = " with the LoRA "  # between a base model and the LoRA that a run starts from
GRID = tuple(f.name for f in dataclasses.fields(GridConfig))  # options that every sampler has
DEFAULT_PLUGINS = {"model": "stable_diffusion", "sampler": "ddim", "algorithm": "ddpo"}


# ---------------------------------------------------------------------------------------------- building


def build_config(tree: Mapping[str, Any]) -> Config:
    """A plain dictionary -> Config, with each plugin's options checked against its parameters."""
    tree = dict(tree)
    for name in SECTIONS:
        tree[name] = _section(tree.get(name), name)
    plugin_sections = {kind: tree.pop(kind, {}) for kind in DEFAULT_PLUGINS}
    rewards, measures = (
        _section(tree.pop("rewards", {}), "rewards"),
        _section(tree["evaluate"].pop("measures", {}), "evaluate.measures"),
    )
    deployed = _section(tree["evaluate"].pop("sampler", {}), "evaluate.sampler")
    config: Config = _typed(Config, tree, "")
    for path in config.plugins:
        load_file(path)
    for kind, section in plugin_sections.items():
        setattr(config, kind, _plugin_section(kind, section))
    if deployed:
        config.evaluate.sampler = _deployed_sampler(config.sampler, deployed)
    config.rewards = _reward_sections(rewards, "rewards", RewardConfig)
    config.evaluate.measures = _reward_sections(measures, "evaluate.measures", MeasureConfig)
    check_settings(config)
    return config


def _section(values: Any, where: str) -> dict[str, Any]:
    """Raises: UsageError when what should be a section of keys is something else."""
    if values is not None and not isinstance(values, Mapping):
        raise UsageError(f"config {where}: expected a section of keys, got {values!r}")
    return dict(values or {})


def _typed(schema: Any, values: Mapping[str, Any], where: str) -> Any:
    """Check `values` against a dataclass."""
    _check_values(values, schema, where)
    for name, value in values.items():
        if value == MISSING:
            raise UsageError(f"config {where}.{name}: ??? stands for a value that must be given")
    try:
        structure = OmegaConf.structured(schema)
    except OmegaConfBaseException as error:
        raise UsageError(f"config {where}: a parameter of this plugin cannot be set: {one_line(error)}") from error
    merged = _merge(structure, _escaped(dict(values)), where)  # references were resolved before
    _check_numbers(merged, where)
    return OmegaConf.to_object(merged)


def _merge(schema: Any, values: Any, where: str) -> Any:
    """OmegaConf.merge with one-line errors that start with `where`."""
    try:
        return OmegaConf.merge(schema, values)
    except ConfigKeyError as error:
        *parents, key = str(error.full_key).split(".")
        known = list(map(str, OmegaConf.select(schema, ".".join(parents)) if parents else schema))
        known += ["name"] if where in (*DEFAULT_PLUGINS, "evaluate.sampler") else []
        at = ".".join(filter(None, (where, *parents, key)))
        near = suggestion(key, known) or f" Available: {', '.join(known)}"
        raise UsageError(f"config {at}: there is no such key.{near}") from error
    except OmegaConfBaseException as error:
        key = ".".join(part for part in (where, getattr(error, "full_key", None) or "") if part)
        raise UsageError(f"config {key}: {one_line(error)}") from error
    except (TypeError, ValueError, OverflowError) as error:  # OmegaConf's own, where a list or value meets a section
        raise UsageError(f"{f'config {where}'.strip()}: {one_line(error)}") from error


def _check_numbers(value: Any, where: str) -> None:
    """Raises: UsageError on a number that is not finite, also within lists and mappings."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"config {where}: must be a finite number, got {value}")
    if isinstance(value, DictConfig):
        for key in [key for key in value if not OmegaConf.is_missing(value, key)]:
            _check_numbers(value[key], f"{where}.{key!s}".lstrip("."))
    elif isinstance(value, ListConfig):
        for item in value:
            _check_numbers(item, where)


def _check_values(values: Any, schema: Any, where: str) -> None:
    """Raises: UsageError as `check_value` does, for a value of a dataclass or of one within it."""
    for name, kind in type_hints(schema).items() if isinstance(values, Mapping) else ():
        key = f"{where}.{name}".lstrip(".")
        if dataclasses.is_dataclass(kind):
            _check_values(values.get(name), kind, key)
        check_value(values.get(name), kind, key)


def check_value(value: Any, kind: Any, where: str) -> None:
    """Raises: UsageError on a number that says neither yes nor no, a value instead of a list, or a list of others."""
    if kind is bool and isinstance(value, int | float) and value not in (0, 1):
        raise UsageError(f"config {where}: expected true or false, got {value}")
    kinds = [part for part in (kind, *typing.get_args(kind)) if typing.get_origin(part) in (list, tuple)]
    if value is None or not kinds:
        return
    if not isinstance(value, list | tuple | ListConfig):
        raise UsageError(f"config {where}: expected a list, as in {where}=[" + str(value) + "]")
    items = typing.get_args(kinds[0])
    if typing.get_origin(kinds[0]) is tuple and ... not in items and len(value) != len(items):
        raise UsageError(f"config {where}: expected {len(items)} values, got {list(value)}")
    other = (list, tuple, dict, ListConfig, DictConfig) if items[0] is str else bool if items[0] in (int, float) else ()
    if odd := [item for item in value if isinstance(item, other)]:
        kind = "text" if items[0] is str else "a number"
        raise UsageError(f"config {where}: expected {kind} in the list, got {odd[0]!r}")


def _plugin_section(kind: str, section: Any) -> dict[str, Any]:
    if section is None:
        raise UsageError(f"config {kind}: is null; leave it out for {DEFAULT_PLUGINS[kind]}, or give a name")
    options = {"name": section} if isinstance(section, str) else _section(section, kind)
    name = str(options.pop("name", DEFAULT_PLUGINS[kind]))
    common = GridConfig if kind == "sampler" else None
    return {"name": name, **typed_options(REGISTRIES[kind].find(name), options, kind, common)}


def _deployed_sampler(sampler: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The sampler that tunes with what `evaluate.sampler` changes; another sampler keeps the time grid only."""
    same = changes.get("name", sampler["name"]) == sampler["name"]
    kept = sampler if same else {name: sampler[name] for name in GRID}
    if changes.get("steps", sampler["steps"]) != sampler["steps"]:
        kept = {**kept, "noise_steps": None}  # they were counted on another grid
    options = {**kept, **changes}
    name = str(options.pop("name"))
    return {"name": name, **typed_options(REGISTRIES["sampler"].find(name), options, "evaluate.sampler", GridConfig)}


def _reward_sections(rewards: Mapping[str, Any], where: str, common: type[MeasureConfig]) -> dict[str, Any]:
    """Options of each reward by name.

    Raises: UsageError also on a batch that is not positive.
    """
    find = REGISTRIES["reward"].find
    found = {
        name: typed_options(find(name), _section(options, f"{where}.{name}"), f"{where}.{name}", common)
        for name, options in rewards.items()
    }
    for name, options in found.items():
        if options["batch"] < 1:
            raise UsageError(f"config {where}.{name}.batch: must be at least 1, got {options['batch']}")
        _check_smoothing(find(name), options.get("smoothing", 0.0), f"{where}.{name}.smoothing")
    return found


def _check_smoothing(plugin: Plugin, distance: float, where: str) -> None:
    """Raises: UsageError on a negative distance, and on one for a reward without a gradient of single images."""
    if distance < 0:
        raise UsageError(f"config {where}: must be at least 0, got {distance}")
    if distance > 0 and not (plugin.differentiable and plugin.per == "image"):
        what = "looks at all images of a prompt together" if plugin.differentiable else "has no gradient"
        raise UsageError(
            f"config {where}: the worst image nearby is found by a gradient, and {plugin.name} {what}: leave it out"
        )


def typed_options(plugin: Plugin, values: Mapping[str, Any], where: str, common: type | None = None) -> dict[str, Any]:
    """Check options against a plugin's keyword-only parameters and the fields of `common`; fill in the defaults."""
    options = plugin.options
    missing = [o.name for o in options.values() if o.default is inspect.Parameter.empty and o.name not in values]
    if missing:
        raise UsageError(f"config {where}: {plugin.name} needs {', '.join(missing)}")
    schema = make_dataclass("Options", map(_field_of, options.values()), bases=(common,) if common else ())
    return vars(_typed(schema, dict(values), where))


def _field_of(option: Option) -> tuple[str, Any, Any]:
    if option.default is inspect.Parameter.empty:
        return option.name, option.type, field(default=MISSING)
    return option.name, option.type, field(default_factory=lambda: copy.copy(option.default))


# ---------------------------------------------------------------------------------------------- checks


def check_settings(config: Config) -> None:
    """Raises: UsageError on the first setting that cannot be used, whatever the plugins are."""
    check_ranges(config)
    check_run_name(config.run)
    check_effects(config)
    check_divisible(config)


def check_ranges(config: Config) -> None:
    """Raises: UsageError on a number that is out of its range."""
    train, evaluate, run = config.train, config.evaluate, config.run
    loop = ("epochs", "prompts_per_epoch", "images_per_prompt", "rollout_batch", "updates_per_epoch", "inner_epochs")
    for where, section, names in (
        ("train", train, (*loop, "loss_batch", "max_bad_updates", "steps_per_image", "patience")),
        ("evaluate", evaluate, ("images_per_prompt", "prompts", "every")),
        ("run", run, ("keep_checkpoints", "threads")),
    ):
        for name in names:
            value = getattr(section, name)
            if value is not None and value < 1:
                raise UsageError(f"config {where}.{name}: must be at least 1, got {value}")
    for where, value in (
        ("train.warmup", train.warmup),
        ("train.weight_decay", train.weight_decay),
        ("evaluate.pictures", evaluate.pictures),
        ("run.checkpoint_seconds", run.checkpoint_seconds),
    ):
        if value < 0:
            raise UsageError(f"config {where}: must be at least 0, got {value}")
    for name in ("lr", "max_grad_norm", "kl_budget"):
        value = getattr(train, name)
        if value is not None and value <= 0:
            raise UsageError(f"config train.{name}: must be above 0, got {value}")
    for name in ("max_failed", "ema"):
        if not 0 <= getattr(train, name) < 1:
            raise UsageError(f"config train.{name}: must be in [0, 1), got {getattr(train, name)}")
    if not all(0 <= beta < 1 for beta in train.betas):
        raise UsageError(f"config train.betas: must be in [0, 1), got {list(train.betas)}")
    if not 0 <= run.seed < 2**64:
        raise UsageError(f"config run.seed: must be in [0, 2^64), got {run.seed}")


def check_run_name(run: RunConfig) -> None:
    """Raises: UsageError when a run's folder has no usable name."""
    if not run.dir and (Path(run.name).name != run.name or run.name in ("", "..")):
        raise UsageError(f"config run.name: {run.name!r} is not the name of a folder; a path goes into run.dir")
    if run.dir and run.dir.startswith("~") and str(expanded(run.dir)).startswith("~"):
        raise UsageError(f"config run.dir: {run.dir}: there is no user of that name")


def check_effects(config: Config) -> None:
    """Raises: UsageError on a setting that has no effect without another."""
    train, prompts, every = config.train, config.prompts, config.evaluate.every
    if train.kl_budget is None and train.over_budget != "stop":
        raise UsageError("config train.over_budget: has no effect without train.kl_budget")
    if train.patience is not None and not (prompts.validation and every):
        raise UsageError("config train.patience: has no effect without prompts.validation and evaluate.every")
    if prompts.validation and not every:
        raise UsageError("config prompts.validation: has no effect without evaluate.every")


def check_divisible(config: Config) -> None:
    """Raises: UsageError when an epoch's images do not divide into its updates or its batches."""
    train, images = config.train, config.images_per_epoch
    sentence = f"{train.prompts_per_epoch} prompts x {train.images_per_prompt} images = {images} images per epoch"
    if images % train.updates_per_epoch:
        raise UsageError(
            f"config train.updates_per_epoch: {sentence}, not divisible by {train.updates_per_epoch} updates"
        )
    if images % train.rollout_batch and images > train.rollout_batch:
        raise UsageError(f"config train.rollout_batch: {sentence}, not divisible by batches of {train.rollout_batch}")


# ---------------------------------------------------------------------------------------------- writing


def to_yaml(config: Config) -> str:
    """The resolved config, loadable from any folder."""
    tree = dataclasses.asdict(config)
    tree["plugins"] = [str(expanded(path).resolve()) for path in config.plugins]
    tree["prompts"] = {name: from_anywhere(path) for name, path in tree["prompts"].items()}
    tree["run"]["dir"] = config.run.dir and str(config.folder.absolute())
    rewards = [*tree["rewards"].values(), *tree["evaluate"]["measures"].values()]
    for section in [tree["model"], tree["sampler"], tree["algorithm"], *rewards]:
        for name in section.keys() - {"name"}:
            section[name] = from_anywhere(section[name], name in PATHS)
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(tree)))


def _escaped(value: Any) -> Any:
    """The value with its texts escaped, so that they are read back unchanged."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(item) for item in value]
    return escaped(value) if isinstance(value, str) else value


def from_anywhere(value: Any, is_path: bool = True) -> Any:
    """The absolute path of a text that names an existing file or folder, and of such texts in a list.

    If the option need not be a path, only a text that looks like one counts: with a separator or a suffix, or naming a
    folder with JSON files.
    """
    if isinstance(value, list | tuple):
        return [from_anywhere(item, is_path) for item in value]
    if not isinstance(value, str) or not value or value.startswith("asset:") or not exists(locate(value)):
        return value
    path = locate(value)
    looks = "/" in value or "\\" in value or path.suffix or any(path.glob("*.json"))
    return str(path.resolve()) if is_path or looks else value


def base_name(model: Mapping[str, Any]) -> str:
    """The model of a config's section, which a run is compared with, and the LoRA that it starts from, if any."""
    lora = model.get("lora")
    return str(model.get("path") or model.get("name")) + (f"{WITH_LORA}{lora}" if lora else "")


def config_help() -> str:
    """Every key of the config with its default and comment, as YAML."""
    lines = [f"{f.name}:  # {comments(Config)[f.name]}" for f in dataclasses.fields(Config) if f.name not in SECTIONS]
    for name, schema in SECTIONS.items():
        notes, defaults = comments(schema), dataclasses.asdict(schema())
        lines += [
            f"{name}:",
            *(f"  {key}: {json.dumps(value)}  # {notes.get(key, '')}" for key, value in defaults.items()),
        ]
    return "\n".join(lines)
