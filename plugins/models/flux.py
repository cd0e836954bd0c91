"""FLUX.1: a transformer that is given patches of latents, what CLIP and T5 make of a prompt, and a guidance scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

import condrl
from condrl.models.embeddings import Encoded, Prompt
from condrl.models.flow import T5, TRANSFORMER_PARTS, FlowModel
from condrl.models.latent import InDiffusers
from condrl.models.loading import Family

TOLD = 3.5  # the guidance scale that FLUX.1-dev's pipeline tells its network


def misfit(pipe: Any) -> str | None:
    """What does not fit together of the transformer, the VAE and the text encoders, or None."""
    network, channels = pipe.transformer.config, 4 * pipe.vae.config.latent_channels
    expected = {"in_channels": channels, "joint_attention_dim": pipe.text_encoder_2.config.d_model}
    expected |= {"pooled_projection_dim": pipe.text_encoder.config.hidden_size, "patch_size": 1}
    for name, value in expected.items():
        if network[name] != value:
            return f"has a transformer with {name}={network[name]} where its other parts need {value}"
    if network.out_channels not in (None, channels):
        return f"has a transformer with out_channels={network.out_channels} where its other parts need {channels}"
    return None


def places(height: int, width: int) -> Tensor:
    """(0, row, column) of every patch, (height width, 3)."""
    return torch.cartesian_prod(torch.zeros(1), torch.arange(float(height)), torch.arange(float(width)))


@condrl.model
@dataclass(eq=False, repr=False, kw_only=True)
class Flux(FlowModel):
    """FLUX.1 dev or schnell from a hub id, a diffusers folder or a single-file checkpoint, tuned by a LoRA."""

    family: ClassVar[Family] = Family(
        title="FLUX.1",
        tag="flux",
        pipelines=("FluxPipeline", "FluxImg2ImgPipeline"),
        parts={
            "transformer": ("diffusers", "FluxTransformer2DModel"),
            **TRANSFORMER_PARTS,
            **dict(zip(("text_encoder_2", "tokenizer_2"), T5, strict=True)),
        },
        own_keys=("model.diffusion_model.double_blocks.",),
        shared_keys=("vae.", "text_encoders.clip_l.", "text_encoders.t5xxl."),
        misfit=misfit,
    )
    evenly: ClassVar[bool] = True
    t5_name: ClassVar[str] = "tokenizer_2"

    path: str = "black-forest-labs/FLUX.1-dev"  # hub id, diffusers folder, .safetensors / .ckpt file
    t5_tokens: int = 512  # that T5 makes of a prompt, cut or filled up; as many where the LoRA is used
    guidance: float = 1.0  # classifier-free guidance scale, two calls a step; 1: none, as the network imitates it
    told_guidance: float | None = None  # guidance scale that the network is told; null: 3.5 if it is told one

    @classmethod
    def in_diffusers(cls, options: Mapping[str, Any]) -> InDiffusers:
        found, told = super().in_diffusers(options), options.get("told_guidance")
        guidance = {"guidance_scale": TOLD if told is None else told, "true_cfg_scale": found.call["guidance_scale"]}
        return found._replace(call={"negative_prompt": ""} | found.call | guidance)

    def check_size(self) -> None:
        """Raises: UsageError on a size that no latents have, and on a guidance that the network is not told."""
        super().check_size()
        network: Any = self.module
        if self.told_guidance is not None and self.told_guidance < 0:
            raise condrl.UsageError(f"config model.told_guidance: must be at least 0, got {self.told_guidance:g}")
        if self.told_guidance is not None and not network.config.guidance_embeds:
            raise condrl.UsageError(
                "config model.told_guidance: this network is told no guidance, as FLUX.1-schnell: leave it out"
            )

    def encode_prompts(self, prompts: Sequence[Prompt]) -> list[Encoded]:
        return [self._encode_prompt(prompt or "") for prompt in prompts]

    def _encode_prompt(self, prompt: str) -> Encoded:
        """T5's features of its tokens (L, F), and CLIP's of the whole prompt (F',)."""
        features, pooled, _ = self.pipe.encode_prompt(prompt, None, self.device, max_sequence_length=self.t5_tokens)
        return features[0], pooled[0]

    def predict(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        network: Any = self.module
        features, pooled = self.embeddings(condition)
        patches = pixel_unshuffle(self.network_input(x), 2)  # (B, 4 C, h / 2, w / 2)
        grid = patches.shape[2:]
        told = TOLD if self.told_guidance is None else self.told_guidance
        predicted = network(
            hidden_states=patches.flatten(2).transpose(1, 2),
            encoder_hidden_states=features,
            pooled_projections=pooled,
            timestep=self.network_time(t).to(self.torch_dtype) / 1000,  # which it multiplies by 1000
            img_ids=places(*grid).to(x.device),
            txt_ids=torch.zeros(features.shape[1], 3, device=x.device),
            guidance=torch.full((len(x),), told, device=x.device) if network.config.guidance_embeds else None,
        ).sample
        return pixel_shuffle(predicted.float().transpose(1, 2).unflatten(2, grid), 2)
