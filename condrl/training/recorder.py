"""What a run writes down as it goes: metrics.jsonl, timings.jsonl, images, and what is going wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping
from typing import Any

from tqdm import tqdm

from condrl.algorithms.base import Collected, Experience
from condrl.errors import naming
from condrl.io.records import from_json, to_json
from condrl.processes import Processes
from condrl.training.diagnose import diagnose, spread_metrics
from condrl.training.folder import RunFolder
from condrl.training.pictures import save_grid
from condrl.training.trackers import Trackers

PICTURES = 8  # images in an epoch's picture


class Recorder:
    """Writes an epoch's lines and picture into the run's folder, and passes them to the trackers."""

    def __init__(self, folder: RunFolder, processes: Processes, lowered: Collection[str] = ()) -> None:
        self.folder, self.processes = folder, processes
        self.lowered = lowered  # the rewards whose weight is negative
        self.trackers = Trackers(folder, processes)
        self.metrics_file = folder.path / "metrics.jsonl"  # the same whenever a run is repeated or resumed
        self.first: dict[str, float] = {}  # what the first epoch recorded, with the base model's held-out measures
        self.lines: list[dict[str, Any]] = []  # what was recorded so far
        self.printed: set[str] = set()  # the diagnoses that were printed

    @property
    def size(self) -> int:
        """Bytes of metrics.jsonl."""
        return self.metrics_file.stat().st_size if self.metrics_file.exists() else 0

    def take_back(self, size: int) -> None:
        """Cut metrics.jsonl to its first `size` bytes."""
        if self.processes.is_main and self.size > size:
            os.truncate(self.folder.claim(self.metrics_file.name), size)
        has_record = self.processes.is_main and self.metrics_file.exists()
        content = self.metrics_file.read_text("utf-8") if has_record else ""
        self.lines = [without_diagnosis(from_json(line)) for line in content.splitlines()]
        for line in self.lines:  # for a tracker that the run did not have before
            self.trackers.log(line["epoch"], line)

    def record(
        self,
        counts: Mapping[str, int],
        experience: Collected,
        metrics: Mapping[str, float],
        seconds: Mapping[str, float],
    ) -> dict[str, Any]:
        """Append a line to metrics.jsonl and pass it to the trackers, and return it.

        `counts` are the epoch's number and the images and updates so far.
        """
        line: dict[str, Any] = dict(counts)
        if isinstance(experience, Experience):
            line |= reward_metrics(experience) | dict(metrics) | spread_metrics(experience)
        else:
            line |= metrics
        self.first = {**line, **self.first}  # the first epoch's, and the base model's held-out measures
        if self.processes.is_main:
            self.lines.append(line)
            self.write(line, diagnose(self.first, self.lines, self.lowered), seconds)
        return line

    def write(self, line: dict[str, Any], found: Mapping[str, str], seconds: Mapping[str, float]) -> None:
        """Append to the record what an epoch measured, print the diagnoses that are new."""
        for name in found.keys() - self.printed:
            tqdm.write(f"warning, epoch {line['epoch']}: {found[name]}", file=sys.stderr)
        self.printed |= found.keys()
        timing = {"epoch": line["epoch"], **{f"seconds/{name}": round(s, 4) for name, s in seconds.items()}}
        for name, content in (("metrics", line | {"diagnosis": sorted(found)}), ("timings", timing)):
            path = self.folder.file(f"{name}.jsonl")
            with naming(path), path.open("a", encoding="utf-8") as record:
                record.write(to_json(content) + "\n")
        self.trackers.log(line["epoch"], line | timing)

    def picture(self, experience: Experience, epoch: int, images_per_prompt: int) -> None:
        """Save the first image of the first prompts, with prompts and rewards; images only, not points."""
        if experience.preview.dim() != 4 or not self.processes.is_main:
            return
        total = experience.scores.total
        chosen = range(0, len(experience.rows), images_per_prompt)[:PICTURES]
        labels = [f"{experience.rows[i].prompt} [{total[i].item():.2f}]" for i in chosen]
        path = self.folder.file(f"images/epoch_{epoch + 1:04d}.png")
        save_grid(path, list(experience.preview), labels)


def without_diagnosis(line: Any) -> dict[str, Any]:
    """What was measured, of a line of the record."""
    return {name: value for name, value in line.items() if name != "diagnosis"}


def reward_metrics(experience: Experience) -> dict[str, float]:
    """The mean and spread of each reward over all processes' images, and how many scores failed."""
    found: dict[str, float] = {}
    for name, own in {"total": experience.scores.total, **experience.scores.each}.items():
        values = experience.gather(own)[experience.scored]
        found[f"reward/{name}"], found[f"reward/{name}_std"] = values.mean().item(), values.std(correction=0).item()
    return found | {"failed_scores": experience.total - int(experience.scored.sum())}
