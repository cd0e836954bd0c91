"""YAML files and `key=value` words -> one typed, checked Config; every complaint is a single line.

Later words win. `model`, `sampler` and `algorithm` hold a plugin's name and its options; `rewards` and
`evaluate.measures` map a reward's name to its weight and options.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from condrl.errors import UsageError
from condrl.registry import REGISTRIES, Option, Plugin, comments, load_file

Spacing = Literal["leading", "linspace", "trailing", "uniform", "log_snr"]
ASSETS = Path(__file__).parent / "assets"


@dataclass
class RunConfig:
    name: str = "run"  # the run's folder is runs/<name>
    dir: str | None = None  # another folder for the run
    seed: int = 0  # of everything that is drawn at random
    threads: int | None = None  # CPU threads; null: torch's own choice
    trackers: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)  # where else to log
    overwrite: bool = False  # replace what an earlier run left in the folder
    check_ratios: bool = True  # stop unless every likelihood ratio is 1 before the first update
    resume: str = "never"  # auto: go on from the newest checkpoint in the run's folder; or a checkpoint's folder
    checkpoint_seconds: float = 60.0  # write a checkpoint after the first epoch that ends so long after the last one
    keep_checkpoints: int = 2  # the newest so many


@dataclass
class PromptsConfig:
    train: str = ""  # a .txt file (a prompt per line) or .jsonl (rows with "prompt" and metadata)
    heldout: str | None = None  # prompts never trained on, for evaluation


@dataclass
class TrainConfig:
    epochs: int = 100  # roll-outs, each followed by its updates
    prompts_per_epoch: int = 8  # distinct prompts rolled out in an epoch
    images_per_prompt: int = 8  # a group: images of one prompt row in an epoch
    rollout_batch: int = 64  # images denoised together
    updates_per_epoch: int = 2  # optimiser steps in a pass over the epoch's images
    inner_epochs: int = 1  # passes over the epoch's images
    normalise_rewards: bool = False  # each over its standard deviation in the epoch, so that weights compare
    steps: list[int] | None = None  # indices of the denoising steps that are trained; null: all
    steps_per_image: int | None = None  # so many of them per image, drawn anew in each pass; null: all
    loss_batch: int = 64  # (image, step) pairs in one forward and backward
    lr: float = 3e-4  # AdamW learning rate
    warmup: int = 0  # optimiser steps of linear warm-up
    lr_decay: Literal["none", "linear"] = "none"  # linear: to zero at the last optimiser step
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW moments
    weight_decay: float = 1e-4  # AdamW weight decay
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm
    kl_budget: float | None = None  # nats of path KL to the base model that a run may spend; null: any number
    over_budget: Literal["stop", "adapt"] = "stop"  # then end the run; or raise algorithm.kappa, until it is kept
    max_failed: float = 0.1  # stop when more than this share of an epoch's scores failed; fewer are left out
    max_bad_updates: int = 3  # stop after so many in a row whose gradient is not finite; fewer are skipped


@dataclass
class EvaluateConfig:
    measures: dict[str, Any] = field(default_factory=dict)  # rewards to report on held-out prompts: name -> options
    sampler: dict[str, Any] = field(default_factory=dict)  # where it differs from the sampler that tunes
    prompts: int | None = None  # the first so many held-out prompts; null: all
    every: int | None = None  # also after each so many epochs, to see whether the reward is exploited; null: not
    images_per_prompt: int = 1  # each with its own seed, the same for base and tuned
    pictures: int = 8  # images in the before | after picture


@dataclass
class GridConfig:
    steps: int = 50  # denoising steps
    spacing: Spacing | None = None  # of their times; null: as the model's scheduler, or uniform where it has none
    noise_steps: list[int] | None = None  # the steps that keep their noise, the others being deterministic; null: all


@dataclass
class WeightConfig:
    weight: float = 1.0  # in the sum of rewards


@dataclass
class Config:
    model: Any = field(default_factory=dict)  # name and options; see scripts/plugins.py
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
        return Path(self.run.dir or f"runs/{self.run.name}")

    @property
    def images_per_epoch(self) -> int:
        return self.train.prompts_per_epoch * self.train.images_per_prompt


SECTIONS: dict[str, Any] = {
    "prompts": PromptsConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "run": RunConfig,
}
COUNTS = (
    "epochs",
    "prompts_per_epoch",
    "images_per_prompt",
    "rollout_batch",
    "updates_per_epoch",
    "inner_epochs",
    "loss_batch",
    "max_bad_updates",
)
DEFAULT_PLUGINS = {"model": "stable_diffusion", "sampler": "ddim", "algorithm": "ddpo"}


# ---------------------------------------------------------------------------------------------- loading


def load_config(words: Sequence[str]) -> Config:
    """Merge YAML files and `key=value` words, look up the plugins they name, and check everything.

    Raises: UsageError, in one line, on an unknown key, a wrong type, a missing file or an unknown plugin.
    """
    parts = [(word, _read(word)) for word in words]
    merged = _merged(_without_replaced_plugins(parts, _merged(parts)))
    try:
        tree: Any = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:  # a ${reference} that leads nowhere
        raise UsageError(f"config: {_one_line(error)}") from error
    return build_config(tree)


def _merged(parts: Sequence[tuple[str, DictConfig]]) -> Any:
    merged = OmegaConf.create({})
    for word, values in parts:
        merged = _merge(merged, values, word)
    return merged


def _without_replaced_plugins(parts: Sequence[tuple[str, DictConfig]], merged: Any) -> list[tuple[str, DictConfig]]:
    """The parts, without a file's options for a plugin whose place a later word gives to another plugin."""
    kept = []
    for word, values in parts:
        for kind in () if is_setting(word) else DEFAULT_PLUGINS:
            name = _plugin_name(values.get(kind))
            if name and name != _plugin_name(merged.get(kind)):
                common = [f.name for f in dataclasses.fields(GridConfig)] if kind == "sampler" else []
                values = copy.deepcopy(values)
                values[kind] = {key: values[kind][key] for key in common if key in values[kind]}
        kept.append((word, values))
    return kept


