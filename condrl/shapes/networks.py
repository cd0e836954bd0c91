"""The networks and the tokenizer of the embedded models."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from condrl.shapes import scenes

TOKENS = 24
FLOW_TOKENS = 16  # no prompt of the grammar has more
STREAM = 32  # by what the features before the last layer of the UNet's text encoder are divided to be of size 1
JOINT_WIDTH = 96 + 32  # features of a token that two text encoders make of it
TEXT_LAYERS = 6


def make_vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=scenes.SIDE,
    )


def make_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=scenes.SIDE // 8,
        block_out_channels=(64, 96),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        cross_attention_dim=96,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def make_transformer() -> Any:
    """Its blocks do nothing and it says 0 before it is trained, as in DiT (Peebles and Xie 2023, section 3.2)."""
    from diffusers import SD3Transformer2DModel

    network = SD3Transformer2DModel(
        sample_size=scenes.SIDE // 8,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        attention_head_dim=24,
        num_attention_heads=4,
        joint_attention_dim=JOINT_WIDTH,
        caption_projection_dim=96,
        pooled_projection_dim=32 + 32,
        pos_embed_max_size=scenes.SIDE // 16,
        qk_norm="rms_norm",
    )
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and ("norm" in name or name == "proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return network


def make_text_encoder(tokenizer: Any) -> nn.Module:
    from transformers import CLIPTextModel

    return CLIPTextModel(text_config(tokenizer, hidden_size=96, num_hidden_layers=TEXT_LAYERS))


def make_flow_text_encoders(tokenizer: Any) -> nn.ModuleDict:
    """The two of Stable Diffusion 3: one for the weights of the UNet's, and one that gives each token its embedding."""
    from transformers import CLIPTextModelWithProjection

    positions = dict(max_position_embeddings=FLOW_TOKENS, projection_dim=32)
    eps = 1e-5 / STREAM**2
    deep = text_config(tokenizer, hidden_size=96, num_hidden_layers=TEXT_LAYERS, layer_norm_eps=eps, **positions)
    shallow = CLIPTextModelWithProjection(text_config(tokenizer, hidden_size=32, num_hidden_layers=1, **positions))
    for embedding in shallow.text_model.embeddings.children():
        nn.init.normal_(embedding.weight, std=0.5)  # beside the other's features
    return nn.ModuleDict({"text_encoder": CLIPTextModelWithProjection(deep), "text_encoder_2": shallow})


@torch.no_grad()
def divide_stream(encoder: Any, by: float) -> None:
    """Divide all that a CLIP text encoder's layers add up; with eps / by^2 its norms say the same of it as before."""
    embeddings = encoder.text_model.embeddings
    added = [part for layer in encoder.text_model.encoder.layers for part in (layer.self_attn.out_proj, layer.mlp.fc2)]
    for part in (embeddings.token_embedding, embeddings.position_embedding, *added):
        for weight in part.parameters():
            weight /= by


def make_silent_t5() -> tuple[Any, Any]:
    """A T5 that says 0 of every token, as diffusers does in the place of one that is missing, and its tokenizer.

    Without them a folder of Stable Diffusion 3 is loaded by those alone who say that it has none.
    """
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    tokenizer = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)], extra_ids=0)
    shape = dict(d_model=JOINT_WIDTH, d_kv=1, d_ff=1, num_layers=1, num_heads=1)
    encoder = T5EncoderModel(T5Config(vocab_size=len(tokenizer), **shape))
    nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder, tokenizer


def text_config(tokenizer: Any, hidden_size: int, **shape: float) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        **{"max_position_embeddings": TOKENS, "projection_dim": hidden_size, **shape},
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


CLIP_MODEL: dict[str, Any] = dict(
    embed_dim=64,
    vision_cfg=dict(image_size=scenes.SIDE, layers=[1, 1, 1, 1], width=24, head_width=48),
    text_cfg=dict(context_length=TOKENS, width=96, heads=4, layers=2, hf_tokenizer_name="shapes_clip"),
)
PIXELS: dict[str, Any] = dict(mean=[0.5] * 3, std=[0.5] * 3, interpolation="bicubic", resize_mode="shortest")


def make_clip(tokenizer: Any) -> Any:
    from open_clip.model import CLIP

    parts = {name: dict(part) if isinstance(part, dict) else part for name, part in CLIP_MODEL.items()}
    parts["text_cfg"]["vocab_size"] = len(tokenizer)
    return CLIP(**parts)


def make_tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer in which every word of the scenes' vocabulary is one token and any other text is bytes."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    words = {*scenes.COLORS, *scenes.SHAPES, *(s + "s" for s in scenes.SHAPES), *scenes.DIAMETERS, "an", "and", ","}
    words |= {*scenes.COUNTS, *" ".join(scenes.RELATIONS).split()}
    merges = byte_pair_merges(sorted(words))
    letters = list(bytes_to_unicode().values())
    tokens = letters + [c + "</w>" for c in letters] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), "utf-8")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TOKENS)


def byte_pair_merges(words: list[str]) -> list[tuple[str, str]]:
    """Merge the most frequent neighbouring pair until every word is one token (Sennrich et al. 2016)."""
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while any(len(p) > 1 for p in pieces):
        pairs = [pair for p in pieces for pair in itertools.pairwise(p)]
        first, second = max(sorted(set(pairs)), key=pairs.count)
        merges.append((first, second))
        for p in pieces:
            while (first, second) in (neighbours := list(itertools.pairwise(p))):
                at = neighbours.index((first, second))
                p[at : at + 2] = [first + second]
    return merges
