"""What a run's folder says, read for its page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from condrl.config import base_name
from condrl.errors import UsageError
from condrl.io.records import from_json
from condrl.report.charts import number

Line = dict[str, Any]
MEASURED = ("heldout/", "validation/")
DIVERSITY = "diversity within a prompt"  # its name among the measures
FALLS = ("reward_fell", "heldout_fell")  # diagnoses of a run that was better before


@dataclass(frozen=True)
class Finding:
    """A diagnosis, and the epoch in which it first came."""

    name: str
    epoch: int
    text: str
    lasting: bool  # whether the last epoch still has it


@dataclass(frozen=True)
class Run:
    """A run, finished or not."""

    name: str  # on a page
    folder: Path
    config: dict[str, Any]
    lines: list[Line]  # of metrics.jsonl
    timings: list[Line]
    result: dict[str, Any] | None  # None until the run has ended
    images: list[Line]  # of heldout.jsonl: an image drawn by base and tuned from the same noise
    base_record: dict[str, Any] = field(default_factory=dict)  # base.json, written before the first epoch
    evaluation: dict[str, Any] | None = None  # what `condrl evaluate` left in the run's folder

    @property
    def before(self) -> dict[str, float]:
        """What was measured of the base model."""
        return without_none(self.base_record.get("measures") or (self.result or {}).get("before", {}))

    @property
    def base(self) -> str:
        """The model that was tuned, and the LoRA that the run started from, if any."""
        if name := self.base_record.get("model"):
            return str(name)
        return base_name(self.config.get("model") or {})

    @property
    def path_kl(self) -> float | None:
        """The path KL of the tuned chain to the base, nats, where it was measured at the end."""
        return (self.result or {}).get("path_kl")

    @property
    def diversity(self) -> dict[str, Any] | None:
        """How the images of a prompt differ, as a measure's row, where prompts have several."""
        return (self.result or {}).get("diversity")

    def measured(self, lora: str) -> tuple[dict[str, Any], list[Line]]:
        """What the result has of lora/ or lora_best/ on held-out prompts, and the lines of images that it drew."""
        result = self.result or {}
        if lora == "lora_best":
            return result.get("best", {}).get("heldout", {}), []
        return result.get("heldout", {}), self.images

    @property
    def rewards(self) -> dict[str, float]:
        """What the run was tuned on, with its weights."""
        found = {name: options.get("weight", 1.0) for name, options in (self.config.get("rewards") or {}).items()}
        return {name: weight for name, weight in found.items() if weight}

    @property
    def rewards_in_words(self) -> str:
        """The rewards with their weights; empty where there are none."""
        return ", ".join(f"{name} (weight {weight:g})" for name, weight in self.rewards.items())

    def sign(self, measure: str) -> int:
        """1, or -1 where lower is better: for a reward with a negative weight."""
        return -1 if self.rewards.get(measure, 1.0) < 0 else 1

    def gained(self, measure: str, row: dict[str, Any]) -> int:
        """1 where a row's paired interval says that its measure got better, -1 where worse, else 0."""
        low, high = row["difference"]["ci95"] or (0.0, 0.0)
        return self.sign(measure) * (1 if low > 0 else -1 if high < 0 else 0)

    def series(self, name: str) -> list[tuple[float, float]]:
        """(epoch, value) wherever it was recorded."""
        found = [(line["epoch"], line.get(name)) for line in self.lines]
        return [(float(epoch), float(value)) for epoch, value in found if value is not None]

    def spread(self, measure: str) -> float:
        """The standard deviation of a measure over the base model's images; 1 where they are alike."""
        values = [line["base"][measure] for line in self.images if line["base"].get(measure) is not None]
        return statistics.pstdev(values) or 1.0

    @property
    def measures(self) -> list[str]:
        """heldout/x and validation/x that were measured while the run went."""
        names = {name for line in self.lines for name in line if name.startswith(MEASURED)}
        return sorted(name for name in names if not name.endswith("_ci95"))

    def findings(self) -> list[Finding]:
        """The diagnoses of the run's course, in the order in which they came."""
        from condrl.training.diagnose import diagnose

        found: dict[str, Finding] = {}
        lowered = {name for name in self.rewards if self.sign(name) < 0}
        first = {**(self.lines[0] if self.lines else {}), **self.before}
        last = set(self.lines[-1].get("diagnosis", ())) if self.lines else set()
        for i, line in enumerate(self.lines):
            new = [name for name in line.get("diagnosis", ()) if name not in found]
            texts = diagnose(first, self.lines[: i + 1], lowered) if new else {}
            for name in new:
                found[name] = Finding(name, int(line["epoch"]), texts.get(name, name.replace("_", " ")), name in last)
        return list(found.values())


