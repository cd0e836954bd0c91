"""YAML files and `key=value` overrides -> one typed, checked Config; every error is a single line.

Later ones win. `model`, `sampler` and `algorithm` hold a plugin's name and its options; `rewards` and
`evaluate.measures` map a reward's name to its weight and options.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import math
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from condrl.errors import UsageError
from condrl.io.files import expanded, locate
from condrl.overrides import (
    Part,
    escaped,
    exists,
    mapping,
    merged,
    one_line,
    read_argument,
    retyped,
    section_at,
    setting_keys,
)
from condrl.registry import REGISTRIES, Option, Plugin, comments, load_file, suggestion, type_hints

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
    train: str = ""  # a .txt file (a prompt per line) or .jsonl (rows with "prompt" and metadata)
    heldout: str | None = None  # prompts never trained on, for evaluation
    validation: str | None = None  # others, by which the best epoch is chosen (with evaluate.every); null: none is


@dataclass
class TrainConfig:
    epochs: int = 100  # roll-outs, each followed by its updates
    prompts_per_epoch: int = 8  # distinct prompts rolled out in an epoch
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
    loss_batch: int = 64  # (image, step) pairs in one forward and backward
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
PATHS = ("path", "lora", "single_file_config", "images")  # options that name a file or folder, if there is one
EVALUATED = (  # settings that an evaluation accepts
    *("model", "sampler", "rewards", "plugins", "evaluate.measures", "evaluate.sampler", "evaluate.images_per_prompt"),
    *("evaluate.prompts", "run.seed"),
)
DEFAULT_PLUGINS = {"model": "stable_diffusion", "sampler": "ddim", "algorithm": "ddpo"}


# ---------------------------------------------------------------------------------------------- loading


def load_config(arguments: Sequence[str], default: Path | None = None) -> Config:
    """Merge YAML files and `key=value` overrides, look up the plugins they name, and check everything.

    Without a file among the arguments, the file `default` comes first, without its rewards if the overrides name some.

    Raises: UsageError, in one line, on an unknown key, a wrong type, a missing file or an unknown plugin.
    """
    parts = [read_argument(argument) for argument in arguments]
    if default and not any(part.is_file for part in parts):
        parts = [_default(default, parts), *parts]
    return _config(parts)


def load_for_drawing(file: Path | None, overrides: Sequence[str], is_steered: bool = False) -> Config:
    """The model and the deployed sampler of a config file, if any, with `key=value` overrides, and nothing else of it.

    If drawing `is_steered`, also its rewards, or those that the overrides name; no code of the file's is imported for
    them, and no server that it names is asked.

    Raises: UsageError as `load_config` does, and on an override that does not concern drawing.
    """
    for override in overrides:
        if setting_keys(override)[0] not in ("model", "sampler", "plugins", *(["rewards"] if is_steered else [])):
            which = "model.*, sampler.* and rewards.*" if is_steered else "model.* and sampler.*"
            raise UsageError(f"{override} has no effect on drawing: only settings of {which}, and plugins=, do")
        if {"lora", "lora_alpha"} & section_at(read_argument(override).values, "model").keys():
            raise UsageError(f"{override} has no effect here: give the LoRA as a folder, and its scale as --strength")
    given = [read_argument(override) for override in overrides]
    part = read_argument(str(file)) if file else Part("", {}, {})
    values, texts = (
        _drawing(tree) | ({"rewards": _scoring(tree, given)} if is_steered else {})
        for tree in (part.values, part.texts)
    )
    own = replace(part, values=values, texts=texts, is_found=True)
    if is_steered:
        _check_measures(own, given, "name the rewards to steer by")
    with _pointing_to_plugins(part):
        return _config([own, *given])


@contextmanager
def _pointing_to_plugins(found: Part) -> Iterator[None]:
    """Within it, an unknown plugin leads to the plugin files of a found config, which are not imported for it."""
    try:
        yield
    except UsageError as error:
        files = ",".join(map(str, found.values.get("plugins") or ()))
        if not str(error).startswith("unknown ") or not files:
            raise
        raise UsageError(
            f"{error}; {found.argument} was found, not named, so its plugin files are not imported: if you trust them, "
            f"give plugins=[{files}]"
        ) from error


def _drawing(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A config's model, without the LoRA that it starts from, and the sampler that it deploys."""
    left = ("lora", "lora_alpha", "compile")  # a few images are drawn sooner than a network is compiled
    model = {key: value for key, value in section_at(tree, "model").items() if key not in left}
    sampler, changes = section_at(tree, "sampler"), section_at(tree, "evaluate.sampler")
    if changes.get("name", sampler.get("name")) != sampler.get("name"):
        sampler = {}
    return {"model": model, "sampler": {**sampler, **changes}}


