"""Stable Diffusion 3 and 3.5: a transformer that is given what two CLIP text encoders and T5 make of a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

import condrl
from condrl.models.embeddings import Encoded, Prompt
from condrl.models.flow import T5, TRANSFORMER_PARTS, FlowModel
from condrl.models.latent import InDiffusers
from condrl.models.loading import Family

CLIP = ("transformers", "CLIPTextModelWithProjection"), ("transformers", "CLIPTokenizer*")


def misfit(pipe: Any) -> str | None:
    """What does not fit together of the transformer, the VAE and the text encoders, or None."""
    network, channels = pipe.transformer.config, pipe.vae.config.latent_channels
    clips = [encoder.config for encoder in (pipe.text_encoder, pipe.text_encoder_2)]
    expected = {"patch_size": 2, "in_channels": channels, "out_channels": channels}
    expected["pooled_projection_dim"] = sum(clip.projection_dim for clip in clips)
    if pipe.text_encoder_3 is not None:
        expected["joint_attention_dim"] = pipe.text_encoder_3.config.d_model
    for name, value in expected.items():
        if network[name] != value:
            return f"has a transformer with {name}={network[name]} where its other parts need {value}"
    width = sum(clip.hidden_size for clip in clips)
    if width > network.joint_attention_dim:
        return f"has CLIP text encoders of {width} features, and a transformer for {network.joint_attention_dim}"
    return None


@condrl.model
@dataclass(eq=False, repr=False, kw_only=True)
class SD3(FlowModel):
    """Stable Diffusion 3 / 3.5 from a hub id, a diffusers folder or a single-file checkpoint, tuned by a LoRA."""

    family: ClassVar[Family] = Family(
        title="Stable Diffusion 3",
        tag="stable-diffusion-3",
        pipelines=("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"),
        parts={
            "transformer": ("diffusers", "SD3Transformer2DModel"),
            **TRANSFORMER_PARTS,
            **dict(zip(("text_encoder", "tokenizer"), CLIP, strict=True)),
            **dict(zip(("text_encoder_2", "tokenizer_2"), CLIP, strict=True)),
            **dict(zip(("text_encoder_3", "tokenizer_3"), T5, strict=True)),
        },
        optional=dict.fromkeys(("text_encoder_3", "tokenizer_3"), "text_encoders.t5xxl."),
        own_keys=("model.diffusion_model.joint_blocks.", "text_encoders.clip_g."),
        misfit=misfit,
    )
    t5_name: ClassVar[str] = "tokenizer_3"

    path: str = "stabilityai/stable-diffusion-3.5-medium"  # hub id, diffusers folder, .safetensors / .ckpt file
    t5: bool = True  # let T5 read prompts too, if the pipeline has it; false: the CLIP text encoders alone

    @classmethod
    def in_diffusers(cls, options: Mapping[str, Any]) -> InDiffusers:
        found = super().in_diffusers(options)
        return found if options.get("t5", True) else found._replace(load=dict.fromkeys(cls.family.optional))

    @property
    def wanted(self) -> Family:
        return self.family if self.t5 else self.family.less(self.family.optional)

    def encode_prompts(self, prompts: Sequence[Prompt]) -> list[Encoded]:
        return [self._encode_prompt(prompt or "") for prompt in prompts]

    def _encode_prompt(self, prompt: str) -> Encoded:
        """Its tokens' features (L, F), CLIP's before T5's, and CLIP's of the whole prompt (F',)."""
        length = {"max_sequence_length": self.t5_tokens}
        features, _, pooled, _ = self.pipe.encode_prompt(prompt, None, None, self.device, 1, False, **length)
        return features[0], pooled[0]

    def predict(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        network = self.module(self.network_input(x), *self.embeddings(condition), self.network_time(t))
        predicted: Tensor = network.sample.float()
        return predicted

    def check_size(self) -> None:
        """Raises: UsageError on a size that no latents have, or that the network has no positions for."""
        super().check_size()
        network: Any = self.module
        most = network.config.pos_embed_max_size * self.pixel_step
        for name, pixels in zip(("height", "width"), self.sample_shape[1:], strict=True):
            if pixels > most:
                raise condrl.UsageError(f"config model.{name}: must be at most {most} pixels, got {pixels}")
