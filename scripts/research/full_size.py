"""Models at their published sizes, in the published files' format, with random weights: to measure time and memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pretrain_shapes import make_tokenizer
from torch import nn

from condrl.training.published import make_part, published


def save_sd15(folder: Path) -> None:
    """A diffusers folder with the networks of stable-diffusion-v1-5 and random weights."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    size = published()["sd15"]
    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, vocab_size=49408
    )
    StableDiffusionPipeline(
        vae=make_part(size.vae, "AutoencoderKL"),
        unet=make_part(size.network),
        text_encoder=CLIPTextModel(text),
        tokenizer=make_tokenizer(folder / "words"),
        scheduler=make_part(size.scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def save_open_clip(folder: Path, name: str) -> str:
    """The state dict of one of open_clip's models; returns its file."""
    import open_clip

    path = folder / f"{name}.pt"
    torch.save(open_clip.create_model(name).state_dict(), path)
    return str(path)


def head_weights(sizes: tuple[int, ...], prefix: str = "") -> dict[str, torch.Tensor]:
    """Linear layers with dropout between them, numbered as the aesthetic predictor's and ImageReward's are."""
    layers = [nn.Linear(i, o) for i, o in itertools.pairwise(sizes)]
    numbered = zip((0, 2, 4, 6, 7), layers, strict=True)
    return {f"{prefix}layers.{n}.{k}": v for n, layer in numbered for k, v in layer.state_dict().items()}


def clip(folder: Path) -> dict[str, Any]:
    return {"weights": save_open_clip(folder, "ViT-L-14-quickgelu")}


def aesthetic(folder: Path) -> dict[str, Any]:
    torch.save(head_weights((768, 1024, 128, 64, 16, 1)), folder / "head.pth")
    return {**clip(folder), "head": str(folder / "head.pth")}


def hps(folder: Path) -> dict[str, Any]:
    return {"weights": save_open_clip(folder, "ViT-H-14")}


def pickscore(folder: Path) -> dict[str, Any]:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    shared = {"hidden_act": "gelu", "num_attention_heads": 16}
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "patch_size": 14, **shared}
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, **shared}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=1024)).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    make_tokenizer(folder)
    return {"path": str(folder), "processor": str(folder)}


def image_reward(folder: Path) -> dict[str, Any]:
    from transformers import BertTokenizer, BlipTextConfig, BlipTextModel

    text = BlipTextConfig(
        vocab_size=30524, encoder_hidden_size=1024, num_attention_heads=12, max_position_embeddings=512, is_decoder=True
    )
    state = {f"blip.text_encoder.{k}": v for k, v in BlipTextModel(text, False).state_dict().items()}
    state |= {f"blip.visual_encoder.{k}": v for k, v in vision_transformer(1024, 24).items()}
    torch.save(state | head_weights((768, 1024, 128, 64, 16, 1), "mlp."), folder / "ImageReward.pt")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", "utf-8")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    return {"weights": str(folder / "ImageReward.pt"), "tokenizer": str(folder / "bert")}


def vision_transformer(width: int, depth: int) -> dict[str, torch.Tensor]:
    """A ViT with patches of 16 of images of 224, under the names that timm and BLIP use."""
    parts: dict[str, nn.Module] = {"patch_embed.proj": nn.Conv2d(3, width, 16, 16), "norm": nn.LayerNorm(width)}
    for block in (f"blocks.{n}" for n in range(depth)):
        parts |= {f"{block}.norm1": nn.LayerNorm(width), f"{block}.norm2": nn.LayerNorm(width)}
        parts |= {f"{block}.attn.qkv": nn.Linear(width, 3 * width), f"{block}.attn.proj": nn.Linear(width, width)}
        parts |= {f"{block}.mlp.fc1": nn.Linear(width, 4 * width), f"{block}.mlp.fc2": nn.Linear(4 * width, width)}
    state = {f"{name}.{k}": v for name, part in parts.items() for k, v in part.state_dict().items()}
    return state | {"cls_token": torch.zeros(1, 1, width), "pos_embed": torch.zeros(1, 197, width)}


def without_files(folder: Path) -> dict[str, Any]:
    return {}


PIXELS = ("brightness", "sharpness", "colourfulness", "symmetry", "jpeg_compressibility")
REWARDS: dict[str, Callable[[Path], dict[str, Any]]] = {
    **{f.__name__: f for f in (clip, aesthetic, hps, pickscore, image_reward)},
    **dict.fromkeys(PIXELS, without_files),
}
