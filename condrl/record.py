"""Records as JSON that every reader takes: what is not a finite number is null."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def from_json(text: str | bytes) -> Any:
    """What JSON text says.

    Raises: ValueError when it is not JSON, also where it is nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def to_json(content: Any, indent: int | None = None) -> str:
    """Dicts and lists as JSON text, with null for NaN and infinities."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def write_json(path: Path, content: Any) -> None:
    """Write it to a file whose folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(content, indent=2) + "\n", "utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
