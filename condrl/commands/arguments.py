"""What commands take alike: a run or a LoRA, settings, options of several values, and places to write to."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from condrl.config import Config
from condrl.errors import UsageError
from condrl.io.files import CONFIGS, check_folder, exists
from condrl.io.overrides import is_setting, setting_keys
from condrl.loading import load_for_drawing

T = TypeVar("T")

HOME = Path("runs")  # of what is made without a run


def parser_of(command: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of `condrl <command>`, whose help begins with its module's docstring as it is."""
    return argparse.ArgumentParser(
        f"condrl {command}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def one_of_several(kind: Callable[[str], T]) -> Callable[[str], T]:
    """The type of an option that takes several values, as a setting that follows would be taken for one more.

    Raises: argparse.ArgumentTypeError on a setting.
    """

    @functools.wraps(kind, updated=())
    def read(text: str) -> T:
        if is_setting(text):
            raise argparse.ArgumentTypeError(f"{text} is a setting: write settings before this option")
        return kind(text)

    return read


def read_words(arguments: Sequence[str], is_steered: bool = False) -> tuple[Config, Path | None, Path]:
    """The config to draw with, the LoRA, and the folder of what is drawn.

    Raises: UsageError when a folder holds neither a run nor a LoRA.
    """
    from condrl.models.points import MODULE_FILE

    named, settings = split_words(arguments)
    if named is None:
        return load_for_drawing(default_config(settings), settings, is_steered), None, HOME
    lora, run = find(named)
    if (lora / MODULE_FILE).is_file():
        raise UsageError(f"{run or lora} is a run on points, not images: see the plots in its images/")
    if run is None:
        settings = with_rank(lora, settings)
    file = run / "config.yaml" if run else default_config(settings)
    return load_for_drawing(file, settings, is_steered), lora, run or HOME


def split_words(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The run or LoRA that the arguments name, if any, and the settings among them.

    Raises: UsageError when there are several.
    """
    named = [Path(argument) for argument in arguments if not is_setting(argument)]
    if len(named) > 1:
        raise UsageError(f"expected one run or LoRA, got {' '.join(map(str, named))}")
    return next(iter(named), None), [argument for argument in arguments if is_setting(argument)]


def find(path: Path) -> tuple[Path, Path | None]:
    """What was tuned, a LoRA's file or a folder with a network of points, and the folder of the run, if any.

    Raises: UsageError when there is none.
    """
    from condrl.models.lora import find_lora
    from condrl.models.points import MODULE_FILE
    from condrl.training.folder import RunFolder

    if not exists(path):
        raise UsageError(f"there is no run or LoRA {path}; settings are written key=value")
    folders = (path, *(f for f in path.resolve().parents[:2] if RunFolder(f).is_run_folder))
    run = next((f for f in folders if (f / "config.yaml").is_file()), None)
    lora = path / "lora" if run == path else path
    if run == path and not lora.is_dir():
        raise UsageError(f"the run {path} is not finished: it has no lora/ yet")
    return lora if (lora / MODULE_FILE).is_file() else find_lora(lora), run


def default_config(settings: Sequence[str]) -> Path | None:
    """The config of a LoRA without a run: the quickstart's, unless the settings name the model that it is for."""
    return None if any(setting_keys(each) == ["model", "path"] for each in settings) else CONFIGS / "quickstart.yaml"


def with_rank(lora: Path, settings: Sequence[str]) -> list[str]:
    """The settings after the rank of a LoRA file, which nothing else gives if there is no run.

    Raises: UsageError when they say which modules it has.
    """
    from condrl.models.lora import rank_of

    if any(setting_keys(each)[:2] == ["model", "lora_targets"] for each in settings):
        raise UsageError("model.lora_targets: has no effect on a LoRA without a run, whose file has its modules")
    return [f"model.lora_rank={rank_of(lora)}", *settings]


def fit_adapter(model: Any, lora: Path, run: Path | None) -> None:
    """Make a model's adapter one that the LoRA fits into, if it belongs to no run whose config says so."""
    from condrl.models.latent import LatentModel

    if run is None and isinstance(model, LatentModel) and not model.lora:
        model.fit_adapter(lora)


def in_run(folder: Path) -> Path:
    """Raises: UsageError when a run's folder has a link there, through which it would write elsewhere."""
    if folder.is_symlink():
        raise UsageError(f"{folder} is a link, and a run's folder is not written to through links: give --out")
    return folder


def check_json(path: Path) -> None:
    """Raises: UsageError when no result can be written there."""
    try:
        usable = not path.is_dir() and (path.parent.is_dir() or not path.parent.exists())
    except OSError:  # a name that is too long
        usable = False
    if not usable:
        raise UsageError(f"--json {path}: is not a file that can be written")
    check_folder(path.parent)
