"""What `run.trackers` names: each is given every number and picture of a run once, also when the run is resumed."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from condrl.config import Config
from condrl.errors import UsageError, naming, print_main
from condrl.io.overrides import flatten
from condrl.processes import Processes
from condrl.training.folder import RunFolder
from condrl.training.pictures import labelled

TRACKED = "condrl"  # the trackers' folder in a run's, and their project
LOGGED = f"{TRACKED}/logged.txt"  # which steps they have: lines `tracker part step`
WANDB_ID = f"{TRACKED}/wandb_id.txt"  # under which a resumed run continues


def check_trackers(config: Config) -> None:
    """Raises: UsageError when a tracker is not installed."""
    if config.run.trackers:
        from accelerate.tracking import get_available_trackers

        available = {str(tracker) for tracker in get_available_trackers()}
        for tracker in config.run.trackers:
            if tracker not in available:
                raise UsageError(f"config run.trackers: {tracker} is not installed: pip install 'condrl[{tracker}]'")


class Picture(NamedTuple):
    """A PIL image and what it shows."""

    image: Any
    caption: str  # empty if the image says it itself


class Trackers:
    """Passes steps on to accelerate's trackers, which there are within `running`, in the first process alone.

    A step is written down before it is logged, so that a run which is killed and resumed never logs it twice.
    """

    def __init__(self, folder: RunFolder, processes: Processes) -> None:
        self.folder, self.accelerator, self.is_main = folder, processes.accelerator, processes.is_main
        self.pictures: dict[str, Picture] = {}  # of the next step
        self.last: dict[tuple[str, str], int] = {}  # the last step that a tracker has of a part
        self.foreign: set[str] = set()  # files among the trackers' that no run wrote

    @contextmanager
    def running(self, config: Config) -> Iterator[None]:
        """Within it, steps are logged to the trackers that `run.trackers` names, which have the run's settings."""
        if self.is_main and config.run.trackers:
            self.start(config)
        try:
            yield
        finally:
            for tracker in self.accelerator.trackers:
                tracker.finish()  # which writes what it still holds
            self.adopt()
            self.accelerator.trackers.clear()

    def start(self, config: Config) -> None:
        """Start accelerate's trackers in the run's folder, and say where to look."""
        folder = self.folder.file(LOGGED).parent.resolve()
        self.foreign = self.folder.files_in(TRACKED) - self.folder.listed
        self.last = last_steps(self.folder.path / LOGGED)
        settings = flatten(dataclasses.asdict(config))
        options = {"name": config.run.name, "config": settings}
        init: dict[str, Any] = {}
        if "wandb" in config.run.trackers:
            init["wandb"] = {**options, "dir": str(folder), "id": self.wandb_id(), "resume": "allow"}
        if "trackio" in config.run.trackers:
            import_trackio(folder)
            resume = "allow" if ("trackio", "epoch") in self.last else "never"
            init["trackio"] = {**options, "resume": resume, "embed": False}
        self.accelerator.init_trackers(TRACKED, init_kwargs=init)
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":  # the others' options have them
                tracker.store_init_configuration(settings)
            if tracker.name in WATCH:
                print_main(f"to watch the run: {WATCH[tracker.name].format(folder=folder)}")
        self.adopt()

    def wandb_id(self) -> str:
        """The id of this run on wandb's server, the same when it is resumed."""
        path = self.folder.file(WANDB_ID)
        if not path.exists():
            path.write_text(uuid.uuid4().hex[:16], "utf-8")
        return path.read_text("utf-8").strip()

    def show(self, name: str, image: Any, caption: str = "") -> None:
        """Have a PIL image logged with the next step."""
        self.pictures[name] = Picture(image, caption)

    def log(self, step: int, scalars: Mapping[str, float], part: str = "epoch") -> None:
        """Log scalars, and what was shown since the last step, to the trackers that lack this step of this part."""
        pictures, self.pictures = self.pictures, {}
        for tracker in self.accelerator.trackers if scalars or pictures else []:
            if self.lacks(tracker.name, part, step):
                LOG[tracker.name](tracker, step, scalars, pictures)
        self.adopt()

    def lacks(self, tracker: str, part: str, step: int) -> bool:
        """Whether a tracker lacks a step; from now on it counts as one that it has."""
        if step <= self.last.get((tracker, part), -1):
            return False
        self.last[tracker, part] = step
        path = self.folder.path / LOGGED
        with naming(path), path.open("a", encoding="utf-8") as logged:
            logged.write(f"{tracker} {part} {step}\n")
        return True

    def adopt(self) -> None:
        """List what the trackers wrote as files of the run."""
        if self.accelerator.trackers:
            self.folder.adopt(self.folder.files_in(TRACKED) - self.foreign)


def last_steps(path: Path) -> dict[tuple[str, str], int]:
    """The last step of each tracker and part that a run wrote down; a line that was cut short does not count."""
    text = path.read_text("utf-8", errors="replace") if path.exists() else ""
    if text[-1:] not in ("", "\n"):
        path.write_text(text + "\n", "utf-8")  # so that the next line stands alone
    found: dict[tuple[str, str], int] = {}
    for tracker, part, step in re.findall(r"^(\w+) (\w+) (\d+)\n", text, re.MULTILINE):
        found[tracker, part] = max(int(step), found.get((tracker, part), -1))
    return found


def import_trackio(folder: Path) -> None:
    """Import trackio so that it writes into a folder, unless the user's TRACKIO_DIR is another.

    It reads that variable when it is imported, once: for a second run in a process it is imported anew.
    """
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        del sys.modules[name]
    chosen = os.environ.get("TRACKIO_DIR")
    os.environ["TRACKIO_DIR"] = chosen or str(folder)
    try:
        importlib.import_module("trackio")
    finally:
        if not chosen:
            del os.environ["TRACKIO_DIR"]


def log_events(tracker: Any, step: int, scalars: Mapping[str, float], pictures: Mapping[str, Picture]) -> None:
    """To TensorBoard, whose images have no captions: they are written below them."""
    for name, (image, caption) in pictures.items():
        shown = labelled(image, caption) if caption else image
        tracker.log_images({name: np.asarray(shown.convert("RGB"))[None]}, step, dataformats="NHWC")
    tracker.log(dict(scalars), step)  # which flushes both


def log_row(tracker: Any, step: int, scalars: Mapping[str, float], pictures: Mapping[str, Picture]) -> None:
    """To wandb or trackio, as one row."""
    media = importlib.import_module(tracker.name)
    images = {name: media.Image(image, caption=caption or None) for name, (image, caption) in pictures.items()}
    tracker.log({**scalars, **images}, step)


LOG = {"tensorboard": log_events, "wandb": log_row, "trackio": log_row}
WATCH = {  # wandb prints an address
    "tensorboard": "tensorboard --logdir {folder}",
    "trackio": f"TRACKIO_DIR={{folder}} trackio show --project {TRACKED}",
}
