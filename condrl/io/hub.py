"""Files that are local, or in a repository of the Hugging Face hub."""

from __future__ import annotations

import functools
import http.client
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from condrl.errors import UsageError, brief, out_of_memory
from condrl.io.files import locate, why_unreadable

REPOSITORY = r"[\w-][\w.-]*(/[\w.-]+)?(@.+)?"  # OWNER/NAME, or NAME of an old one
WEIGHTS = (".pt", ".pth", ".bin", ".safetensors", ".ckpt")
SECONDS = 5.0  # to wait for the hub's first answer


def hub_file(source: str, name: str, option: str) -> str:
    """A local file's path; or that of the file `name` of a hub repository, OWNER/NAME or OWNER/NAME@REVISION.

    Raises: UsageError naming the config's option when it is found neither locally nor on the hub.
    """
    path = locate(source)
    if path.exists() or source.endswith(WEIGHTS) or not re.fullmatch(REPOSITORY, source):
        check_file(path, option)
        return str(path)
    repository, _, revision = source.partition("@")
    from huggingface_hub import hf_hub_download

    with fetching(option, f"{name} of {source}"):
        return hf_hub_download(repository, name, revision=revision or None)


def folder_or_id(source: str, option: str) -> str:
    """A folder's path, or the hub id as it is.

    Raises: UsageError naming the config's option when there is no such folder, or its text files cannot be read.
    """
    folder = locate(source)
    if folder.is_dir():
        for file in sorted(folder.iterdir()):
            if file.suffix in (".json", ".txt"):  # a tokenizer would take a Git LFS pointer for a vocabulary
                check_file(file, option)
        return str(folder)
    if folder.exists() or not re.fullmatch(REPOSITORY, source):
        raise UsageError(f"config {option}: there is no folder {folder}")
    return source


def check_file(path: Path, option: str) -> None:
    """Raises: UsageError naming the option when there is no such file, or when it cannot be what was meant."""
    if not path.exists():
        raise UsageError(f"config {option}: there is no file {path}")
    if why := why_unreadable(path):
        raise UsageError(f"config {option}: {path} {why}")


@contextmanager
def fetching(option: str, what: str, local: bool = False) -> Iterator[None]:
    """Within it, errors of a library that loads `what`, from a folder or the hub, become one line.

    Raises: UsageError naming the config's option.
    """
    with offline_if_unreachable(local or Path(what).is_dir()):
        try:
            yield
        except UsageError:
            raise
        except Exception as error:  # open_clip, transformers and the hub's client pass on whatever their parts raise
            if out_of_memory(error):
                raise
            raise UsageError(f"config {option}: cannot load {what}: {_reason(Path(what), error)}") from error


@contextmanager
def offline_if_unreachable(local: bool) -> Iterator[None]:
    """Within it, only the hub's cache is used if the hub cannot be reached.

    Its library would retry for 23 seconds per file. With `local` files the hub is not contacted.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not (local or reachable(constants.ENDPOINT))
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def unreachable_reason() -> str | None:
    """Why something that is not in the cache cannot be had; None if the hub can be reached."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        return None
    return f"it is not on this machine, and {constants.ENDPOINT} cannot be reached: give a file or folder"


def _reason(source: Path, error: Exception) -> str:
    for file in sorted(source.iterdir()) if source.is_dir() else [source] if source.exists() else []:
        if file.is_file() and (why := why_unreadable(file)):
            return f"{file} {why}"
    return (None if source.exists() else unreachable_reason()) or brief(error)


@functools.cache
def reachable(endpoint: str) -> bool:
    """Whether the hub answers at all; asked once."""
    try:
        urllib.request.urlopen(endpoint, timeout=SECONDS).close()
    except (urllib.error.HTTPError, http.client.HTTPException, ValueError):
        return True  # a server does, or the hub's library will say what is wrong
    except OSError as error:
        return isinstance(getattr(error, "reason", None), ssl.SSLError)  # it is there; its library may trust it
    return True