def _plugin_name(section: Any) -> Any:
    return section.get("name") if isinstance(section, DictConfig) else section


def is_setting(word: str) -> bool:
    """Whether a word of a command line is `key=value` rather than a file."""
    return bool(re.match(r"[\w.:\[\]-]+=", word)) and not Path(word).exists()


def _read(word: str) -> DictConfig:
    if is_setting(word):
        try:
            return OmegaConf.from_dotlist([word])
        except Exception as error:  # OmegaConf passes on whatever its YAML parser raises
            raise UsageError(f"cannot read {word!r}: {_one_line(error)}") from error
    if not Path(word).is_file():
        raise UsageError(f"there is no config file {word}; settings are written key=value")
    try:
        loaded = OmegaConf.load(word)
    except Exception as error:
        raise UsageError(f"cannot read {word}: {_one_line(error)}") from error
    if not isinstance(loaded, DictConfig):
        raise UsageError(f"{word} is not a config: it should hold keys such as model, sampler, rewards, train")
    return loaded


def _merge(schema: Any, values: Any, where: str) -> Any:
    """OmegaConf.merge with one-line complaints that start with `where`."""
    try:
        return OmegaConf.merge(schema, values)
    except OmegaConfBaseException as error:
        key = ".".join(part for part in (where, getattr(error, "full_key", None) or "") if part)
        raise UsageError(f"config {key}: {_one_line(error)}") from error
    except (TypeError, ValueError) as error:  # OmegaConf's own, where a list or value meets a section
        raise UsageError(f"config {where}: {_one_line(error)}") from error


def _section(values: Any, where: str) -> dict[str, Any]:
    """Raises: UsageError when what should be a section of keys is something else."""
    if values is not None and not isinstance(values, Mapping):
        raise UsageError(f"config {where}: expected a section of keys, got {values!r}")
    return dict(values or {})


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
    config.rewards = _reward_sections(rewards, "rewards", WeightConfig)
    config.evaluate.measures = _reward_sections(measures, "evaluate.measures")
    check_arithmetic(config)
    return config


def _typed(schema: Any, values: Mapping[str, Any], where: str) -> Any:
    """Check `values` against a dataclass."""
    merged = _merge(OmegaConf.structured(schema), dict(values), where)
    return OmegaConf.to_object(merged)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split("full_key:")[0].split()) or type(error).__name__
    return re.sub(r"^Key '[^']+' not in '\w+'\.?", "there is no such key.", text)