def load_for_evaluation(file: Path | None, overrides: Sequence[str], is_trusted: bool) -> Config:
    """A run's evaluation by its config file, if any, and `key=value` overrides; the sampler is the deployed one.

    Measures that the overrides name replace the file's, whose options they keep. Unless the file `is_trusted`, nothing
    is imported for it, and no server that it names is contacted.

    Raises: UsageError as `load_config` does, and on an override that does not concern evaluation.
    """
    for override in overrides:
        keys = setting_keys(override)
        if not {keys[0], ".".join(keys[:2])} & set(EVALUATED):
            raise UsageError(f"{override} has no effect on an evaluation: only settings of {', '.join(EVALUATED)} do")
    given = [read_argument(override) for override in overrides]
    part = read_argument(str(file)) if file else Part("", {}, {})
    values, texts = (_evaluating(tree, given, is_trusted) for tree in (part.values, part.texts))
    own = replace(part, values=values, texts=texts, is_found=not is_trusted)
    if not is_trusted:
        _check_measures(own, given, "pass --trust if you trust it, or name other measures")
    with _pointing_to_plugins(part):
        return _config([own, *given])


def _evaluating(tree: Mapping[str, Any], overrides: Sequence[Part], is_trusted: bool) -> dict[str, Any]:
    """What an evaluation uses of a config: no algorithm, and if the overrides name measures, only those."""
    rewards, measures = section_at(tree, "rewards"), section_at(tree, "evaluate.measures")
    scored, measured = _named(overrides, "rewards"), _named(overrides, "evaluate.measures")
    if scored or measured:
        of_rewards = {name: _without(mapping(options), "weight", "smoothing") for name, options in rewards.items()}
        rewards, measures = (
            {name: found[name] for name in names if name in found}
            for names, found in ((scored, measures | rewards), (measured, of_rewards | measures))
        )
    own = ("model", "prompts", "train", "run", *(["plugins"] if is_trusted else []))
    kept = {
        key: value
        for key, value in section_at(tree, "evaluate").items()
        if key in ("images_per_prompt", "prompts", "every")
    }
    whole = {key: tree[key] for key in own if key in tree}
    sampler = _drawing(tree)["sampler"]
    return {**whole, "sampler": sampler, "rewards": rewards, "evaluate": {**kept, "measures": measures}}


def _scoring(tree: Mapping[str, Any], overrides: Sequence[Part]) -> dict[str, Any]:
    """A config's rewards, or the options of those that the overrides name."""
    rewards, named = section_at(tree, "rewards"), _named(overrides, "rewards")
    return {name: options for name, options in rewards.items() if not named or name in named}


def _named(overrides: Sequence[Part], where: str) -> list[str]:
    """The measures that overrides name in a section, other than to remove them."""
    sections = [section_at(override.values, where) for override in overrides]
    return list(dict.fromkeys(name for section in sections for name, options in section.items() if options is not None))