def read_run(folder: Path) -> Run:
    """What is in a run's folder.

    Raises: UsageError when it is not one, or when a file of it cannot be read.
    """
    if not (folder / "config.yaml").is_file():
        raise UsageError(f"{folder} is not a run's folder: it has no config.yaml")
    config = read(folder / "config.yaml", yaml.safe_load)
    if not isinstance(config, dict):
        raise UsageError(f"{folder / 'config.yaml'} is not a run's config")
    lines = [without_none(x) for x in records(folder / "metrics.jsonl") if isinstance(x.get("epoch"), int)]
    return Run(
        folder.resolve().name,
        folder,
        config,
        lines,
        records(folder / "timings.jsonl"),
        read_with(folder / "result.json", "heldout", dict, "a run's result"),
        records(folder / "heldout.jsonl"),
        read_with(folder / "base.json", "measures", dict, "a record of a base model") or {},
        read_with(folder / "evaluation" / "evaluation.json", "evaluations", list, "an evaluation's summary"),
    )


def totals(run: Run) -> dict[str, Any]:
    """The images, network calls and seconds of a run, so far if it goes on."""
    counts = run.result or (run.lines[-1] if run.lines else {})
    seconds = sum(v for line in run.timings for k, v in line.items() if k.startswith("seconds/"))
    found = {"images": counts.get("images"), "network calls": counts.get("network_calls")}
    return found | {"seconds": counts.get("seconds", round(seconds, 1))}


def with_distinct_names(runs: Sequence[Run]) -> list[Run]:
    """The runs with names that are all different: with the folders above them where they need them."""
    parts = [run.folder.resolve().parts for run in runs]

    def name(own: tuple[str, ...]) -> str:
        others = [other for other in parts if other != own]
        counts = range(1, len(own))
        needed = next((n for n in counts if all(other[-n:] != own[-n:] for other in others)), len(own))
        return "/".join(own[-needed:])

    return [replace(run, name=name(own)) for run, own in zip(runs, parts, strict=True)]


def without_none(line: Line) -> Line:
    """A record without the numbers that were not finite."""
    return {name: value for name, value in line.items() if value is not None}


def read_with(path: Path, key: str, kind: type, what: str) -> dict[str, Any] | None:
    """A JSON file with a value of that kind under a key; None where there is no file."""
    if not path.is_file():
        return None
    found = read(path, from_json)
    if not isinstance(found, dict) or not isinstance(found.get(key), kind):
        raise UsageError(f"{path} is not {what}")
    return found


def records(path: Path) -> list[Line]:
    """The lines of a record; none where there is none, and without one that is being written."""
    if not path.is_file():
        return []
    text = read(path, str)
    return read_lines(path, text[: text.rfind("\n") + 1].splitlines())


def read_lines(path: Path, lines: Iterable[str]) -> list[Line]:
    found = []
    for place, line in enumerate(lines, 1):
        try:
            found.append(from_json(line))
        except ValueError as error:
            raise UsageError(f"{path}, line {place}: {error}") from error
        if not isinstance(found[-1], dict):
            raise UsageError(f"{path}, line {place}: not a record")
    return found


