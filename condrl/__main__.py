"""The command `condrl`, also `python -m condrl`."""

from __future__ import annotations

import importlib
import sys

from condrl.commands.console import exit_code
from condrl.errors import UsageError
from condrl.registry import suggestion

COMMANDS = {
    "finetune": "tune a model with rewards",
    "sample": "draw with a LoRA, or with the base model",
    "evaluate": "measure a tuned model beside its base, image by image",
    "report": "write a page of a run: verdict, curves, pictures",
    "benchmark": "measure this machine on a model of a published size, without downloading it",
    "export": "write what was tuned for diffusers, for ComfyUI, or as a whole pipeline; push it to the hub",
    "plugins": "list rewards, samplers, algorithms, models and steerings with their options",
    "serve": "serve a reward over HTTP",
}


def main() -> int:
    """Run the command that the first argument names. Exit code: the command's own; 2 for an unknown one."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        return int(importlib.import_module(f"condrl.commands.{name}").main(arguments))
    return exit_code(lambda: show_help(name))


def show_help(name: str) -> None:
    """Raises: UsageError unless help was asked for."""
    if name not in ("-h", "--help"):
        near = suggestion(name, COMMANDS)
        raise UsageError(f"condrl has no command {name!r}.{near} Available: {', '.join(COMMANDS)}")
    print("condrl COMMAND ...; see condrl COMMAND --help\n")
    for command, what in COMMANDS.items():
        print(f"    {command:<10}{what}")


if __name__ == "__main__":
    sys.exit(main())
