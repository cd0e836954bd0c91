"""List every plugin with its options, defaults and one-line description.

    condrl plugins                     all of them
    condrl plugins ddpo my_reward.py   some; your own files are loaded first
    condrl plugins my_reward.py        all of them, with those of your file

Plugins are code: a file that you name runs when it is loaded.
"""

from __future__ import annotations

import inspect
import json
import types
import typing
from typing import Any

from condrl.commands.console import exit_code
from condrl.config import GridConfig, RewardConfig
from condrl.errors import UsageError
from condrl.io.plugin_files import load_file
from condrl.registry import REGISTRIES, Option, Plugin, comments, suggestion, type_hints

COMMON = {"sampler": GridConfig, "reward": RewardConfig}


def describe(plugin: Plugin) -> str:
    """A plugin's name, description and options, a line each."""
    common = COMMON.get(plugin.kind)
    shared = (
        [Option(n, t, getattr(common, n), comments(common).get(n, "")) for n, t in type_hints(common).items()]
        if common
        else []
    )
    return "\n".join(
        [f"{plugin.kind} {plugin.name}: {plugin.description}", *map(option_line, [*shared, *plugin.options.values()])]
    )


def option_line(option: Option) -> str:
    default = "must be given" if option.default is inspect.Parameter.empty else json.dumps(option.default, default=str)
    return f"    {option.name}: {type_name(option.type)} = {default}" + (
        f"  # {option.comment}" if option.comment else ""
    )


def type_name(kind: Any) -> str:
    """A type as a config has it: the values to choose from, and null for None."""
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return " | ".join(map(str, parts))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " | ".join(map(type_name, parts))
    if kind is type(None):
        return "null"
    return kind.__name__ if isinstance(kind, type) and not parts else str(kind).replace("typing.", "")


def main(words: list[str]) -> int:
    """Exit code: 0, or 2 for bad input."""
    return exit_code(lambda: show(words))


def show(arguments: list[str]) -> None:
    """Print the plugins of these names, or all."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    for argument in arguments:
        if argument.endswith(".py"):
            load_file(argument)
    names = [argument for argument in arguments if not argument.endswith(".py")]
    plugins = [plugin for registry in REGISTRIES.values() for plugin in registry.all()]
    known = [plugin.name for plugin in plugins]
    for name in names:
        if name not in known:
            near = suggestion(name, known)
            raise UsageError(f"no plugin is called {name!r}.{near} Available: {', '.join(known)}")
    print("\n\n".join(describe(plugin) for plugin in plugins if not names or plugin.name in names))