def _without(section: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {name: value for name, value in section.items() if name not in keys}


def _check_measures(found: Part, overrides: Sequence[Part], advice: str) -> None:
    """Raises: UsageError when a file that was found, not named, measures by code or a server of its own."""
    for override in overrides:
        _check_list(override.values.get("plugins"), list[str], "plugins")
        for path in override.values.get("plugins") or ():
            load_file(str(path))
    tree = _resolved(found.values)
    for where in ("rewards", "evaluate.measures"):
        for name, options in section_at(tree, where).items():
            given = {key for part in overrides for key in mapping(section_at(part.values, where).get(name))}
            servers = {key for key, value in mapping(options).items() if "://" in str(value)} - given
            if servers or (name not in _named(overrides, where) and not _is_registered(name)):
                raise UsageError(
                    f"{found.argument} uses {name!r}, which {'asks a server' if servers else 'is code'}, and "
                    f"that file was found, not named: {advice}, as in rewards.brightness.weight=1"
                )


def _is_registered(name: str) -> bool:
    """Whether a reward is registered without importing what its name refers to."""
    try:
        return ":" not in name and bool(REGISTRIES["reward"].find(name))
    except UsageError:
        return False


def _config(parts: Sequence[Part]) -> Config:
    rough = _resolved(merged([replace(part, values=part.texts) if part.refers else part for part in parts]))
    _check_found(rough, parts)
    _check_list(rough.get("plugins"), list[str], "plugins")
    for path in rough.get("plugins") or ():
        load_file(str(path))
    types = option_types(rough)
    parts = [retyped(part, types) for part in parts]
    tree = _resolved(merged(_without_replaced_plugins(parts, rough)))
    _check_found(tree, parts)
    return build_config(tree)


def _check_found(tree: Mapping[str, Any], parts: Sequence[Part]) -> None:
    """Raises: UsageError when a file that was found, not named, names a plugin as `module:object`, to be imported."""
    for file in (part for part in parts if part.is_found):
        for kind in DEFAULT_PLUGINS:
            name = str(_plugin_name(tree.get(kind)))
            given = [str(_plugin_name(part.values.get(kind))) for part in parts if not part.is_found]
            if ":" in name and name not in given:
                raise UsageError(
                    f"{file.argument} names the {kind} {name!r}, which is code, and that file was found, not named: if "
                    f"you trust it, pass {kind}.name={name}"
                )


def _resolved(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with its ${references} resolved.

    Raises: UsageError on one that leads nowhere, or to anything but a key of the config, such as the environment; and
    on a password.
    """
    _check_texts(tree, "")
    try:
        found: Any = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except OmegaConfBaseException as error:  # a ${reference} that leads nowhere
        raise UsageError(f"config: {one_line(error)}") from error
    return found


def _check_texts(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _check_texts(item, f"{where}.{key}".lstrip("."))
    elif isinstance(value, list):
        for item in value:
            _check_texts(item, where)
    elif isinstance(value, str) and re.search("[\ud800-\udfff]", value):
        raise UsageError(f"config {where}: {value!r} contains bytes that are not UTF-8 text")
    elif isinstance(value, str) and re.search(r"://[^/\s]*@", value):
        raise UsageError(
            f"config {where}: an address must not contain a user or password, which would be written to files"
        )
    elif isinstance(value, str) and re.search(r"(?<!\\)\$\{[^{}]*:", value):
        raise UsageError(f"config {where}: {value!r} may only refer to a key of the config, as in ${{run.name}}")


def _default(file: Path, parts: Sequence[Part]) -> Part:
    part = read_argument(str(file))
    named = {name: options for other in parts for name, options in mapping(other.values.get("rewards")).items()}
    if all(options is None for options in named.values()):
        return part
    own = section_at(part.values, "rewards")
    taken_away: dict[str, Any] = {name: {} for name, options in named.items() if options is None and name in own}
    return replace(part, values={**part.values, "rewards": taken_away})


def _without_replaced_plugins(parts: Sequence[Part], whole: Mapping[str, Any]) -> list[Part]:
    """The parts, without a file's options for a plugin that a later argument replaces by another."""
    kept = []
    for part in parts:
        values = dict(part.values)
        for kind in DEFAULT_PLUGINS if part.is_file else ():
            name = _plugin_name(values.get(kind))
            if name and "${" not in str(name) and name != _plugin_name(whole.get(kind)):
                common = [f.name for f in dataclasses.fields(GridConfig)] if kind == "sampler" else []
                values[kind] = {key: values[kind][key] for key in common if key in mapping(values[kind])}
        kept.append(replace(part, values=values))
    return kept


def _plugin_name(section: Any) -> Any:
    return section.get("name") if isinstance(section, dict) else section


def option_types(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The type of each key of a config, nested like it, for the plugins that it names."""
    types: dict[str, Any] = {name: type_hints(schema) for name, schema in SECTIONS.items()}
    for kind, default in DEFAULT_PLUGINS.items():
        types[kind] = _plugin_types(kind, _plugin_name(tree.get(kind)) or default)
    evaluation = mapping(tree.get("evaluate"))
    sampler = _plugin_name(tree.get("sampler")) or DEFAULT_PLUGINS["sampler"]
    types["evaluate"]["sampler"] = _plugin_types("sampler", _plugin_name(evaluation.get("sampler")) or sampler)
    types["evaluate"]["measures"] = {
        name: _plugin_types("reward", name) for name in mapping(evaluation.get("measures"))
    }
    types["rewards"] = {name: _plugin_types("reward", name) for name in mapping(tree.get("rewards"))}
    return {**types, "plugins": list[str]}


def _plugin_types(kind: str, name: Any) -> dict[str, Any]:
    plugin = REGISTRIES[kind].find(str(name))
    common = type_hints(GridConfig) if kind == "sampler" else {}
    return {"name": str, **common, **{option.name: option.type for option in plugin.options.values()}}


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
    check_arithmetic(config)
    return config


def _section(values: Any, where: str) -> dict[str, Any]:
    """Raises: UsageError when what should be a section of keys is something else."""
    if values is not None and not isinstance(values, Mapping):
        raise UsageError(f"config {where}: expected a section of keys, got {values!r}")
    return dict(values or {})


def _typed(schema: Any, values: Mapping[str, Any], where: str) -> Any:
    """Check `values` against a dataclass."""
    _check_lists(values, schema, where)
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
    except (TypeError, ValueError) as error:  # OmegaConf's own, where a list or value meets a section
        raise UsageError(f"config {where}: {one_line(error)}") from error


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


def _check_lists(values: Any, schema: Any, where: str) -> None:
    """Raises: UsageError as `_check_list` does, for a value of a dataclass or of one within it."""
    for name, kind in type_hints(schema).items() if isinstance(values, Mapping) else ():
        key = f"{where}.{name}".lstrip(".")
        if dataclasses.is_dataclass(kind):
            _check_lists(values.get(name), kind, key)
        _check_list(values.get(name), kind, key)


def _check_list(value: Any, kind: Any, where: str) -> None:
    """Raises: UsageError on a single value where a list is expected, or on a list of the wrong length."""
    kinds = [part for part in (kind, *typing.get_args(kind)) if typing.get_origin(part) in (list, tuple)]
    if value is None or not kinds:
        return
    if not isinstance(value, list | tuple | ListConfig):
        raise UsageError(f"config {where}: expected a list, as in {where}=[" + str(value) + "]")
    items = typing.get_args(kinds[0])
    if typing.get_origin(kinds[0]) is tuple and ... not in items and len(value) != len(items):
        raise UsageError(f"config {where}: expected {len(items)} values, got {list(value)}")


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
    kept = sampler if same else {f.name: sampler[f.name] for f in dataclasses.fields(GridConfig)}
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


def check_arithmetic(config: Config) -> None:
    """Raises: UsageError when a batch does not divide what it splits, or a count is not positive."""
    train, images = config.train, config.images_per_epoch
    counts = (
        ("train", train, COUNTS),
        ("train", train, ("steps_per_image", "patience")),
        ("evaluate", config.evaluate, ("images_per_prompt", "prompts", "every")),
        ("run", config.run, ("keep_checkpoints", "threads")),
    )
    for where, section, names in counts:
        for name in names:
            value = getattr(section, name)
            if value is not None and value < 1:
                raise UsageError(f"config {where}.{name}: must be at least 1, got {value}")
    for where, value in (
        ("train.warmup", train.warmup),
        ("train.weight_decay", train.weight_decay),
        ("evaluate.pictures", config.evaluate.pictures),
        ("run.checkpoint_seconds", config.run.checkpoint_seconds),
    ):
        if value < 0:
            raise UsageError(f"config {where}: must be at least 0, got {value}")
    if not 0 <= config.run.seed < 2**64:
        raise UsageError(f"config run.seed: must be in [0, 2^64), got {config.run.seed}")
    for name in ("lr", "max_grad_norm"):
        if getattr(train, name) <= 0:
            raise UsageError(f"config train.{name}: must be above 0, got {getattr(train, name)}")
    if not config.run.dir and (Path(config.run.name).name != config.run.name or config.run.name in ("", "..")):
        raise UsageError(f"config run.name: {config.run.name!r} is not the name of a folder; a path goes into run.dir")
    if (config.run.dir or "").startswith("~") and str(config.folder).startswith("~"):
        raise UsageError(f"config run.dir: {config.run.dir}: there is no user of that name")
    if train.kl_budget is not None and train.kl_budget <= 0:
        raise UsageError(f"config train.kl_budget: must be above 0, got {train.kl_budget}")
    if train.kl_budget is None and train.over_budget != "stop":
        raise UsageError("config train.over_budget: has no effect without train.kl_budget")
    if train.patience is not None and not (config.prompts.validation and config.evaluate.every):
        raise UsageError("config train.patience: has no effect without prompts.validation and evaluate.every")
    if config.prompts.validation and not config.evaluate.every:
        raise UsageError("config prompts.validation: has no effect without evaluate.every")
    for name in ("max_failed", "ema"):
        if not 0 <= getattr(train, name) < 1:
            raise UsageError(f"config train.{name}: must be in [0, 1), got {getattr(train, name)}")
    if not all(0 <= beta < 1 for beta in train.betas):
        raise UsageError(f"config train.betas: must be in [0, 1), got {list(train.betas)}")
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
