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
    vision, text_model = small_blip()
    torch.save(published(vision, text_model), folder / "ImageReward.pt")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "star", "cat", "two", "dog"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    Image.fromarray(np.full((40, 40, 3), 200, np.uint8)).save(folder / "reference.png")
    clip = {"config": str(folder / "small.json"), "weights": str(folder / "open_clip_pytorch_model.bin")}
    return {
        "clip": clip,
        "aesthetic": {**clip, "head": str(folder / "aesthetic-model.pth")},
        "hps": {"config": clip["config"], "weights": str(folder / "HPS_v2.1_compressed.pt")},
        "pickscore": {"path": str(folder / "pick"), "processor": str(folder / "pick")},
        "image_reward": {"weights": str(folder / "ImageReward.pt"), "tokenizer": str(folder / "bert")},
        "similarity": {"images": str(folder / "reference.png")},
    }


def small_blip():
    """transformers' own BLIP encoders, small, with random weights."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    torch.manual_seed(1)
    sizes = {"num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 96}
    vision = BlipVisionConfig(
        hidden_size=128, image_size=32, patch_size=8, layer_norm_eps=1e-6, **{**sizes, "intermediate_size": 160}
    )
    text = BlipTextConfig(
        hidden_size=128, encoder_hidden_size=128, vocab_size=30, max_position_embeddings=40, is_decoder=True, **sizes
    )
    models = BlipVisionModel(vision).eval(), BlipTextModel(text, add_pooling_layer=False).eval()
    for model in models:
        for name, parameter in model.named_parameters():
            if "norm" not in name.lower():
                nn.init.normal_(parameter, 0.0, 0.3)
    return models


def published(vision, text_model):
    """Their weights under the names of ImageReward's file, with a head."""
    renamed = {
        "embeddings.class_embedding": "cls_token",
        "embeddings.position_embedding": "pos_embed",
        "embeddings.patch_embedding": "patch_embed.proj",
        "encoder.layers": "blocks",
        "self_attn.qkv": "attn.qkv",
        "self_attn.projection": "attn.proj",
        "post_layernorm": "norm",
        "layer_norm": "norm",
    }
    state = {f"blip.text_encoder.{name}": value for name, value in text_model.state_dict().items()}
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    for name, value in vision.state_dict().items():
        for theirs, ours in renamed.items():
            name = name.replace(theirs, ours)
        state[f"blip.visual_encoder.{name}"] = value
    sizes = ((128, 32), (32, 16), (16, 8), (8, 4), (4, 1))
    for number, (i, o) in zip((0, 2, 4, 6, 7), sizes, strict=True):
        state |= {f"mlp.layers.{number}.{k}": v for k, v in nn.Linear(i, o).state_dict().items()}
    return state
