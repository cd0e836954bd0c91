"""JSON that every reader accepts: without NaN, infinities and duplicate keys."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from condrl.errors import naming


def to_json(content: Any, indent: int | None = None) -> str:
    """Dicts and lists as JSON text, with null for NaN and infinities."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def from_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises: ValueError on anything else, also NaN, numbers beyond floats, duplicate keys, and very deep nesting.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_in_range)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises: ValueError on a duplicate key."""
    found = dict(pairs)
    if len(found) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {name!r} is duplicated")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _in_range(text: str) -> float:
    """Raises: ValueError on a number beyond the range of floats."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large for a number")
    return value


def write_json(path: Path, content: Any) -> None:
    """Write content as JSON to a file, whose folder is created if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        path.write_text(to_json(content, indent=2) + "\n", "utf-8")


def write_lines(path: Path, lines: Iterable[Any]) -> None:
    """Write each content as a line of JSON to a file, in a folder that exists."""
    with naming(path), path.open("w", encoding="utf-8") as record:
        for line in lines:
            record.write(to_json(line) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
