"""Tiny pipelines of flow-matching transformers with random weights, saved as diffusers saves them, or in one file."""

import re
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
from single_file import vae_key
from torch import Tensor
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


# ---------------------------------------------------------------------------------------------- the original layout

SD3_BLOCK = {  # modules of a block: in diffusers, and in the original layout and ComfyUI's table (its mmdit_to_diffusers)
    r"attn(2?)\.to_([qkv])": r"x_block.attn\1.qkv/\2",
    r"attn\.add_([qkv])_proj": r"context_block.attn.qkv/\1",
    r"attn(2?)\.to_out\.0": r"x_block.attn\1.proj",
    r"attn\.to_add_out": "context_block.attn.proj",
    r"attn(2?)\.norm_([qk])": r"x_block.attn\1.ln_\2",
    r"attn\.norm_added_([qk])": r"context_block.attn.ln_\1",
    r"norm1\.linear": "x_block.adaLN_modulation.1",
    r"norm1_context\.linear": "context_block.adaLN_modulation.1",
    r"ff\.net\.(?:0\.proj)": "x_block.mlp.fc1",
    r"ff\.net\.2": "x_block.mlp.fc2",
    r"ff_context\.net\.(?:0\.proj)": "context_block.mlp.fc1",
    r"ff_context\.net\.2": "context_block.mlp.fc2",
}
FLUX_BLOCK = {  # its flux_to_diffusers
    r"attn\.to_([qkv])": r"img_attn.qkv/\1",
    r"attn\.add_([qkv])_proj": r"txt_attn.qkv/\1",
    r"attn\.to_out\.0": "img_attn.proj",
    r"attn\.to_add_out": "txt_attn.proj",
    r"attn\.norm_([qk])": r"img_attn.norm.\1",
    r"attn\.norm_added_([qk])": r"txt_attn.norm.\1",
    r"norm1\.linear": "img_mod.lin",
    r"norm1_context\.linear": "txt_mod.lin",
    r"ff\.net\.0\.proj": "img_mlp.0",
    r"ff\.net\.2": "img_mlp.2",
    r"ff_context\.net\.0\.proj": "txt_mlp.0",
    r"ff_context\.net\.2": "txt_mlp.2",
}
FLUX_SINGLE = {
    r"attn\.to_([qkv])": r"linear1/\1",
    r"proj_mlp": "linear1/w",
    r"attn\.norm_([qk])": r"norm.\1",
    r"norm\.linear": "modulation.lin",
    r"proj_out": "linear2",
}
SD3_REST = {
    r"pos_embed\.proj": "x_embedder.proj",
    r"time_text_embed\.timestep_embedder\.linear_1": "t_embedder.mlp.0",
    r"time_text_embed\.timestep_embedder\.linear_2": "t_embedder.mlp.2",
    r"time_text_embed\.text_embedder\.linear_1": "y_embedder.mlp.0",
    r"time_text_embed\.text_embedder\.linear_2": "y_embedder.mlp.2",
    r"context_embedder": "context_embedder",
    r"norm_out\.linear": "final_layer.adaLN_modulation.1",
    r"proj_out": "final_layer.linear",
}
FLUX_REST = {
    r"x_embedder": "img_in",
    r"context_embedder": "txt_in",
    r"time_text_embed\.timestep_embedder\.linear_1": "time_in.in_layer",
    r"time_text_embed\.timestep_embedder\.linear_2": "time_in.out_layer",
    r"time_text_embed\.text_embedder\.linear_1": "vector_in.in_layer",
    r"time_text_embed\.text_embedder\.linear_2": "vector_in.out_layer",
    r"time_text_embed\.guidance_embedder\.linear_1": "guidance_in.in_layer",
    r"time_text_embed\.guidance_embedder\.linear_2": "guidance_in.out_layer",
    r"norm_out\.linear": "final_layer.adaLN_modulation.1",
    r"proj_out": "final_layer.linear",
}
ORIGINAL = {  # how modules begin in diffusers: how they do in the original layout, and the table of the rest
    "SD3Transformer2DModel": {"transformer_blocks": ("joint_blocks", SD3_BLOCK), "": ("", SD3_REST)},
    "FluxTransformer2DModel": {
        "transformer_blocks": ("double_blocks", FLUX_BLOCK),
        "single_transformer_blocks": ("single_blocks", FLUX_SINGLE),
        "": ("", FLUX_REST),
    },
}


def original_name(kind: str, module: str) -> tuple[str, str]:
    """The module in which the original layout has a diffusers module, and which part of it that is: q, k, v, w or all."""
    block = re.fullmatch(r"(\w*transformer_blocks)\.(\d+)\.(.+)", module)
    start, number, rest = block.groups() if block else ("", "", module)
    place, table = ORIGINAL[kind][start]
    found = [re.sub(old, new, rest) for old, new in table.items() if re.fullmatch(old, rest)]
    name, _, part = found[0].partition("/")
    return (f"{place}.{number}.{name}" if block else name), part


def original_key(name: str, end: str) -> str:
    """Norms of queries and keys have names of their own in FLUX."""
    match = re.fullmatch(r"(.+norm)\.([qk])", name)
    return f"{match[1]}.{'query' if match[2] == 'q' else 'key'}_norm.scale" if match else f"{name}.{end}"


def original_weights(network: torch.nn.Module) -> dict[str, Tensor]:
    """A transformer's weights in the original layout, where some modules are one."""
    kind, parts, state = type(network).__name__, {}, network.state_dict()
    for key, value in state.items():
        module, _, end = key.rpartition(".")
        if key == "pos_embed.pos_embed":
            parts["pos_embed"] = {"": value}
            continue
        name, part = original_name(kind, module)
        last = f"transformer_blocks.{network.config.num_layers - 1}.norm1_context.linear"
        if module == "norm_out.linear" or (module == last and kind == "SD3Transformer2DModel"):
            value = torch.cat(value.chunk(2)[::-1])  # shift and scale are the other way round
        parts.setdefault(original_key(name, end), {})[part] = value
    return {key: torch.cat([found[part] for part in sorted(found, key="qkvw".find)]) for key, found in parts.items()}


def whole_checkpoint(pipe: Any, with_t5: bool = True) -> dict[str, Tensor]:
    """A pipeline's weights as one file has them: Stable Diffusion 3's, or FLUX's as ComfyUI saves it."""
    is_flux = isinstance(pipe, FluxPipeline)
    tensors = {f"model.diffusion_model.{key}": value for key, value in original_weights(pipe.transformer).items()}
    for key, value in pipe.vae.state_dict().items():
        value = value[:, :, None, None] if re.search(r"attentions.*to_\w+.*weight", key) else value
        tensors[("vae." if is_flux else "first_stage_model.") + vae_key(key, 2)] = value
    for key, value in pipe.text_encoder.state_dict().items():
        if key != "text_projection.weight":
            tensors["text_encoders.clip_l.transformer.text_model." + key.removeprefix("text_model.")] = value
    if not is_flux:
        found = pipe.text_encoder_2.state_dict()
        tensors |= {f"text_encoders.clip_g.transformer.{key}": value for key, value in found.items()}
    if with_t5:
        found = (pipe.text_encoder_2 if is_flux else pipe.text_encoder_3).state_dict()
        tensors |= {f"text_encoders.t5xxl.transformer.{key}": value for key, value in found.items()}
    return {key: value.clone().contiguous() for key, value in tensors.items()}
