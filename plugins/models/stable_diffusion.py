"""Stable Diffusion 1.x and 2.x: a UNet that is given the features of one CLIP text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

import condrl
from condrl.models.embeddings import Encoded, Prompt
from condrl.models.latent import LatentModel, first_up_block, unet_layers
from condrl.models.loading import Family


@condrl.model
@dataclass(eq=False, repr=False, kw_only=True)
class StableDiffusion(LatentModel):
    """Stable Diffusion 1.x / 2.x from a hub id, a diffusers folder or a single-file checkpoint, tuned by a LoRA."""

    family: ClassVar[Family] = Family(
        title="Stable Diffusion 1.x and 2.x",
        tag="stable-diffusion",
        pipelines=("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"),
        without=("safety_checker", "feature_extractor", "image_encoder"),
        own_keys=("cond_stage_model.",),
    )

    path: str = "asset:shapes"  # hub id, diffusers folder, .safetensors / .ckpt file; asset:shapes is embedded

    def encode_prompts(self, prompts: Sequence[Prompt]) -> list[Encoded]:
        return [(self.pipe.encode_prompt([prompt or ""], self.device, 1, False)[0][0],) for prompt in prompts]

    def predict(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        (features,) = self.embeddings(condition)
        predicted: Tensor = self.module(self.network_input(x), self.network_time(t), features).sample.float()
        return predicted

    def blocks(self) -> list[nn.Module]:
        return unet_layers(self.module)

    def output_part(self) -> nn.Module:
        return first_up_block(self.module)
