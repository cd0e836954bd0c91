"""Files that are local, or in a repository of the Hugging Face hub."""

from __future__ import annotations

from condrl.config import locate
from condrl.errors import UsageError


def hub_file(source: str, name: str, option: str) -> str:
    """A local file's path; or that of the file `name` of a hub repository, OWNER/NAME or OWNER/NAME@REVISION.

    Raises: UsageError naming the config's option when it can be had neither here nor there.
    """
    path = locate(source)
    if path.exists():
        return str(path)
    repository, _, revision = source.partition("@")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return hf_hub_download(repository, name, revision=revision or None)
    except (OSError, HfHubHTTPError, HFValidationError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"config {option}: no such file, and {name} of {source} cannot be had: {reason}") from error


def folder_or_id(source: str) -> str:
    """A folder's path, or the hub id as it is."""
    folder = locate(source)
    return str(folder) if folder.exists() else source
