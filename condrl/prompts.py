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
from condrl.io.files import exists, locate
from condrl.io.overrides import TOO_DEEP, is_deep
from condrl.io.records import from_json

LONGEST = 100_000  # characters of a prompt
SIDES = ("better", "worse")  # of a pair: the keys of a row, and the folders of a folder of pairs
IMAGES = (".png", ".jpg", ".jpeg", ".webp")  # how files of images end that users give


@dataclass(frozen=True)
class Row:
    """A line of a prompt file. Groups and statistics go by `index`, never by the text."""

    index: int
    prompt: str
    metadata: dict[str, Any] = field(default_factory=dict)
    folder: Path = field(default=Path(), compare=False)  # of the file, which paths in its metadata are relative to


def load_prompts(path: str, key: str) -> list[Row]:
    """Read a .txt file (a prompt per line), a .jsonl file (objects with "prompt" and any metadata), or pairs.

    A line ends at a newline, or at a carriage return and a newline; nothing else ends one. A folder of pairs has
    better/NAME.png and worse/NAME.png, and the prompt of both in better/NAME.txt or in a line of metadata.jsonl.

    Raises: UsageError naming the config key when the file is missing, empty, or a line of it cannot be read, and the
    first image of a folder that has no partner or no prompt.
    """
    if path and any(exists(locate(path) / side) for side in SIDES):
        return _pairs(path, key)
    return [row for row, _ in _file_rows(path, key)]


def _file_rows(path: str, key: str) -> list[tuple[Row, str]]:
    """The rows of a file, and where each is."""
    lines = [(number, line) for number, line in enumerate(_lines(path, key), 1) if line.strip()]
    if not lines:
        raise UsageError(f"config {key}: the prompt file {path} is empty")
    read = _json_row if path.lower().endswith(".jsonl") else _text_row
    places = [f"config {key}: {path}, line {number}" for number, _ in lines]
    folder = locate(path).parent
    return [
        (read(i, line, place, folder), place) for i, ((_, line), place) in enumerate(zip(lines, places, strict=True))
    ]


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
        raise UsageError(
            f"config {key}: {path} is a folder without better/ and worse/: give a prompt file, .txt or .jsonl"
        ) from error
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


# ---------------------------------------------------------------------------------------------- folders of pairs


def _pairs(path: str, key: str) -> list[Row]:
    """The rows of a folder of pairs, in the order of metadata.jsonl or of their names."""
    folder, where = locate(path), f"config {key}: {path}"
    names, listed = _paired(folder, where), folder / "metadata.jsonl"
    _check_files(folder, set(names), listed.exists(), where)
    prompts = _listed(str(listed), names, key) if listed.exists() else _captions(folder, names, key)
    if missing := [name for name in names if name not in prompts]:
        text = f"better/{Path(missing[0]).with_suffix('.txt')}"
        raise UsageError(
            f"{where}: better/{missing[0]} has no prompt ({len(missing)} such): write it into {text}, or into a line "
            f'of metadata.jsonl with the "file_name" {missing[0]}'
        )
    images = {name: {side: f"{side}/{name}" for side in SIDES} for name in prompts}
    rows = enumerate(prompts.items())
    return [Row(i, row.prompt, row.metadata | images[name], folder) for i, (name, row) in rows]


def _paired(folder: Path, where: str) -> list[str]:
    """The names of the images that both sides have."""
    better, worse = ({name for name in _files(folder / side) if _is_image(name)} for side in SIDES)
    for side, other, alone in (("better", "worse", better - worse), ("worse", "better", worse - better)):
        if alone:
            name = min(alone)
            raise UsageError(f"{where}: {side}/{name} has no partner {other}/{name} ({len(alone)} such)")
    if not better:
        raise UsageError(f"{where}: there are no images ({', '.join(IMAGES)}) in better/ and worse/")
    return sorted(better)


def _check_files(folder: Path, names: set[str], is_listed: bool, where: str) -> None:
    """Raises: UsageError naming a file that is neither an image of a pair nor, without metadata.jsonl, its prompt."""
    captions = set() if is_listed else {str(Path(name).with_suffix(".txt")) for name in names}
    for side, known in (("better", names | captions), ("worse", names)):
        if stray := sorted(_files(folder / side) - known):
            expected = "images, prompts being in metadata.jsonl" if is_listed else "images and better/NAME.txt alone"
            raise UsageError(f"{where}: {side}/{stray[0]} has no use: a folder of pairs has {expected}; remove it")


def _files(folder: Path) -> set[str]:
    """The names of what is in a folder, if there is one, but for hidden files."""
    return {file.name for file in folder.iterdir() if file.name[0] != "."} if folder.is_dir() else set()


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in IMAGES


def _captions(folder: Path, names: Sequence[str], key: str) -> dict[str, Row]:
    """The prompt of each better image that has a text beside it."""
    files = {name: (folder / "better" / name).with_suffix(".txt") for name in names}
    rows = {name: _file_rows(str(file), key) for name, file in files.items() if file.exists()}
    for found in rows.values():
        if len(found) > 1:
            raise UsageError(f"{found[1][1]}: a pair has one prompt, in one line")
    return {name: found[0][0] for name, found in rows.items()}


def _listed(path: str, names: Sequence[str], key: str) -> dict[str, Row]:
    """The prompt and other metadata of each image that a line of metadata.jsonl names."""
    found: dict[str, Row] = {}
    for row, where in _file_rows(path, key):
        name = row.metadata.pop("file_name", None)
        if not isinstance(name, str) or row.metadata.keys() & SIDES:
            raise UsageError(f'{where}: expected "file_name", which both images have, and neither "better" nor "worse"')
        if name not in names:
            raise UsageError(f"{where}: there are no images better/{name} and worse/{name}")
        if name in found:
            raise UsageError(f"{where}: {name} has a prompt already, in an earlier line")
        found[name] = row
    return found


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
