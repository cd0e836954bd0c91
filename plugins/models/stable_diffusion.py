"""Stable Diffusion 1.x and 2.x: a UNet that is given the features of one CLIP text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

import condrl
from condrl.models.embeddings import Encoded
from condrl.models.latent import LatentModel, unet_layers
from condrl.models.loading import load_pipeline


@condrl.model
@dataclass(eq=False, repr=False, kw_only=True)
class StableDiffusion(LatentModel):
    """Stable Diffusion 1.x / 2.x from a hub id, a diffusers folder or a single-file checkpoint, tuned by a LoRA."""

    path: str = "asset:shapes"  # hub id, diffusers folder, .safetensors / .ckpt file; asset:shapes is embedded

    def load(self) -> Any:
        pipe = load_pipeline(self.path, self.revision, self.single_file_config, self.torch_dtype, self.variant)
        text: Any = pipe.text_encoder.config
        pipe.tokenizer.model_max_length = min(text.max_position_embeddings, pipe.tokenizer.model_max_length)
        return pipe

    def encode_prompts(self, prompts: Sequence[str]) -> list[Encoded]:
        return [(self.pipe.encode_prompt([prompt], self.device, 1, False)[0][0],) for prompt in prompts]

    def predict(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        (features,) = self.embeddings(condition)
        predicted: Tensor = self.module(self.network_input(x), self.network_time(t), features).sample.float()
        return predicted

    def blocks(self) -> list[nn.Module]:
        return unet_layers(self.module)
