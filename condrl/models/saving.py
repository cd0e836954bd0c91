"""Whole pipelines in diffusers' format, under the names that every release of the libraries reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from condrl.io.files import load_metadata, load_tensors, save_tensors
from condrl.models.loading import Family, rounded
from condrl.models.lora import lora_layers


@dataclass
class Survival:
    """How much of a change of float32 weights is left where weights before and after it are rounded to a dtype."""

    dtype: torch.dtype
    change: float = 0.0  # its squared norm
    lost: float = 0.0  # the squared norm of what rounding makes of it, less the change itself
    changed: int = 0  # weights
    unmoved: int = 0  # of those, the ones that are rounded to what they were before

    def add(self, before: Tensor, after: Tensor) -> None:
        """Count weights of a shape, without and with their change."""
        change, left = after - before, after.to(self.dtype).float() - before.to(self.dtype).float()
        self.change += change.double().square().sum().item()
        self.lost += (left - change).double().square().sum().item()
        self.changed += int((change != 0).sum())
        self.unmoved += int(((change != 0) & (left == 0)).sum())

    @property
    def share(self) -> float:
        """1 less the relative error of the change, 0 where that is larger than the change itself."""
        return max(0.0, 1 - (self.lost / self.change) ** 0.5) if self.change else 1.0

    def __str__(self) -> str:
        stay, name = self.unmoved / max(1, self.changed), str(self.dtype).removeprefix("torch.")
        return (
            f"{self.share:.0%} of the LoRA's change survives rounding to {name}; {stay:.0%} of the weights that it "
            "changes stay as they were"
        )


@torch.no_grad()
def merge_lora(network: Any, dtype: torch.dtype = torch.float32) -> Survival:
    """Add a network's LoRA to its float32 weights, for good, and say what rounding them to a dtype will leave of it."""
    survival = Survival(dtype)
    for layer in lora_layers(network).values():
        before = layer.get_base_layer().weight.clone()
        layer.merge(safe_merge=True)
        survival.add(before, layer.get_base_layer().weight)
    network.unload_lora()
    return survival


def round_pipeline(pipe: Any, family: Family, dtype: torch.dtype) -> None:
    """Round a pipeline's networks, but for a VAE that overflows in half precision."""
    for name in family.networks:
        if (network := getattr(pipe, name)) is not None:
            keeps = name == "vae" and family.vae_in_float32
            setattr(pipe, name, rounded(network, dtype) if keeps else network.to(dtype))


def save_pipeline(pipe: Any, folder: Path) -> None:
    """Write a pipeline, its text encoders and tokenizers as every release of transformers reads them."""
    pipe.save_pretrained(folder)
    for encoder in folder.glob("text_encoder*"):
        keep_clip_names(encoder)
    for tokenizer in folder.glob("tokenizer*"):
        write_vocabulary(tokenizer)


def keep_clip_names(folder: Path) -> None:
    """Give a CLIP text encoder's weights the prefix that releases before transformers 5 need.

    Its config says float32, as diffusers loads the other parts unless it is told otherwise.
    """
    path = folder / "model.safetensors"
    if json.loads((folder / "config.json").read_text("utf-8")).get("model_type") != "clip_text_model":
        return
    state = load_tensors(path, "the text encoder")
    bare = [key for key in state if key.startswith(("embeddings.", "encoder.", "final_layer_norm."))]
    named = {f"text_model.{key}" if key in bare else key: value for key, value in state.items()}
    save_tensors(named, path, {"format": "pt", **load_metadata(path, "the text encoder")})
    edit_json(folder / "config.json", dtype="float32")


def write_vocabulary(folder: Path) -> None:
    """Write vocab.json and merges.txt, for readers that do not know a tokenizer.json of byte pairs."""
    file = folder / "tokenizer.json"
    model = json.loads(file.read_text("utf-8"))["model"] if file.is_file() else {}
    if model.get("type") == "BPE" and not (folder / "vocab.json").exists():
        merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
        (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), "utf-8")
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    content = json.loads(path.read_text("utf-8")) | changes
    kept = {key: value for key, value in content.items() if value is not None or key not in changes}
    path.write_text(json.dumps(kept, indent=2) + "\n", "utf-8")
