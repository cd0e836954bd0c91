"""A diffusers folder rewritten as one file in the original Stable Diffusion layout (CompVis key names)."""

from __future__ import annotations

import re
from pathlib import Path

from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_key(key: str, layers: int, attended: set[str]) -> str:
    """The original name of a diffusers UNet key; `attended` are the up blocks with attention."""
    stem, _, end = key.rpartition(".")
    if stem in ENDS:
        return f"{ENDS[stem]}.{end}"
    part, block, kind, index, rest = re.match(r"(\w+?)_block(?:s\.(\d+))?\.(\w+)\.(\d+)\.(.*)", key).groups()
    if kind == "resnets":
        old, _, end = rest.rpartition(".")
        rest = f"{RESNET[old]}.{end}"
    if part == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(index)}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{(int(block) + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{int(block) * (layers + 1) + layers}.{2 if block in attended else 1}.{rest}"
    place = int(block) * (layers + 1) + int(index) + (1 if part == "down" else 0)
    return f"{'input' if part == 'down' else 'output'}_blocks.{place}.{1 if kind == 'attentions' else 0}.{rest}"


def vae_key(key: str, blocks: int) -> str:
    key = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", key)
    key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block", key)
    key = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", key)
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    for new, old in VAE_ATTENTION.items():
        key = key.replace(f"mid_block.attentions.0.{new}.", f"mid.attn_1.{old}.")
    return key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")


def write_single_file(folder: Path, path: Path) -> Path:
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    unet, vae = pipe.unet.state_dict(), pipe.vae.state_dict()
    attended = set(re.findall(r"up_blocks\.(\d+)\.attentions", " ".join(unet)))
    tensors: dict[str, Tensor] = {}
    for key, value in unet.items():
        tensors["model.diffusion_model." + unet_key(key, pipe.unet.config.layers_per_block, attended)] = value
    for key, value in vae.items():
        attention = re.search(r"attentions.*to_\w+.*weight", key)
        tensors["first_stage_model." + vae_key(key, len(pipe.vae.config.up_block_types))] = (
            value[:, :, None, None] if attention else value
        )
    for key, value in pipe.text_encoder.state_dict().items():
        tensors["cond_stage_model.transformer.text_model." + key.removeprefix("text_model.")] = value
    save_file({key: value.clone().contiguous() for key, value in tensors.items()}, path)
    return path
