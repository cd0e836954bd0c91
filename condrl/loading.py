"""A Config from files and `key=value` arguments: all of it to tune, or what drawing and evaluating need."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from condrl.config import DEFAULT_PLUGINS, GRID, SECTIONS, Config, GridConfig, build_config, check_value
from condrl.errors import UsageError
from condrl.io.overrides import Part, mapping, merged, one_line, read_argument, retyped, section_at, setting_keys
from condrl.io.plugin_files import load_file
from condrl.registry import REGISTRIES, type_hints

EVALUATED = (  # settings that an evaluation accepts
    *("model", "sampler", "rewards", "plugins", "evaluate.measures", "evaluate.sampler", "evaluate.images_per_prompt"),
    *("evaluate.prompts", "run.seed"),
)


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
        changed = section_at(read_argument(override).values, "model").keys()
        if {"lora", "lora_alpha"} & changed:
            raise UsageError(f"{override} has no effect here: give the LoRA as a folder, and its scale as --strength")
        if "compile" in changed:
            raise UsageError(f"{override} has no effect on drawing: images are drawn sooner than a network is compiled")
    given = [read_argument(override) for override in overrides]
    part = read_argument(str(file)) if file else Part("", {}, {})
    values, texts = (
        _drawing(tree) | ({"rewards": _scoring(tree, given)} if is_steered else {})
        for tree in (part.values, part.texts)
    )
    own = replace(part, values=values, texts=texts, is_found=True)
    if is_steered:
        named = "name the rewards to steer by"
        _check_measures(own, given, f"load it with plugins=[FILE] if you trust it, or {named}", named)
    with _pointing_to_plugins(part):
        return _untimed(_config([own, *given]))


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


def _untimed(config: Config) -> Config:
    """Raises: UsageError on a choice that only a run makes, by a trial before it."""
    if config.model.get("memory_format") == "auto":
        raise UsageError(
            "config model.memory_format: auto is timed before a run alone: give contiguous or channels_last, or null"
        )
    return config


def _drawing(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A config's model, without the LoRA that it starts from, and the sampler that it deploys."""
    left = ("lora", "lora_alpha", "compile", "attention")  # what makes a run faster on its machine is not worth a wait
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
        trusted = "pass --trust if you trust it, or name other measures"
        _check_measures(own, given, trusted, trusted)
    with _pointing_to_plugins(part):
        return _untimed(_config([own, *given]))


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


def _check_measures(found: Part, overrides: Sequence[Part], if_code: str, if_server: str) -> None:
    """Check that no file that was found, not named, scores by code or a server of its own.

    Raises: UsageError with the advice for either.
    """
    for override in overrides:
        _load_plugins(override.values)
    tree = _resolved(found.values)
    for where in ("rewards", "evaluate.measures"):
        for name, options in section_at(tree, where).items():
            given = {key for part in overrides for key in mapping(section_at(part.values, where).get(name))}
            servers = {key for key, value in mapping(options).items() if "://" in str(value)} - given
            if servers or (name not in _named(overrides, where) and not _is_registered(name)):
                what, advice = ("asks a server", if_server) if servers else ("is code", if_code)
                raise UsageError(
                    f"{found.argument} uses {name!r}, which {what}, and that file was found, not named: {advice}, as "
                    "in rewards.brightness.weight=1"
                )


def _is_registered(name: str) -> bool:
    """Whether a reward is registered without importing what its name refers to."""
    try:
        return ":" not in name and bool(REGISTRIES["reward"].find(name))
    except UsageError:
        return False


def _config(parts: Sequence[Part]) -> Config:
    """The parts as one Config: merged once to learn which plugins they name, and again with the types of the options.

    Raises: UsageError as `load_config` does.
    """
    rough = _resolved(merged([replace(part, values=part.texts) if part.refers else part for part in parts]))
    _check_found(rough, parts)
    _load_plugins(rough)
    types = option_types(rough)
    parts = [retyped(part, types) for part in parts]
    tree = _resolved(merged(_without_replaced_plugins(parts, rough)))
    _check_found(tree, parts)
    return build_config(tree)


def _load_plugins(tree: Mapping[str, Any]) -> None:
    """Import the plugin files that a tree names.

    Raises: UsageError when they are not a list, or one cannot be imported.
    """
    check_value(tree.get("plugins"), list[str], "plugins")
    for path in tree.get("plugins") or ():
        load_file(str(path))


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
    """The default config, without what belongs to its model or rewards where the overrides name others."""
    part = read_argument(str(file))
    values = dict(part.values)
    model = {key: value for other in parts for key, value in section_at(other.values, "model").items()}
    if model.keys() & {"name", "path"}:
        values["evaluate"] = _without(section_at(values, "evaluate"), "measures")
    if model.get("name", values["model"]["name"]) != values["model"]["name"]:
        values["sampler"] = _without(values["sampler"], "spacing")
    named = {name: options for other in parts for name, options in mapping(other.values.get("rewards")).items()}
    if any(options is not None for options in named.values()):
        own = section_at(values, "rewards")
        values["rewards"] = {name: {} for name, options in named.items() if options is None and name in own}
    return replace(part, values=values)


def _without_replaced_plugins(parts: Sequence[Part], whole: Mapping[str, Any]) -> list[Part]:
    """The parts, without a file's options for a plugin that a later argument replaces by another."""
    kept = []
    for part in parts:
        values = dict(part.values)
        for kind in DEFAULT_PLUGINS if part.is_file else ():
            name = _plugin_name(values.get(kind))
            if name and "${" not in str(name) and name != _plugin_name(whole.get(kind)):
                common = GRID if kind == "sampler" else ()
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
