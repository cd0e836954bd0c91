"""Prompt rows with metadata, and the order in which an epoch draws them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from condrl.config import locate
from condrl.errors import UsageError


@dataclass(frozen=True)
class Row:
    """A line of a prompt file. Groups and statistics go by `index`, never by the text."""

    index: int
    prompt: str
    metadata: dict[str, Any] = field(default_factory=dict)


def load_prompts(path: str, key: str) -> list[Row]:
    """Read a .txt file (a prompt per line) or a .jsonl file (objects with "prompt" and any metadata).

    Raises: UsageError naming the config key when the file is missing, empty, or a line of it cannot be read.
    """
    file = locate(path)
    if not path or not file.is_file():
        raise UsageError(f"config {key}: there is no prompt file {path!r}")
    if file.suffix not in (".txt", ".jsonl"):
        raise UsageError(f"config {key}: {path} is neither .txt (a prompt per line) nor .jsonl (an object per line)")
    try:
        text = file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"config {key}: {path} is not UTF-8 text") from error
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    lines = [(number, line) for number, line in lines if line]
    if not lines:
        raise UsageError(f"config {key}: the prompt file {path} is empty")
    if file.suffix != ".jsonl":
        return [Row(i, line) for i, (_, line) in enumerate(lines)]
    return [_json_row(i, line, f"config {key}: {path}, line {number}") for i, (number, line) in enumerate(lines)]


def _json_row(index: int, line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where}: not JSON: {error.msg}") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise UsageError(f'{where}: expected an object with a "prompt" that is text')
    return Row(index, row.pop("prompt"), row)


def epoch_rows(rows: Sequence[Row], seed: int, epoch: int, count: int) -> list[Row]:
    """The `count` rows of an epoch: the list is shuffled anew each time it has been gone through.

    A function of its arguments alone, so a resumed run draws what the undisturbed run would have drawn.
    """
    positions, total = range(epoch * count, (epoch + 1) * count), len(rows)
    laps = {position // total for position in positions}
    orders = {lap: random.Random(f"{seed}-{lap}").sample(range(total), total) for lap in laps}
    return [rows[orders[position // total][position % total]] for position in positions]
