"""What was trained, out and in: a LoRA in the format that diffusers and ComfyUI read, or a toy's small network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from condrl.errors import UsageError

LORA_FILE = "pytorch_lora_weights.safetensors"
MODULE_FILE = "network.safetensors"
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
        raise UsageError(
            f"{folder / MODULE_FILE} is of another network: {str(error).splitlines()[-1].strip()}"
        ) from error
