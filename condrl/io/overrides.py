"""Command-line arguments, YAML files and `key=value` overrides, as trees of values in which later ones win.

A value is kept as YAML reads it and as the text that was typed, which counts where an option is text.
"""

from __future__ import annotations

import copy
import re
import types as types_module
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from condrl.errors import UsageError
from condrl.io.files import CONFIGS, exists
from condrl.registry import suggestion

KINDS = ("model", "sampler", "algorithm")  # sections that hold a plugin's name and its options


@dataclass(frozen=True)
class Part:
    """What a command-line argument sets: a file, or a `key=value` override."""

    argument: str
    values: dict[str, Any]  # as YAML reads it
    texts: dict[str, Any]  # the same with every scalar as it was typed
    keys: list[str] | None = None  # of `key=value`
    broken: str | None = None  # why its value is not valid YAML; it may still be text
    is_found: bool = False  # a file that was found, not named by the user: it imports nothing

    @property
    def is_file(self) -> bool:
        return self.keys is None

    @property
    def refers(self) -> bool:
        """Whether it is `key=value` with a ${reference} in the value, or with text that looks like one."""
        return not self.is_file and "${" in self.argument


class TextLoader(yaml.SafeLoader):
    """Every scalar stays text; keys are merged by << as usual."""

    yaml_implicit_resolvers = {"<": [("tag:yaml.org,2002:merge", re.compile("<<"))]}


DEEPEST = 20  # levels of nested lists and sections; our own configs have six
TOO_DEEP = "it is nested too deeply"
ODD_NUMBER = re.compile(r"[-+]?(0[0-7_]+|\d[\d_]*(:[0-5]?\d)+(\.[\d_]*)?)")  # in base 8, as 010, or 60, as 1:30
SETTING = re.compile(r"(?P<key>[\w.:-]+)=(?P<value>.*)", re.DOTALL)
DOTTED_REWARD = re.compile(r"(?P<section>rewards|evaluate\.measures)\.(?P<name>[\w.]+:\w+)(?:\.(?P<option>\w+))?")


def is_setting(argument: str) -> bool:
    """Whether a command-line argument is `key=value` rather than a file."""
    return bool(SETTING.fullmatch(argument)) and not exists(Path(argument))


def setting_keys(argument: str) -> list[str]:
    """The keys of a `key=value` override, `["train", "lr"]`; a reward may be named `rewards.module:object.weight=1`."""
    found = SETTING.fullmatch(argument)
    assert found
    dotted = DOTTED_REWARD.fullmatch(found["key"])
    if dotted:
        return [*dotted["section"].split("."), *filter(None, (dotted["name"], dotted["option"]))]
    return found["key"].split(".")


def read_named(argument: str, flag: str, example: str) -> tuple[str, list[str]]:
    """A plugin's name and its `option=value` settings, of an argument such as `ddim,eta=0`.

    Raises: UsageError when it is not NAME or NAME,option=value.
    """
    name, *options = argument.split(",")
    if not name or "=" in name or not all(is_setting(option) for option in options):
        raise UsageError(f"{flag} {argument}: give NAME or NAME,option=value, as in {example}")
    return name, options


def read_argument(argument: str) -> Part:
    if not is_setting(argument):
        return _read_file(argument)
    if argument.startswith("-"):
        raise UsageError(f"cannot read {argument!r}: settings are written without dashes")
    *parents, last = setting_keys(argument)
    text = argument.partition("=")[2]
    if not all([*parents, last]):
        raise UsageError(f"cannot read {argument!r}: a setting is section.key=value")
    if len(parents) > DEEPEST:
        raise UsageError(f"cannot read {argument!r}: {TOO_DEEP}")
    value = text
    literal = escaped(text)  # a text option takes ${...} literally
    try:
        value = _yaml(text)
        broken = TOO_DEEP if is_deep(value) else None
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        broken = one_line(error)
    except RecursionError:
        broken = TOO_DEEP
    values: dict[str, Any] = {last: value}
    texts: dict[str, Any] = {last: literal}
    for key in reversed(parents):
        values, texts = {key: values}, {key: texts}
    return Part(argument, *_sections(values, texts), [*parents, last], broken)


def escaped(text: str) -> str:
    """Text in which OmegaConf sees no references."""
    return text.replace("${", "\\${")


def _yaml(text: str) -> Any:
    """A value as OmegaConf reads it from YAML, where 1e-5 is a number."""
    loaded: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    return loaded["value"]


def shipped_config(name: str) -> Path:
    """The file of a config that comes with the package, such as `quickstart` or `toy/p1`."""
    return CONFIGS / f"{name}.yaml"


