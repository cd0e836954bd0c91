"""Stable Diffusion XL: a UNet that is given the features of two CLIP text encoders, and the images' size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import condrl
from condrl.models.embeddings import Encoded, Prompt
from condrl.models.latent import LatentModel, first_up_block, unet_layers
from condrl.models.loading import PARTS, Family

SIZES = 6  # numbers that the UNet is told of an image: height and width as it was, where it was cropped, as it is


def misfit(pipe: Any) -> str | None:
    """What does not fit together of the second text encoder and the rest of a pipeline, or None."""
    unet, pooled = pipe.unet.config, pipe.text_encoder_2.config.projection_dim
    wanted, given = unet.projection_class_embeddings_input_dim, SIZES * unet.addition_time_embed_dim + pooled
    if wanted != given:  # a refiner's is told one number less
        return f"has a UNet with projection_class_embeddings_input_dim={wanted} where a base model's has {given}"
    most, other = pipe.tokenizer.model_max_length, pipe.tokenizer_2.model_max_length
    return None if most == other else f"has text encoders of {most} and {other} tokens, which cannot be joined"


@condrl.model
@dataclass(eq=False, repr=False, kw_only=True)
class SDXL(LatentModel):
    """Stable Diffusion XL from a hub id, a diffusers folder or a single-file checkpoint, tuned by a LoRA."""

    family: ClassVar[Family] = Family(
        title="Stable Diffusion XL",
        tag="stable-diffusion-xl",
        pipelines=("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"),
        parts={
            **PARTS,
            "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
            "tokenizer_2": ("transformers", "CLIPTokenizer*"),
        },
        own_keys=("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."),
        unet={"addition_embed_type": "text_time"},
        vae_in_float32=True,
        refused={"requires_aesthetics_score": "is a refiner, which redraws a base model's images: not tuned here"},
        misfit=misfit,
    )

    path: str = "stabilityai/stable-diffusion-xl-base-1.0"  # hub id, diffusers folder, .safetensors / .ckpt file

    def encode_prompts(self, prompts: Sequence[Prompt]) -> list[Encoded]:
        return [self._encode_prompt(prompt) for prompt in prompts]

    def _encode_prompt(self, prompt: Prompt) -> Encoded:
        """Its tokens' features (L, F) in both encoders, and the second one's of the whole prompt (F',)."""
        features, _, pooled, _ = self.pipe.encode_prompt(prompt or "", None, self.device, 1, False)
        if prompt is None and self.pipe.config.force_zeros_for_empty_prompt:
            return torch.zeros_like(features[0]), torch.zeros_like(pooled[0])
        return features[0], pooled[0]

    def predict(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        features, pooled = self.embeddings(condition)
        size = self.sample_shape[1:]  # of images that were neither larger nor cropped
        sizes = torch.tensor([*size, 0, 0, *size], device=x.device).expand(len(x), SIZES)
        added = {"text_embeds": pooled, "time_ids": sizes}
        network = self.module(self.network_input(x), self.network_time(t), features, added_cond_kwargs=added)
        predicted: Tensor = network.sample.float()
        return predicted

    def blocks(self) -> list[nn.Module]:
        return unet_layers(self.module)

    def output_part(self) -> nn.Module:
        return first_up_block(self.module)
