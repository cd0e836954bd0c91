"""Prompt rows with metadata, and the order in which an epoch draws them."""

from __future__ import annotations

import codecs
import functools
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from condrl.errors import UsageError, brief
from condrl.io.files import locate
from condrl.io.overrides import TOO_DEEP, is_deep
from condrl.io.records import from_json

LONGEST = 100_000  # characters of a prompt


@dataclass(frozen=True)
class Row:
    """A line of a prompt file. Groups and statistics go by `index`, never by the text."""

    index: int
    prompt: str
    metadata: dict[str, Any] = field(default_factory=dict)
    folder: Path = field(default=Path(), compare=False)  # of the file, which paths in its metadata are relative to


def load_prompts(path: str, key: str) -> list[Row]:
    """Read a .txt file (a prompt per line) or a .jsonl file (objects with "prompt" and any metadata).

    A line ends at a newline, or at a carriage return and a newline; nothing else ends one.

    Raises: UsageError naming the config key when the file is missing, empty, or a line of it cannot be read.
    """
    where = f"config {key}: {path}"
    lines = [(number, line) for number, line in enumerate(_lines(path, key), 1) if line.strip()]
    if not lines:
        raise UsageError(f"config {key}: the prompt file {path} is empty")
    read = _json_row if path.lower().endswith(".jsonl") else _text_row
    folder = locate(path).parent
    return [read(i, line, f"{where}, line {number}", folder) for i, (number, line) in enumerate(lines)]


def duplicate_note(rows: Sequence[Row]) -> str | None:
    """A note on rows with the same prompt and metadata; None when there are none."""
    first: dict[str, Row] = {}
    again = []
    for row in rows:
        earlier = first.setdefault(json.dumps([row.prompt, row.metadata], sort_keys=True), row)
        if earlier is not row:
            again.append((earlier, row))
    if not again:
        return None
    earlier, row = again[0]
    count = "1 row repeats" if len(again) == 1 else f"{len(again)} rows repeat"
    return f"{count} an earlier one, the first {row.prompt!r} (rows {earlier.index + 1} and {row.index + 1})"


def _lines(path: str, key: str) -> list[str]:
    """Raises: UsageError naming the config key when there is no such file, or when it is not text."""
    if not path:
        raise UsageError(f"config {key}: give a prompt file, .txt (a prompt per line) or .jsonl (an object per line)")
    file = locate(path)
    try:
        content = file.read_bytes()
    except IsADirectoryError as error:
        raise UsageError(f"config {key}: {path} is a folder: give a prompt file in it, .txt or .jsonl") from error
    except FileNotFoundError as error:
        raise UsageError(f"config {key}: there is no prompt file {path!r}") from error
    except (OSError, ValueError) as error:  # no permission, or a name that no file can have
        raise UsageError(f"config {key}: the prompt file {path[:80]!r} cannot be read: {brief(error)}") from error
    if file.suffix.lower() not in (".txt", ".jsonl"):
        raise UsageError(f"config {key}: {path} is neither .txt (a prompt per line) nor .jsonl (an object per line)")
    if content.startswith(b"version https://git-lfs"):
        raise UsageError(f"config {key}: {path} is a Git LFS pointer, not the file: run git lfs pull")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UsageError(f"config {key}: {path} is UTF-16 text: save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(f"config {key}: {path}, line {line}: not UTF-8 text: save it as UTF-8") from error
    return [line.removesuffix("\r") for line in text.split("\n")]


def _text_row(index: int, line: str, where: str, folder: Path) -> Row:
    if "\r" in line:
        raise UsageError(f"{where}: there is a carriage return in it: save the file with a newline at each line's end")
    return Row(index, usable(line.strip(" \t"), where), folder=folder)


def _json_row(index: int, line: str, where: str, folder: Path) -> Row:
    try:
        row = from_json(line)
    except ValueError as error:
        raise UsageError(f"{where}: not usable JSON: {getattr(error, 'msg', error)}") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise UsageError(f'{where}: expected an object with a "prompt" that is text')
    if is_deep(row):
        raise UsageError(f"{where}: {TOO_DEEP}")
    return Row(index, usable(row.pop("prompt"), where), row, folder)


def usable(prompt: str, where: str) -> str:
    """Raises: UsageError when a prompt is too long, empty, or has characters that cannot be used."""
    if len(prompt) > LONGEST:
        raise UsageError(f"{where}: the prompt has {len(prompt):,} characters; at most {LONGEST:,} are allowed")
    if not prompt.strip():
        raise UsageError(f"{where}: the prompt is empty")
    if "\0" in prompt:
        raise UsageError(f"{where}: there is a NUL character in the prompt: save the file as UTF-8 text")
    if re.search("[\ud800-\udfff]", prompt):
        raise UsageError(f"{where}: the prompt has half of a surrogate pair, which is not a character")
    return prompt


def epoch_rows(rows: Sequence[Row], seed: int, epoch: int, count: int) -> list[Row]:
    """The `count` rows of an epoch, distinct if there are as many; the list is reshuffled after each pass through it.

    A function of its arguments alone, so a resumed run draws what an uninterrupted run would have drawn.
    """
    positions, total = range(epoch * count, (epoch + 1) * count), len(rows)
    laps = {position // total for position in positions}
    for lap in range(0, min(laps), 100):  # so that no call has to go back further
        _order(seed, lap, total, count)
    orders = {lap: _order(seed, lap, total, count) for lap in laps}
    return [rows[orders[position // total][position % total]] for position in positions]


@functools.cache
def _order(seed: int, lap: int, total: int, count: int) -> list[int]:
    """The order of a pass; what its first epoch has already had of the pass before comes last."""
    order = random.Random(f"{seed}-{lap}").sample(range(total), total)
    had = lap * total % count
    if not had or count > total:
        return order
    return sorted(order, key=set(_order(seed, lap - 1, total, count)[-had:]).__contains__)
