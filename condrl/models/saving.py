"""Whole pipelines in diffusers' format, under the names that every release of the libraries reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from condrl.io.files import load_metadata, load_tensors, save_tensors
from condrl.models.lora import lora_layers


@torch.no_grad()
def merge_lora(network: Any) -> None:
    """Add a network's LoRA to its weights, for good: it is then a plain network."""
    for layer in lora_layers(network).values():
        layer.merge(safe_merge=True)
    network.unload_lora()


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
