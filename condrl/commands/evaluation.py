"""What an evaluation leaves behind: a line and perhaps pictures of each image, and the summary as tables."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from condrl.commands.plan import RECORD, Plan
from condrl.commands.result import aligned, interval
from condrl.errors import naming

if TYPE_CHECKING:
    from condrl.training.evaluate import Batch, Evaluation, Pair
    from condrl.training.folder import RunFolder


@contextmanager
def started(folder: RunFolder) -> Iterator[TextIO]:
    """Remove an earlier evaluation from the folder; within it, the new one's lines can be written.

    Raises: UsageError when another process is writing there.
    """
    with folder.locked():
        folder.clear()
        with folder.file(RECORD).open("w", encoding="utf-8") as record:
            yield record


class Writer:
    """Writes lines and pictures as they come."""

    def __init__(self, plan: Plan, record: TextIO) -> None:
        from condrl.training.evaluate import first_seed

        self.plan, self.seed, self.record = plan, first_seed(plan.config.run.seed), record

    def first(self, sampler: int, kind: str) -> Callable[[Batch], None]:
        """What sees the batches of what comes first in a comparison: their pictures are written."""
        return lambda batch: self._write_pictures(batch, sampler, kind)

    def second(self, sampler: int, strength: float | None, first: Evaluation, kinds: Pair) -> Callable[[Batch], None]:
        """What sees the batches of what is compared with the first: their pictures and lines are written."""

        def see(batch: Batch) -> None:
            self._write_pictures(batch, sampler, kinds[1])
            self._write_lines(batch, sampler, strength, first, kinds)

        return see

    def _write_lines(self, batch: Batch, sampler: int, strength: float | None, first: Evaluation, kinds: Pair) -> None:
        from condrl.io.records import to_json

        second = {name: values.tolist() for name, values in batch.scores.each.items()}
        for position, index in enumerate(batch.indices):
            row = self.plan.rows[index // self.plan.per_prompt]
            before, after = self.plan.names
            line = {
                "prompt": row.prompt,
                "row": row.index,
                "metadata": row.metadata,
                "seed": self.seed + index,
                "sampler": self.plan.samplers[sampler],
                "strength": strength,
                before: {name: values[index].item() for name, values in first.each.items()},
                after: {name: values[position] for name, values in second.items()},
                "pictures": self._pictures(batch, index, sampler, kinds),
            }
            self.record.write(to_json(line) + "\n")
        with naming(self.plan.folder.path / RECORD):
            self.record.flush()

    def _pictures(self, batch: Batch, index: int, sampler: int, kinds: Pair) -> dict[str, str] | None:
        if batch.images.dim() != 4 or index >= self.plan.pictures:
            return None
        return {who: self._name(index, sampler, kind) for who, kind in zip(self.plan.names, kinds, strict=True)}

    def _write_pictures(self, batch: Batch, sampler: int, who: str) -> None:
        from condrl.rewards.pixels import to_pil
        from condrl.training.pictures import save_image

        if batch.images.dim() == 4:
            for image, index in zip(batch.images, batch.indices[: self.plan.pictures], strict=False):
                if index < self.plan.pictures:
                    save_image(to_pil(image.cpu()), self.plan.folder.file(self._name(index, sampler, who)))

    def _name(self, index: int, sampler: int, who: str) -> str:
        """pictures/1_ddim_10/0003_base.png"""
        section = self.plan.samplers[sampler]
        name = re.sub(r"\W+", "_", section["name"])
        return f"pictures/{sampler + 1}_{name}_{section['steps']}/{index:04d}_{who}.png"


# ---------------------------------------------------------------------------------------------- reporting


def report(result: dict[str, Any], lowered: Collection[str]) -> list[str]:
    """The summary as tables, one for each sampler and strength, with the verdicts that the differences allow."""
    from condrl.training.evaluate import verdict

    lines = [f"base: {result['base']}; {result['prompts']} prompts x {result['images_per_prompt']} images"]
    samplers = [entry["sampler"] for entry in result["evaluations"]]
    names = ("plain", "steered") if result["steer"] else ("base", "tuned")
    if result["steer"]:
        lines.append(steered_by(result["steer"]))
    for entry in result["evaluations"]:
        rows = entry["heldout"] | ({"diversity": entry["diversity"]} if "diversity" in entry else {})
        who = "base" if entry["strength"] is None else f"strength {entry['strength']:g}"
        lines += ["", f"{label(entry['sampler'], samplers)}, {who}"]
        header = ("held-out", *names, "difference", "win rate")
        lines += aligned([header, *(cells(name, row, names, lowered) for name, row in rows.items())])
        lines.append(verdict(entry["heldout"], lowered))
        if entry.get("path_kl") is not None:
            lines.append(f"path KL to the base: {entry['path_kl']:.4g} nats")
        if calls := entry.get("network_calls"):
            lines.append(f"network calls of an image: {calls['plain']:g} plain, {calls['steered']:g} steered")
    return lines


def steered_by(section: dict[str, Any]) -> str:
    """What steers, and by which rewards."""
    options = [f"{key}={value}" for key, value in section.items() if key not in ("name", "rewards")]
    rewards = [f"{name} (weight {options['weight']:g})" for name, options in section["rewards"].items()]
    by = f"; by {', '.join(rewards)}" if rewards else ""
    return f"steered: {', '.join([section['name'], *options])}{by}"


def cells(name: str, row: dict[str, Any], names: Pair, lowered: Collection[str]) -> tuple[str, ...]:
    failed = [f"{row[who]['failed']} of {who}" for who in names if row[who]["failed"]]
    won = 1 - row["win_rate"] if name in lowered else row["win_rate"]
    last = f"{won:.0%}" + (f" (failed: {', '.join(failed)})" if failed else "")
    return (name, *(interval(row[who]) for who in (*names, "difference")), last)


def label(sampler: dict[str, Any], samplers: Sequence[dict[str, Any]]) -> str:
    """A sampler's name, its steps, and the options in which it differs from others of that name."""
    others = [other for other in samplers if other["name"] == sampler["name"]]
    differing = [key for key in sampler if key != "steps" and any(other[key] != sampler[key] for other in others)]
    return ", ".join([sampler["name"], f"{sampler['steps']} steps", *(f"{key}={sampler[key]}" for key in differing)])
