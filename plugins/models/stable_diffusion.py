"""Stable Diffusion 1.x and 2.x: UNet with a LoRA, prompt embeddings on demand, guidance, VAE decoding in slices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

import condrl
from condrl.diffusion.schedule import schedule_from_diffusers
from condrl.errors import UsageError, print_main, quoted
from condrl.io.files import locate
from condrl.models.embeddings import Embeddings
from condrl.models.loading import load_pipeline
from condrl.models.lora import load_lora, lora_layers, save_lora

Dtype = Literal["float32", "bfloat16", "float16"]
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@condrl.model
class StableDiffusion:
    """Stable Diffusion 1.x / 2.x from a hub id, a diffusers folder or a single-file checkpoint, tuned by a LoRA."""

    def __init__(
        self,
        device: torch.device,
        *,
        path: str = "asset:shapes",  # hub id, diffusers folder, .safetensors / .ckpt file; asset:shapes is embedded
        revision: str | None = None,  # of a hub id: branch, tag or commit
        variant: str | None = None,  # of the weights' files: fp16 for model.fp16.safetensors
        single_file_config: str | None = None,  # diffusers folder or hub id with the configs of a single file
        dtype: Dtype = "float32",  # of the frozen weights; the LoRA is always float32
        guidance: float = 5.0,  # classifier-free guidance scale; 1: none
        guidance_gradient: Literal["both", "conditional"] = "both",  # branches with a gradient; the cost is the same
        negative_prompt: str = "",  # the prompt of the unconditional branch
        lora_rank: int = 16,  # rank of the LoRA
        lora_alpha: int | None = None,  # LoRA scale is alpha / rank; null: alpha = rank
        lora_targets: tuple[str, ...] = ATTENTION,  # UNet modules that get a LoRA, by the end of their names
        lora: str | None = None,  # start from this LoRA folder
        gradient_checkpointing: bool = False,  # recompute activations in the backward pass: less memory, slower
        decode_batch: int = 16,  # images that the VAE decodes at a time
    ) -> None:
        for name, value in (("lora_rank", lora_rank), ("lora_alpha", lora_alpha), ("decode_batch", decode_batch)):
            if value is not None and value < 1:
                raise UsageError(f"config model.{name}: must be at least 1, got {value}")
        check_guidance(guidance, negative_prompt)
        if not lora_targets:
            raise UsageError("config model.lora_targets: it is empty, so nothing would be trained; leave it out")
        pipe = load_pipeline(path, revision, single_file_config, getattr(torch, dtype), variant)
        self.guidance, self.guidance_gradient, self.decode_batch = guidance, guidance_gradient, decode_batch
        self.schedule = schedule_from_diffusers({**pipe.scheduler.config, "_class_name": type(pipe.scheduler).__name__})
        self.device, self.path, self.dtype = device, path, getattr(torch, dtype)
        self.evaluations = 0
        self.sharded = False
        self.vae = pipe.vae.requires_grad_(False).to(self.device)
        self.module: nn.Module = pipe.unet.requires_grad_(False).to(self.device, memory_format=torch.channels_last)
        self._pipe: Any = pipe  # its text encoder is on the host when it is not used
        self._pipe.tokenizer.model_max_length = self.most_tokens
        self._rows: dict[str, int] = {}  # the number of each prompt
        self._prompts: list[str] = []  # by their numbers
        self._host_embeddings = Embeddings(self._encoded)
        self._table = torch.empty(0)  # on the device, of the prompts that were asked for last
        self._places: dict[int, int] = {}  # of prompts, by their numbers, in that table
        self.negative = self.encode([negative_prompt])
        add_lora(self.module, lora_rank, lora_alpha or lora_rank, lora_targets)
        if lora:
            self.load_adapter(locate(lora))
        if gradient_checkpointing:
            self.module.enable_gradient_checkpointing()
            self.module.train()  # diffusers checkpoints in training mode only; Stable Diffusion UNets have no dropout

    @property
    def most_tokens(self) -> int:
        """What the text encoder has positions for; a tokenizer without a limit of its own says 1e30."""
        most: int = self._pipe.text_encoder.config.max_position_embeddings
        return min(most, self._pipe.tokenizer.model_max_length)

    @property
    def state_shape(self) -> tuple[int, int, int]:
        config: Any = self.module.config
        side = config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        return config.in_channels, height, width

    # ------------------------------------------------------------------------------------------ prompts

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """The numbers (B,) of prompts; those that are too long to be read as a whole are told, once."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._rows]
        self._rows |= {prompt: len(self._rows) + i for i, prompt in enumerate(new)}
        self._prompts += new
        self._check_lengths(new)
        return torch.tensor([self._rows[prompt] for prompt in prompts])

    def _check_lengths(self, prompts: Sequence[str]) -> None:
        most, long = self.most_tokens, []
        parts = [prompts[start : start + 1000] for start in range(0, len(prompts), 1000)]
        for part in tqdm(parts, "reading the prompts", leave=False, disable=None, delay=1):
            tokens = self._pipe.tokenizer(part).input_ids
            long += [(prompt, len(ids)) for prompt, ids in zip(part, tokens, strict=True) if len(ids) > most]
        if long:
            prompt, count = long[0]
            others = f", the first of {len(long)} that are too long," if len(long) > 1 else ""
            print_main(
                f"warning: the prompt {quoted(prompt)}{others} has {count} tokens; the model reads the first {most}"
            )

    @torch.no_grad()
    def _encoded(self, prompts: Sequence[str]) -> list[Tensor]:
        """Embeddings (L, F) of prompts, on the host; each is encoded alone."""
        self._pipe.text_encoder.to(self.device)
        found = [self._pipe.encode_prompt([prompt], self.device, 1, False)[0][0].cpu() for prompt in prompts]
        self._pipe.text_encoder.to("cpu")  # makes room on a GPU
        return found

    def embeddings(self, condition: Tensor) -> Tensor:
        """Embeddings (B, L, F) of prompts by their numbers (B,), on the device."""
        rows = condition.tolist()
        if not self._places.keys() >= set(rows):  # a roll-out asks for the same prompts at each of its steps
            self._places = {row: place for place, row in enumerate(dict.fromkeys(rows))}
            self._table = self._host_embeddings([self._prompts[row] for row in self._places]).to(self.device)
        return self._table[torch.tensor([self._places[row] for row in rows])]

    # ------------------------------------------------------------------------------------------ score

    def score(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """The guided score at latents x (B, 4, h, w) and times t (B,), s = s_u + w (s_c - s_u)."""
        time, rows, count = self.schedule.network_time(t).to(x.device), condition, len(x)
        latents = x
        if self.guidance != 1:
            latents, time = torch.cat([x, x]), torch.cat([time, time])
            rows = torch.cat([self.negative.expand(count), condition])
        self.evaluations += len(latents)
        latents = latents.to(self.dtype, memory_format=torch.channels_last)
        predicted = self.module(latents, time, self.embeddings(rows)).sample.float()
        if self.guidance != 1:
            unconditional, conditional = predicted.chunk(2)
            if self.guidance_gradient == "conditional":
                unconditional = unconditional.detach()
            predicted = unconditional + self.guidance * (conditional - unconditional)
        return self.schedule.score(predicted, x, t)

    def features(self, condition: Tensor) -> Tensor:
        """Mean token embeddings (B, F)."""
        return torch.cat([self.embeddings(some).float().mean(1) for some in condition.split(64)])

    def decode(self, x: Tensor) -> Tensor:
        """Latents (B, 4, h, w) -> images (B, 3, H, W) float32 in [0, 1]; differentiable."""
        latents = (x / self.vae.config.scaling_factor).to(self.vae.dtype)
        slices = [self.vae.decode(part).sample for part in latents.split(self.decode_batch)]
        return (torch.cat(slices).float() / 2 + 0.5).clamp(0, 1)

    def shard(self) -> None:
        """Spread the UNet's frozen weights over the processes, which gather a block's when they come to it.

        Every process keeps the whole LoRA. From now on all of them have to make the same calls.
        """
        from torch.distributed.fsdp import fully_shard

        unet: Any = self.module.to(memory_format=torch.contiguous_format)
        own = {p for p in unet.parameters() if p.requires_grad}
        for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
            for layer in (*block.resnets, *getattr(block, "attentions", ())):
                fully_shard(layer, ignored_params=own)
        fully_shard(unet, ignored_params=own, reshard_after_forward=True)
        self.sharded = True

    # ------------------------------------------------------------------------------------------ adapter

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within it, the UNet runs without its LoRA."""
        unet: Any = self.module
        unet.disable_adapters()
        try:
            yield
        finally:
            unet.enable_adapters()

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Within it, a float32 UNet carries its LoRA in its weights: the same function in fewer operations.

        Half-precision weights would round the LoRA away, and sharded ones are not all here: they are left alone.
        """
        full = self.dtype == torch.float32 and not self.sharded
        layers = [layer for layer in lora_layers(self.module).values() if full and not layer.disable_adapters]
        weights = [layer.get_base_layer().weight for layer in layers]
        originals = [weight.data for weight in weights]
        for layer in layers:
            layer.merge(safe_merge=True)  # into a copy of the weight
        try:
            yield
        finally:
            for layer, weight, original in zip(layers, weights, originals, strict=True):
                layer.merged_adapters.clear()
                weight.data = original  # put back, not subtracted: no rounding is left behind

    def save_adapter(self, folder: Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write the LoRA as diffusers reads it and as ComfyUI and A1111 do."""
        save_lora(self.module, folder, self.path, metadata)

    def load_adapter(self, folder: Path) -> None:
        """Read a LoRA, a file or its folder, into the existing adapter.

        Raises: UsageError as `load_lora`.
        """
        load_lora(self.module, folder)


def check_guidance(guidance: float, negative_prompt: str) -> None:
    """Raises: UsageError on a scale that guides away from the prompt, and on a negative prompt without effect."""
    if not 1 <= guidance < math.inf:
        raise UsageError(f"config model.guidance: must be at least 1, which is no guidance; got {guidance}")
    if negative_prompt and guidance == 1:
        raise UsageError(
            f"config model.negative_prompt: {negative_prompt!r} has no effect with model.guidance=1; raise the guidance"
        )


def add_lora(unet: Any, rank: int, alpha: int, targets: Sequence[str]) -> None:
    """Add a float32 LoRA that starts at zero to a frozen UNet.

    Raises: UsageError when no module's name ends as `targets` say.
    """
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    names = [name for name, _ in unet.named_modules()]
    unmatched = [t for t in targets if not any(name == t or name.endswith("." + t) for name in names)]
    if unmatched:
        raise UsageError(f"config model.lora_targets: no module of the UNet is called {unmatched[0]!r}")
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(targets)))
    cast_training_params(unet, torch.float32)
