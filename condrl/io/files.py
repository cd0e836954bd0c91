"""Where files are, and files of weights: reading one gives tensors, or a one-line error that says what is wrong."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from condrl.errors import UsageError
from condrl.io.records import from_json

if TYPE_CHECKING:
    from torch import Tensor

PACKAGE = Path(__file__).parents[1]
ASSETS = PACKAGE / "assets"
CONFIGS = next(folder for folder in (PACKAGE / "configs", PACKAGE.parent / "configs") if folder.is_dir())
ZIP, PICKLE = b"PK\x03\x04", b"\x80\x02"  # how files of torch.save begin, since and before torch 1.6
TEXTS = {  # how texts begin that are found in place of a file of weights
    b"version https://git-lfs": "is a Git LFS pointer, not the file: run git lfs pull",
    b"<!doctype html": "is a web page, not the file: download it again",
    b"<html": "is a web page, not the file: download it again",
}


def locate(path: str) -> Path:
    """A path as the user wrote it; `asset:NAME` lies in the package's own assets.

    Raises: UsageError when the name leads out of them.
    """
    if not path.startswith("asset:"):
        return expanded(path)
    name = path.removeprefix("asset:")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UsageError(f"{path} is not in the package's assets: give a path without asset:")
    return ASSETS / name


def expanded(path: str) -> Path:
    """The path with ~ for a home folder; as it is where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def exists(path: Path) -> bool:
    """Whether there is such a file or folder; False for a text that is too long for a path or contains NUL."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def check_folder(path: Path) -> None:
    """Raises: UsageError when files cannot be written there."""
    existing = next(p for p in (path, *path.absolute().parents) if exists(p))
    if not existing.is_dir():
        raise UsageError(f"cannot write to {path}: {existing} is a file")
    try:
        path.exists()
    except OSError as error:
        raise UsageError(f"cannot write there: {error}") from error
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"cannot write to {existing}: choose another folder")


def why_unreadable(path: Path) -> str | None:
    """What is wrong with a file of weights or JSON, as the end of a sentence; None when nothing is found.

    It tells apart missing and empty files, folders, Git LFS pointers, web pages and, by the suffix, safetensors files
    that are truncated or something else, and JSON that is damaged or not an object.
    """
    if not path.is_file():
        return "is a folder, not a file" if path.is_dir() else "does not exist"
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        return "is empty"
    for text, why in TEXTS.items():
        if start.lower().startswith(text):
            return why
    if path.suffix == ".safetensors":
        return _safetensors_error(path, start)
    if path.suffix == ".json":
        return _json_error(path)
    return None


def _safetensors_error(path: Path, start: bytes) -> str | None:
    """8 bytes hold the header's length, then comes the header in JSON, then the tensors it lists."""
    if start.startswith((ZIP, PICKLE)):
        return "is a pickle under the name of a safetensors file"
    size, length = path.stat().st_size, 8 + int.from_bytes(start[:8], "little")
    if start[8:9] != b"{":
        return "is not a safetensors file"
    if length > size:
        return f"is truncated: it has {size:,} bytes, its header alone should have {length:,}"
    try:
        with path.open("rb") as file:
            header = from_json(file.read(length)[8:])
        length += max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except (ValueError, TypeError, LookupError, AttributeError):
        return "is damaged: its header cannot be read"
    return f"is truncated: it has {size:,} of {length:,} bytes" if length > size else None


def _json_error(path: Path) -> str | None:
    try:
        value = json.loads(path.read_bytes())  # as the libraries read it, which write NaN and Infinity themselves
    except RecursionError:
        return "is not valid JSON: it is nested too deeply"
    except ValueError as error:
        return f"is not valid JSON: {error}"
    return None if isinstance(value, dict) else "is not a JSON object"


def load_tensors(path: Path, what: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; the error begins with `what` it should be.

    Raises: UsageError in one line that names the file and says what is wrong with it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _check(path, what)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{what}: {path} cannot be read: {_first_line(error)}") from error


def load_metadata(path: Path, what: str) -> dict[str, str]:
    """The texts in the header of a safetensors file.

    Raises: UsageError as `load_tensors` does.
    """
    from safetensors import SafetensorError, safe_open

    _check(path, what)
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{what}: {path} cannot be read: {_first_line(error)}") from error


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, the same bytes for the same content: the library writes `metadata` in random order."""
    from safetensors.torch import save

    data = save(dict(tensors), dict(metadata))
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    text = json.dumps({**header, "__metadata__": dict(sorted(metadata.items()))}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])


def load_torch(path: Path, what: str) -> dict[str, Any]:
    """The state dict in a file of `torch.save`, on the CPU; nothing in it is run (`weights_only=True`).

    Raises: UsageError in one line that names the file and says what is wrong with it.
    """
    _check(path, what)
    with path.open("rb") as file:
        start = file.read(4)
    if not start.startswith((ZIP, PICKLE)):
        raise UsageError(f"{what}: {path} is not a file of torch.save")
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to ask for
        raise UsageError(
            f"{what}: {path} is damaged, or holds more than weights: {type(error).__name__}: {_first_line(error)}"
        ) from error
    if not isinstance(state, dict):
        raise UsageError(f"{what}: {path} holds a {type(state).__name__} instead of named weights")
    return state


def _check(path: Path, what: str) -> None:
    if why := why_unreadable(path):
        raise UsageError(f"{what}: {path} {why}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0]


def sha256_of(path: Path) -> str:
    """The digest of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
