"""Checkpoints, from which a run resumes as if nothing had happened.

They are safetensors and JSON, and are written whole or not at all.
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from condrl.errors import RunError, UsageError, brief, print_main
from condrl.io.files import sha256_of

FILES = TENSORS, PLAIN, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"


# ---------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(folder: Path, name: str, state: dict[str, Any], keep: int) -> None:
    """Write nested dicts and lists of tensors and JSON values to folder/name, and drop all but the newest `keep`.

    The checkpoint is written under another name, with the sha256 of each file, and renamed once it is on the disk.

    Raises: RunError when it cannot be written; earlier checkpoints are then as they were.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    part = folder / f".{name}.part"
    tensors: dict[str, Tensor] = {}
    plain = _split(state, tensors)
    try:
        for left in _named(folder, r"\.epoch_\d+\.part"):  # by a process that was killed while it wrote
            _remove(left)
        part.mkdir(parents=True, exist_ok=True)
        save_file(tensors, part / TENSORS)
        (part / PLAIN).write_text(json.dumps(plain, allow_nan=False), "utf-8")
        digests = {file: sha256_of(part / file) for file in (TENSORS, PLAIN)}
        (part / MANIFEST).write_text(json.dumps(digests), "utf-8")
        for path in (*part.iterdir(), part):
            _to_disk(path)
        _remove(folder / name)
        if (folder / name).exists():  # other files in it stay
            for file in FILES:
                (part / file).replace(folder / name / file)
            part.rmdir()
        else:
            part.rename(folder / name)
        _to_disk(folder)
    except (OSError, SafetensorError, TypeError, ValueError) as error:  # the last two of what is no JSON
        _remove(part)
        raise RunError(
            f"the checkpoint {folder / name} cannot be written ({error}); earlier ones are intact"
        ) from error
    for old in checkpoints(folder)[:-keep]:
        _remove(old)


def checkpoint_files(name: str) -> list[str]:
    """The relative paths of what `save_checkpoint` writes, temporarily or for good."""
    return [f"{folder}/{file}" for folder in (f".{name}.part", name) for file in FILES]


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest last."""
    return sorted(_named(folder, r"epoch_\d+"))


def _named(folder: Path, pattern: str) -> list[Path]:
    """The folders in a folder whose whole name matches a pattern; links to folders are left out."""
    found = (path for path in folder.glob("*") if re.fullmatch(pattern, path.name))
    return [path for path in found if path.is_dir() and not path.is_symlink()]


def _remove(path: Path) -> None:
    """Remove a checkpoint; other files in its folder stay."""
    for file in FILES:
        (path / file).unlink(missing_ok=True)
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()


def drop_later(path: Path) -> None:
    """Remove the checkpoints that come after one in its folder: a run that resumes from it will write its own."""
    for later in checkpoints(path.parent):
        if later.name > path.name:
            _remove(later)


def newest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest intact checkpoint in a folder, with its content; damaged ones are reported and skipped."""
    for path in reversed(checkpoints(folder)):
        try:
            return path, read_checkpoint(path)
        except UsageError as error:
            print_main(f"warning: {error}; trying the one before")
    return None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote.

    Raises: UsageError when a file is missing or has changed since it was written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        manifest = json.loads((path / MANIFEST).read_text("utf-8"))
        damaged = [file for file in (TENSORS, PLAIN) if sha256_of(path / file) != manifest[file]]
        if damaged:
            raise UsageError(f"the checkpoint {path} is damaged: {damaged[0]} has changed since it was written")
        state: dict[str, Any] = _join(json.loads((path / PLAIN).read_text("utf-8")), load_file(path / TENSORS))
        if not isinstance(state, dict):
            raise TypeError(f"it holds a {type(state).__name__}")
    except UsageError:
        raise
    except (OSError, ValueError, LookupError, TypeError, RecursionError, SafetensorError) as error:
        raise UsageError(f"{path} is not a complete checkpoint ({brief(error)})") from error
    return state


def unlike(expected: Any, found: Any, name: str = "") -> str | None:
    """How a part of a checkpoint differs in kind from one of the same run, in a few words; None when it does not.

    Tensors have to be of the same shape and precision, and finite; numbers finite and not negative.
    """
    if isinstance(expected, Tensor):
        if not isinstance(found, Tensor) or (found.shape, found.dtype) != (expected.shape, expected.dtype):
            return f"{name} is not a tensor {tuple(expected.shape)} of {expected.dtype}"
        return None if found.isfinite().all() else f"{name} holds values that are not finite"
    if isinstance(expected, dict):
        if not isinstance(found, dict) or found.keys() != expected.keys():
            other = expected.keys() ^ (found.keys() if isinstance(found, dict) else ())
            return f"{name or 'it'} has other keys, such as {sorted(map(str, other))[0]}"
        parts = [(f"{name}.{key}".lstrip("."), expected[key], found[key]) for key in expected]
    elif isinstance(expected, list):
        if not isinstance(found, list) or len(found) != len(expected):
            return f"{name} is not a list of {len(expected)}"
        parts = [(f"{name}.{i}", *pair) for i, pair in enumerate(zip(expected, found, strict=True))]
    else:
        kinds = (int, float) if isinstance(expected, float) else type(expected)
        if not isinstance(found, kinds) or (isinstance(found, bool) and not isinstance(expected, bool)):
            return f"{name} is {str(found)[:40]!r}, not a {type(expected).__name__}"
        return None if found is None or 0 <= found < math.inf else f"{name} is {found}"
    return next((why for part, own, other in parts if (why := unlike(own, other, part))), None)


def check_saveable(state: Any, whose: str) -> None:
    """Raises: UsageError when a state holds something else than tensors and JSON values."""
    try:
        json.dumps(_split(state, {}), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"the state_dict of {whose} cannot be saved, it may hold tensors, numbers, text, lists and dicts: {error}"
        ) from error


def _split(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The value with its tensors moved to `tensors`, under numbers, and replaced by these keys."""
    if isinstance(value, Tensor):
        key = str(len(tensors))
        tensors[key] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": key}
    if isinstance(value, dict):
        return {"dict": [[name, _split(part, tensors)] for name, part in value.items()]}
    if isinstance(value, list | tuple):
        return [_split(part, tensors) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}  # JSON has no such number
    return value


def _join(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_join(part, tensors) for part in value]
    match value:
        case {"tensor": key}:
            return tensors[key]
        case {"float": text}:
            return float(text)
        case {"dict": pairs}:
            return {name: _join(part, tensors) for name, part in pairs}
    return value


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
