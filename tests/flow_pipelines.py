"""Tiny pipelines of flow-matching transformers with random weights, saved as diffusers saves them."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from condrl.shapes.networks import TOKENS, make_tokenizer

LATENTS = 4
SD3_NETWORK: dict[str, Any] = dict(
    sample_size=8,
    in_channels=LATENTS,
    out_channels=LATENTS,
    num_layers=2,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=48,
    caption_projection_dim=16,
    pooled_projection_dim=16 + 20,
    pos_embed_max_size=12,
    qk_norm="rms_norm",
    dual_attention_layers=(0,),
)
FLUX_NETWORK: dict[str, Any] = dict(
    in_channels=4 * LATENTS,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=48,
    pooled_projection_dim=16,
    axes_dims_rope=(2, 2, 4),
    guidance_embeds=True,
)
DYNAMIC = dict(use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64, shift=3.0)


def clip_config(tokenizer: Any, width: int, projection: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=projection,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def t5() -> tuple[T5EncoderModel, T5Tokenizer]:
    """A small T5 that reads letter by letter."""
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = T5Tokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)
    shape = dict(d_model=48, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), **shape)), tokenizer


def make_vae() -> AutoencoderKL:
    """With a shift of the latents, as both families have."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=LATENTS,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.36,
        shift_factor=0.12,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def sd3_pipeline(folder: Path, network: dict[str, Any] | None = None, **scheduler: Any) -> Path:
    """As stable-diffusion-3.5-medium: query and key norms, a block with a second attention, three text encoders."""
    torch.manual_seed(0)
    words = make_tokenizer(folder / "words")
    first, second = clip_config(words, 16, 16), clip_config(words, 24, 20)
    encoder, letters = t5()
    clip = CLIPTextModelWithProjection(first)
    torch.nn.init.eye_(clip.text_projection.weight)  # the original layout of this encoder has none
    pipe = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**{**SD3_NETWORK, **(network or {})}),
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
        vae=make_vae(),
        text_encoder=clip,
        tokenizer=words,
        text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer_2=words,
        text_encoder_3=encoder,
        tokenizer_3=letters,
    )
    pipe.save_pretrained(folder / "pipe")
    return folder / "pipe"


def flux_pipeline(folder: Path, network: dict[str, Any] | None = None, **scheduler: Any) -> Path:
    """As FLUX.1-dev: told a guidance scale, times shifted by the images' size."""
    torch.manual_seed(0)
    words = make_tokenizer(folder / "words")
    encoder, letters = t5()
    pipe = FluxPipeline(
        transformer=FluxTransformer2DModel(**{**FLUX_NETWORK, **(network or {})}),
        scheduler=FlowMatchEulerDiscreteScheduler(**(scheduler or DYNAMIC)),
        vae=make_vae(),
        text_encoder=CLIPTextModel(clip_config(words, 16, 16)),
        tokenizer=words,
        text_encoder_2=encoder,
        tokenizer_2=letters,
    )
    pipe.save_pretrained(folder / "pipe")
    return folder / "pipe"
