"""What flow-matching transformers share: their scheduler's times, prompts that T5 reads, latents in patches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from condrl.diffusion.schedule import Schedule
from condrl.diffusion.schedulers import FlowSchedule, flow_from_diffusers
from condrl.errors import UsageError
from condrl.models.latent import InDiffusers, LatentModel
from condrl.models.loading import PARTS

TRANSFORMER_PARTS = {
    **{name: part for name, part in PARTS.items() if name != "unet"},
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
}
T5 = ("transformers", "T5EncoderModel"), ("transformers", "T5Tokenizer*")
JOINT_ATTENTION = (  # of the images' stream and of the text's, as Liu et al. 2025 tune it
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)


@dataclass(eq=False, repr=False, kw_only=True)
class FlowModel(LatentModel):
    """A pipeline with a transformer that says a rectified flow's velocity, tuned by a LoRA."""

    prefix: ClassVar[str] = "transformer"
    evenly: ClassVar[bool] = False  # whether times end at 1 / steps before they are shifted
    patch: ClassVar[int] = 2  # latents along the side of a token
    t5_name: ClassVar[str]  # of its tokenizer in the pipeline
    most_t5_tokens: ClassVar[int] = 512

    t5_tokens: int = 256  # that T5 makes of a prompt, cut or filled up; memory and time grow with it
    lora_targets: tuple[str, ...] = JOINT_ATTENTION  # modules that get a LoRA, by the end of their names

    @classmethod
    def in_diffusers(cls, options: Mapping[str, Any]) -> InDiffusers:
        found = super().in_diffusers(options)
        return found._replace(call=found.call | {"max_sequence_length": options.get("t5_tokens", cls.t5_tokens)})

    def check_options(self) -> None:
        """Raises: UsageError on an option that could not be used whatever the pipeline."""
        super().check_options()
        if self.memory_format:
            raise UsageError(
                "config model.memory_format: has no effect on a transformer, which has no convolutions: leave it out"
            )
        if not 1 <= self.t5_tokens <= self.most_t5_tokens:
            raise UsageError(f"config model.t5_tokens: must be from 1 to {self.most_t5_tokens}, got {self.t5_tokens}")

    def load(self) -> Any:
        """The pipeline, of a kind that is known to work.

        Raises: UsageError when `path` is not one.
        """
        pipe = super().load()
        if (tokenizer := getattr(pipe, self.t5_name)) is not None:
            tokenizer.model_max_length = self.t5_tokens
        return pipe

    def make_schedule(self) -> Schedule:
        """The flow, with the shift of its times that belongs to the images' size."""
        scheduler, (_, height, width) = self.pipe.scheduler, self.state_shape
        config = {**scheduler.config, "_class_name": type(scheduler).__name__}
        return flow_from_diffusers(config, height * width // self.patch**2, self.evenly)

    @property
    def pixel_step(self) -> int:
        """What the height and the width of an image are multiples of."""
        return self.vae_scale * self.patch

    @property
    def tokenizers(self) -> list[Any]:
        """T5's, which reads most of a prompt; all of them where there is none."""
        t5 = getattr(self.pipe, self.t5_name)
        return [t5] if t5 is not None else [other for other in super().tokenizers if other is not None]

    def network_time(self, t: Tensor) -> Tensor:
        """Times as the network was trained with them, on the device."""
        assert isinstance(self.schedule, FlowSchedule)
        return self.schedule.network_time(t).to(self.device)

    def blocks(self) -> list[nn.Module]:
        """The parts of the network that are compiled, or whose frozen weights are gathered together when sharded."""
        network: Any = self.module
        return [*network.transformer_blocks, *getattr(network, "single_transformer_blocks", ())]

    def output_part(self) -> nn.Module:
        """The norm behind the last block."""
        network: Any = self.module
        found: nn.Module = network.norm_out
        return found