def _plugin_section(kind: str, section: Any) -> dict[str, Any]:
    options = {"name": section} if isinstance(section, str) else _section(section, kind)
    name = str(options.pop("name", DEFAULT_PLUGINS[kind]))
    common = GridConfig if kind == "sampler" else None
    return {"name": name, **typed_options(REGISTRIES[kind].find(name), options, kind, common)}


def _deployed_sampler(sampler: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The sampler that tunes with what `evaluate.sampler` changes; another sampler takes over the time grid only."""
    same = changes.get("name", sampler["name"]) == sampler["name"]
    kept = sampler if same else {f.name: sampler[f.name] for f in dataclasses.fields(GridConfig)}
    if changes.get("steps", sampler["steps"]) != sampler["steps"]:
        kept = {**kept, "noise_steps": None}  # they were counted on another grid
    options = {**kept, **changes}
    name = str(options.pop("name"))
    return {"name": name, **typed_options(REGISTRIES["sampler"].find(name), options, "evaluate.sampler", GridConfig)}


def _reward_sections(rewards: Mapping[str, Any], where: str, common: type | None = None) -> dict[str, Any]:
    """Options of each reward by name."""
    find = REGISTRIES["reward"].find
    return {
        name: typed_options(find(name), _section(options, f"{where}.{name}"), f"{where}.{name}", common)
        for name, options in rewards.items()
    }


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


def check_arithmetic(config: Config) -> None:
    """Raises: UsageError when a batch does not divide what it splits, or a count is not positive."""
    train, images = config.train, config.images_per_epoch
    counts = (
        ("train", train, COUNTS),
        ("evaluate", config.evaluate, ("images_per_prompt",)),
        ("run", config.run, ("keep_checkpoints",)),
    )
    for where, section, names in counts:
        for name in names:
            if getattr(section, name) < 1:
                raise UsageError(f"config {where}.{name}: must be at least 1, got {getattr(section, name)}")
    for name in ("lr", "max_grad_norm"):
        if getattr(train, name) <= 0:
            raise UsageError(f"config train.{name}: must be above 0, got {getattr(train, name)}")
    if not config.run.dir and (Path(config.run.name).name != config.run.name or config.run.name in ("", "..")):
        raise UsageError(f"config run.name: {config.run.name!r} is not the name of a folder; a path goes into run.dir")
    for where, value in (("train.kl_budget", train.kl_budget), ("evaluate.every", config.evaluate.every)):
        if value is not None and value <= 0:
            raise UsageError(f"config {where}: must be above 0, got {value}")
    if not 0 <= train.max_failed < 1:
        raise UsageError(f"config train.max_failed: must be in [0, 1), got {train.max_failed}")
    if not all(0 <= beta < 1 for beta in train.betas):
        raise UsageError(f"config train.betas: must be in [0, 1), got {list(train.betas)}")
    sentence = f"{train.prompts_per_epoch} prompts x {train.images_per_prompt} images = {images} images per epoch"
    if images % train.updates_per_epoch:
        raise UsageError(
            f"config train.updates_per_epoch: {sentence}, not divisible by {train.updates_per_epoch} updates"
        )
    if images % train.rollout_batch and images > train.rollout_batch:
        raise UsageError(f"config train.rollout_batch: {sentence}, not divisible by batches of {train.rollout_batch}")


def locate(path: str) -> Path:
    """A path as the user wrote it; `asset:NAME` lies in the package's own assets."""
    return ASSETS / path.removeprefix("asset:") if path.startswith("asset:") else Path(path).expanduser()


# ---------------------------------------------------------------------------------------------- writing


def to_yaml(config: Config) -> str:
    """The resolved config, loadable again from any folder."""
    tree = dataclasses.asdict(config)
    tree["plugins"] = [str(Path(path).expanduser().resolve()) for path in config.plugins]
    for name, path in tree["prompts"].items():
        tree["prompts"][name] = str(locate(path).resolve()) if path and not path.startswith("asset:") else path
    return OmegaConf.to_yaml(OmegaConf.create(tree))


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