def _read_file(name: str) -> Part:
    path = Path(name)
    if re.fullmatch(r"[\w-]+(/[\w-]+)*", name) and not exists(path) and exists(shipped_config(name)):
        path = shipped_config(name)
    if not exists(path) or not path.is_file():
        what = f"{name!r} is a folder" if name and exists(path) else f"there is no config file {name!r}"
        shipped = [file.relative_to(CONFIGS).with_suffix("").as_posix() for file in CONFIGS.rglob("*.yaml")]
        near = suggestion(name, shipped)
        how = "ettings are written key=value, without spaces or dashes"
        raise UsageError(f"{what}.{near} S{how}" if near else f"{what}; s{how}")
    try:
        text = path.read_text("utf-8")
        loaded = OmegaConf.create(text)
        texts = yaml.load(text, TextLoader)
    except Exception as error:  # OmegaConf passes on whatever its YAML parser raises
        raise UsageError(f"cannot read {name}: {one_line(error)}") from error
    values: Any = OmegaConf.to_container(loaded, resolve=False)
    if is_deep(values):
        raise UsageError(f"cannot read {name}: {TOO_DEEP}")
    if not isinstance(values, dict) or not isinstance(texts, dict):
        raise UsageError(f"{name} is not a config: it should hold keys such as model, sampler, rewards, train")
    return Part(name, *_sections(values, texts))


def _sections(values: dict[str, Any], texts: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same with `algorithm: nft` written as `algorithm: {name: nft}`, so that options can join it."""
    for kind in set(KINDS) & set(values):
        if not isinstance(values[kind], dict) and values[kind] is not None:
            values, texts = {**values, kind: {"name": values[kind]}}, {**texts, kind: {"name": texts[kind]}}
    return values, texts


# ---------------------------------------------------------------------------------------------- merging


def merged(parts: Sequence[Part]) -> dict[str, Any]:
    """The parts' values, later ones over earlier ones; null removes a reward or a measure.

    Raises: UsageError when there is no such reward or measure to remove.
    """
    whole: dict[str, Any] = {}
    for part in parts:
        before, whole = whole, _over(whole, part.values)
        for where in ("rewards", "evaluate.measures"):
            known, own, section = (section_at(tree, where) for tree in (before, part.values, whole))
            for name in [name for name, options in own.items() if options is None]:
                if name not in known:
                    raise UsageError(
                        f"config {where}.{name}: there is no {name} for null to remove; for its default options write "
                        f"{where}.{name}={{}}"
                    )
                del section[name]
    return whole


def _over(old: Any, new: Any) -> Any:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return copy.deepcopy(new)
    both = {key: _over(old[key], value) if key in old else copy.deepcopy(value) for key, value in new.items()}
    return {**old, **both}


def section_at(tree: Any, where: str) -> dict[str, Any]:
    """The section of a tree at some dotted keys; empty where there is none."""
    for key in where.split("."):
        tree = mapping(tree).get(key)
    return mapping(tree)


def mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `section.key`, with what trackers cannot take written as text."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat


# ---------------------------------------------------------------------------------------------- text is text


def retyped(part: Part, types: Mapping[str, Any]) -> Part:
    """The part with the text that was typed where the options are text.

    Raises: UsageError on an argument whose value has to be YAML and is not.
    """
    kind: Any = types
    for key in part.keys or ():
        kind = mapping(kind).get(key)
    if part.broken and not is_text(kind):
        raise UsageError(f"cannot read {part.argument!r}: {part.broken}")
    return replace(part, values=as_typed(part.values, part.texts, types))


def as_typed(values: Any, texts: Any, types: Any) -> Any:
    """`values` with the text that was typed, where `types` asks for text: `no` does not become False, nor `007` 7.

    Raises: UsageError on a number in base 8 or 60.
    """
    if isinstance(types, dict) and isinstance(values, dict):
        texts = mapping(yaml.load(texts, TextLoader) if isinstance(texts, str) else texts)
        return {key: as_typed(value, texts.get(str(key)), types.get(key)) for key, value in values.items()}
    if is_text(types) and isinstance(texts, str) and not (values is None and _allows_null(types)):
        return texts
    if isinstance(values, int | float) and isinstance(texts, str) and ODD_NUMBER.fullmatch(texts):
        raise UsageError(f"the number {texts} would be read as {values}, as YAML has it: write it in decimal")
    if isinstance(values, list) and isinstance(texts, str):
        texts = yaml.load(texts, TextLoader)
    if isinstance(values, list) and isinstance(texts, list) and is_text(_item_type(types)):
        return [as_typed(value, text, _item_type(types)) for value, text in zip(values, texts, strict=True)]
    return values


def is_text(kind: Any) -> bool:
    """Whether an annotation allows text and, but for null, nothing else."""
    if typing.get_origin(kind) is Literal:
        return all(isinstance(value, str) for value in typing.get_args(kind))
    if typing.get_origin(kind) in (typing.Union, types_module.UnionType):
        return all(is_text(part) for part in typing.get_args(kind) if part is not type(None))
    return kind is str


def _allows_null(kind: Any) -> bool:
    return type(None) in typing.get_args(kind)


def _item_type(kind: Any) -> Any:
    """The type of the items of a list[...] or tuple[..., ...], which may be nullable."""
    for part in (kind, *typing.get_args(kind)):
        if typing.get_origin(part) in (list, tuple):
            return typing.get_args(part)[0]
    return None


# ---------------------------------------------------------------------------------------------- helpers


def one_line(error: Exception) -> str:
    text = str(error).split("full_key:")[0].replace('in "<unicode string>", ', "")
    return " ".join(text.split()) or type(error).__name__


def is_deep(value: Any, levels: int = DEEPEST) -> bool:
    """Whether lists and sections are nested more than `levels` deep."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(is_deep(item, levels - 1) for item in inner)
