"""The files that rewards read, small and random, in the formats that they are published in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import nn

SMALL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    "quick_gelu": True,
}


def save_reward_files(folder: Path) -> dict[str, dict[str, str]]:
    """Weights as they are published: a state dict, a checkpoint with one, a transformers folder; and options for them."""
    from transformers import BertTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    torch.manual_seed(0)
    (folder / "small.json").write_text(json.dumps(SMALL))
    open_clip.add_model_config(folder / "small.json")
    model = open_clip.create_model("small")
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    layers = [nn.Linear(i, o) for i, o in ((24, 32), (32, 16), (16, 8), (8, 4), (4, 1))]
    head = {
        f"layers.{n}.{k}": v
        for n, one in zip((0, 2, 4, 6, 7), layers, strict=True)
        for k, v in one.state_dict().items()
    }
    torch.save(head, folder / "aesthetic-model.pth")
    shared = {"layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    words = [
        "<|startoftext|>",
        "<|endoftext|>",
        *(c + end for c in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")),
    ]
    (folder / "pick").mkdir()
    (folder / "pick" / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "pick" / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "pick" / "vocab.json"), str(folder / "pick" / "merges.txt")).save_pretrained(
        folder / "pick"
    )
    text = {**shared, "vocab_size": len(words), "max_position_embeddings": 40, "eos_token_id": 1, "bos_token_id": 0}
    config = CLIPConfig(
        text_config=text, vision_config={**shared, "image_size": 32, "patch_size": 8}, projection_dim=24
    )
    CLIPModel(config).save_pretrained(folder / "pick")
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**size).save_pretrained(folder / "pick")
    torch.save(image_reward_weights(), folder / "ImageReward.pt")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "star", "cat", "two", "dog"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    Image.fromarray(np.full((40, 40, 3), 200, np.uint8)).save(folder / "reference.png")
    clip = {"config": str(folder / "small.json"), "weights": str(folder / "open_clip_pytorch_model.bin")}
    return {
        "clip": clip,
        "clip_diversity": clip,
        "aesthetic": {**clip, "head": str(folder / "aesthetic-model.pth")},
        "hps": {"config": clip["config"], "weights": str(folder / "HPS_v2.1_compressed.pt")},
        "pickscore": {"path": str(folder / "pick"), "processor": str(folder / "pick")},
        "image_reward": {"weights": str(folder / "ImageReward.pt"), "tokenizer": str(folder / "bert")},
        "similarity": {"images": str(folder / "reference.png")},
    }


def image_reward_weights():
    """A small ImageReward under the names of the published file: 2 + 2 layers of width 128, images of 32 x 32.

    The draws are numpy's frozen ones: recorded scores belong to them.
    """
    draws, state = np.random.RandomState(1), {}

    def add(name, *shape):
        state[name] = torch.from_numpy(draws.standard_normal(shape)).float() / 5

    def linear(name, inputs, outputs):
        add(f"{name}.weight", outputs, inputs)
        add(f"{name}.bias", outputs)

    def norm(name):
        state[f"{name}.weight"] = torch.linspace(0.5, 1.5, 128)
        add(f"{name}.bias", 128)

    add("blip.visual_encoder.cls_token", 1, 1, 128)
    add("blip.visual_encoder.pos_embed", 1, 17, 128)
    add("blip.visual_encoder.patch_embed.proj.weight", 128, 3, 8, 8)
    add("blip.visual_encoder.patch_embed.proj.bias", 128)
    for block in ("blip.visual_encoder.blocks.0", "blip.visual_encoder.blocks.1"):
        norm(f"{block}.norm1")
        linear(f"{block}.attn.qkv", 128, 384)
        linear(f"{block}.attn.proj", 128, 128)
        norm(f"{block}.norm2")
        linear(f"{block}.mlp.fc1", 128, 512)
        linear(f"{block}.mlp.fc2", 512, 128)
    norm("blip.visual_encoder.norm")
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    add("blip.text_encoder.embeddings.word_embeddings.weight", 30, 128)
    add("blip.text_encoder.embeddings.position_embeddings.weight", 40, 128)
    norm("blip.text_encoder.embeddings.LayerNorm")
    for layer in ("blip.text_encoder.encoder.layer.0", "blip.text_encoder.encoder.layer.1"):
        for part in (f"{layer}.attention", f"{layer}.crossattention"):
            for name in ("query", "key", "value"):
                linear(f"{part}.self.{name}", 128, 128)
            linear(f"{part}.output.dense", 128, 128)
            norm(f"{part}.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", 128, 512)
        linear(f"{layer}.output.dense", 512, 128)
        norm(f"{layer}.output.LayerNorm")
    linear("blip.vision_proj", 128, 24)  # in the file, of no use here
    for number, (inputs, outputs) in zip((0, 2, 4, 6, 7), ((128, 32), (32, 16), (16, 8), (8, 4), (4, 1)), strict=True):
        linear(f"mlp.layers.{number}", inputs, outputs)
    return state