def read(path: Path, parse: Callable[[str], Any]) -> Any:
    """Raises: UsageError naming the file when it cannot be read or parsed."""
    try:
        return parse(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"cannot read {path}: {' '.join(str(error).split())}") from error


# ---------------------------------------------------------------------------------------------- verdicts


@dataclass(frozen=True)
class Verdict:
    """In a word and a sentence, what the paired differences and the diagnoses allow to say."""

    word: str  # better, worse, mixed, hacked, collapsed, not shown, unfinished
    sentence: str


def verdict(run: Run, findings: Iterable[Finding]) -> Verdict:
    """What a run has shown, with the path KL that it took, if known."""
    found = judged(run, {finding.name: finding.epoch for finding in findings if finding.lasting})
    spent = "" if run.path_kl is None else f" The path KL to the base is {number(run.path_kl)} nats."
    return replace(found, sentence=found.sentence + spent)


def judged(run: Run, lasting: dict[str, int]) -> Verdict:
    if run.result is None:
        names = {name: name.replace("heldout", "held-out measure").replace("_", " ") for name in lasting}
        wrong = ", ".join(f"{names[name]} (first in epoch {epoch})" for name, epoch in lasting.items())
        so_far = f" Wrong so far: {wrong}." if wrong else ""
        return Verdict("unfinished", f"{recorded(run)}; the result is measured when the run ends.{so_far}")
    rows = run.result["heldout"]
    if not rows:
        return Verdict("not shown", "There were no held-out prompts or no measures: nothing says whether it is better.")
    better, worse = ({name: row for name, row in rows.items() if run.gained(name, row) == sign} for sign in (1, -1))
    told, changed = sentences(better or worse or rows), sentences({**worse, **better} or rows)
    if "collapse" in lasting:
        return Verdict(
            "collapsed", f"Since epoch {lasting['collapse']} the images of a prompt hardly differ. {changed}"
        )
    fell = [lasting[name] for name in FALLS if name in lasting]
    if fell and not any(name in run.rewards for name in better):
        return Verdict("collapsed", f"What it had learned was lost again, as seen from epoch {min(fell)} on. {changed}")
    unrewarded = [name for name in worse if name not in run.rewards]
    if "reward_hacking" in lasting or (unrewarded and any(name in run.rewards for name in better)):
        return Verdict(
            "hacked",
            f"What it was tuned on got better while other measures got worse. {sentences({**better, **worse})}",
        )
    if better and worse:
        return Verdict("mixed", sentences({**better, **worse}))
    if better or worse:
        return Verdict("better" if better else "worse", told)
    return Verdict("not shown", f"No difference is shown: every interval has 0 in it. {told}")


def measure_title(name: str) -> str:
    """A measure's name as people read it: Held-out x for heldout/x."""
    kind, _, measure = name.partition("/")
    return f"{'Held-out' if kind == 'heldout' else kind.capitalize()} {measure}"


def recorded(run: Run) -> str:
    """How many epochs there are, in words."""
    return "1 epoch is recorded" if len(run.lines) == 1 else f"{len(run.lines)} epochs are recorded"


def sentences(rows: dict[str, dict[str, Any]]) -> str:
    return " ".join(f"{name}: {change(row)}." for name, row in rows.items())


def change(row: dict[str, Any]) -> str:
    """.588 to .703, +.115 [+.078, +.150]"""
    base, tuned, difference = (row[who]["mean"] for who in ("base", "tuned", "difference"))
    if any(value is None or not math.isfinite(value) for value in (base, tuned, difference)):
        return "not measured"
    return f"{base:z.3f} to {tuned:z.3f}, {difference:+z.3f}{interval(row)}"


def interval(row: dict[str, Any]) -> str:
    """The paired interval, in brackets after a blank; empty where there is none."""
    limits = row["difference"]["ci95"]
    return f" [{limits[0]:+z.3f}, {limits[1]:+z.3f}]" if limits else ""
