"""What was trained, out and in: a LoRA in the format that diffusers and ComfyUI read, or a toy's small network.

And checkpoints, from which a run goes on as if nothing had happened: safetensors and JSON, written whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from condrl.errors import RunError, UsageError, say

LORA_FILE = "pytorch_lora_weights.safetensors"
MODULE_FILE = "network.safetensors"
FILES = TENSORS, PLAIN, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
CARD = """---
base_model: {base}
library_name: diffusers
tags: [lora, text-to-image, stable-diffusion, condrl]
---

# LoRA tuned with condrl

Base model: `{base}`. `pipe.load_lora_weights(<this folder>)` loads it into a diffusers pipeline; ComfyUI reads
`{file}`. The scale is baked in (alpha = rank). Settings and measurements: `config.yaml` and `result.json` of the run.
"""


def lora_layers(unet: nn.Module) -> dict[str, Any]:
    """The peft LoRA layers of a UNet by module name."""
    return {name: module for name, module in unet.named_modules() if hasattr(module, "lora_A") and module.lora_A}


def lora_state(unet: nn.Module) -> dict[str, Tensor]:
    """`unet.<module>.lora.{down,up}.weight` in float32, the scale alpha / rank baked into `up`.

    Readers then need no alpha: those that ignore metadata and those that assume alpha = rank agree.
    """
    state = {}
    for name, layer in lora_layers(unet).items():
        (adapter,) = layer.lora_A
        state[f"unet.{name}.lora.down.weight"] = layer.lora_A[adapter].weight.detach().cpu().contiguous()
        up = layer.lora_B[adapter].weight.detach() * layer.scaling[adapter]
        state[f"unet.{name}.lora.up.weight"] = up.cpu().contiguous()
    return state


def save_lora(unet: nn.Module, folder: Path, base: str) -> None:
    """Write the LoRA of a UNet, and a model card that names its base model, to `folder`."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(lora_state(unet), folder / LORA_FILE, metadata={"format": "pt"})
    (folder / "README.md").write_text(CARD.format(base=base, file=LORA_FILE))


@torch.no_grad()
def load_lora(unet: nn.Module, folder: Path) -> None:
    """Read a LoRA written by `save_lora` into the UNet's existing adapter, whatever its alpha.

    Raises: UsageError when the file is missing or was made for other modules or another rank.
    """
    from safetensors.torch import load_file

    path = folder / LORA_FILE if folder.is_dir() else folder
    if not path.is_file():
        raise UsageError(f"there is no LoRA at {folder}: expected a folder with {LORA_FILE}")
    saved, own = load_file(path), lora_state(unet)
    if not all(key.endswith((".lora.down.weight", ".lora.up.weight")) for key in saved):
        raise UsageError(f"the LoRA {path} is not in diffusers' format: its keys are like {min(saved)}")
    wrong = sorted(set(saved) ^ set(own)) or [k for k in own if saved[k].shape != own[k].shape]
    if wrong:
        rank = min(saved[key].shape[0] for key in saved if key.endswith("down.weight"))
        raise UsageError(
            f"the LoRA {path} (rank {rank}) does not fit model.lora_rank and model.lora_targets: see {wrong[0]}"
        )
    for name, layer in lora_layers(unet).items():
        (adapter,) = layer.lora_A
        layer.lora_A[adapter].weight.copy_(saved[f"unet.{name}.lora.down.weight"])
        layer.lora_B[adapter].weight.copy_(saved[f"unet.{name}.lora.up.weight"] / layer.scaling[adapter])


def save_module(module: nn.Module, folder: Path) -> None:
    """Write a small network's weights to `folder`."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in module.state_dict().items()}, folder / MODULE_FILE)


def load_module(module: nn.Module, folder: Path) -> None:
    """Read a small network's weights.

    Raises: UsageError when there are none in the folder, or when they are another network's.
    """
    from safetensors.torch import load_file

    if not (folder / MODULE_FILE).is_file():
        raise UsageError(f"{folder} holds no {MODULE_FILE}")
    try:
        module.load_state_dict(load_file(folder / MODULE_FILE))
    except RuntimeError as error:
        difference = str(error).splitlines()[-1].strip()
        raise UsageError(
            f"{folder / MODULE_FILE} is of another network (other options of the model?): {difference}"
        ) from error


# ---------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(folder: Path, name: str, state: dict[str, Any], keep: int) -> None:
    """Write nested dicts and lists of tensors and JSON values to folder/name, and drop all but the newest `keep`.

    It is written under another name, with the sha256 of each file, and renamed when it is on the disk.

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
        (part / PLAIN).write_text(json.dumps(plain, allow_nan=False))
        (part / MANIFEST).write_text(json.dumps({file: _sha256(part / file) for file in (TENSORS, PLAIN)}))
        for path in (*part.iterdir(), part):
            _to_disk(path)
        _remove(folder / name)
        part.rename(folder / name)
        _to_disk(folder)
    except (OSError, SafetensorError) as error:
        _remove(part)
        raise RunError(
            f"the checkpoint {folder / name} cannot be written ({error}); earlier ones are intact"
        ) from error
    for old in checkpoints(folder)[:-keep]:
        _remove(old)


def checkpoint_files(name: str) -> list[str]:
    """The relative paths of what `save_checkpoint` writes, for a while or for good."""
    return [f"{folder}/{file}" for folder in (f".{name}.part", name) for file in FILES]


def checkpoints(folder: Path) -> list[Path]:
    """Those in a folder, the newest last."""
    return sorted(_named(folder, r"epoch_\d+"))


def _named(folder: Path, pattern: str) -> list[Path]:
    """The folders in a folder whose whole name is as a pattern says."""
    return [path for path in folder.glob("*") if re.fullmatch(pattern, path.name) and path.is_dir()]


def _remove(path: Path) -> None:
    """Remove a checkpoint; what else somebody put into its folder stays there."""
    for file in FILES:
        (path / file).unlink(missing_ok=True)
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()


def drop_later(path: Path) -> None:
    """Remove the checkpoints that come after one in its folder: what goes on from it will write its own."""
    for later in checkpoints(path.parent):
        if later.name > path.name:
            _remove(later)


def newest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint in a folder that is whole, with what it holds; damaged ones are named and passed over."""
    for path in reversed(checkpoints(folder)):
        try:
            return path, read_checkpoint(path)
        except UsageError as error:
            say(f"warning: {error}; trying the one before")
    return None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote.

    Raises: UsageError when a file is missing or is not what was written.
    """
    from safetensors.torch import load_file

    try:
        manifest = json.loads((path / MANIFEST).read_text())
        damaged = [file for file in (TENSORS, PLAIN) if _sha256(path / file) != manifest[file]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not a whole checkpoint ({type(error).__name__}: {error})") from error
    if damaged:
        raise UsageError(f"the checkpoint {path} is damaged: {damaged[0]} is not what was written")
    state: dict[str, Any] = _join(json.loads((path / PLAIN).read_text()), load_file(path / TENSORS))
    return state


def _split(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The value with its tensors numbered, put into `tensors`, and their keys in their places."""
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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
