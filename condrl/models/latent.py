"""What latent diffusion models share: prompts encoded on demand, guidance, a LoRA on the network, the VAE in slices."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from condrl.diffusion.policy import acting, trained_weights
from condrl.diffusion.schedule import Schedule
from condrl.diffusion.schedulers import DiscreteSchedule, schedule_from_diffusers
from condrl.errors import UsageError, print_main, quoted
from condrl.io.files import locate
from condrl.models.adapter import add_lora, merged_into_weights
from condrl.models.attention import check_attention, set_attention
from condrl.models.compiled import check_compiler, compile_blocks
from condrl.models.embeddings import Embeddings, Encoded, Prompt
from condrl.models.loading import Family, load_pipeline, public_name
from condrl.models.lora import find_lora, load_lora, read_lora, save_lora
from condrl.models.quantised import Quantize, check_quantize, quantize_linears

Dtype = Literal["float32", "bfloat16", "float16"]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
STAYS_ON_HOST = ContextVar("STAYS_ON_HOST", default=False)
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@contextmanager
def kept_on_host(stays: bool = True) -> Iterator[None]:
    """Within it, networks that are loaded stay on the host, where they are whole, until they are sharded."""
    before = STAYS_ON_HOST.set(stays)
    try:
        yield
    finally:
        STAYS_ON_HOST.reset(before)


class InDiffusers(NamedTuple):
    """What a plain pipeline is told for the same images, as keywords."""

    load: dict[str, Any]  # of from_pretrained
    call: dict[str, Any]  # of the pipeline itself


@dataclass(eq=False, repr=False)
class LatentModel(ABC):
    """A text-to-image pipeline in diffusers' format, tuned by a LoRA; a family's plugin adds its particulars."""

    family: ClassVar[Family]  # of pipelines that it can load
    prefix: ClassVar[str] = "unet"  # of the network in the pipeline, and of its modules in LoRA files

    device: torch.device
    _: KW_ONLY
    path: str  # hub id, diffusers folder, .safetensors / .ckpt file
    revision: str | None = None  # of a hub id: branch, tag or commit
    variant: str | None = None  # of the weights' files: fp16 for model.fp16.safetensors
    single_file_config: str | None = None  # diffusers folder or hub id with the configs of a single file
    dtype: Dtype = "float32"  # of the frozen weights; the LoRA is always float32
    quantize: Quantize | None = None  # the network's linear layers: int8 (8 bits, torchao), nf4 (4 bits, bitsandbytes)
    height: int | None = None  # of images, pixels; null: as the network was trained
    width: int | None = None  # of images, pixels; null: as the network was trained
    guidance: float = 5.0  # classifier-free guidance scale; 1: none
    guidance_gradient: Literal["both", "conditional"] = "both"  # branches with a gradient; the cost is the same
    negative_prompt: str | None = None  # the prompt of the unconditional branch; null: the model's own, often ""
    lora_rank: int = 16  # rank of the LoRA
    lora_alpha: int | None = None  # LoRA scale is alpha / rank; null: alpha = rank
    lora_targets: tuple[str, ...] = ATTENTION  # modules that get a LoRA, by the end of their names
    lora: str | None = None  # start from this LoRA folder
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, slower
    decode_batch: int = 16  # images that the VAE decodes at a time
    offload_vae: bool = False  # keep the VAE on the host: a layer is on the device only while it computes
    embeddings_gb: float = 1.0  # of encoded prompts that the host keeps; those beyond it are encoded again
    release_encoders: bool = False  # encode a run's prompts before it, and let go of the text encoders' host memory
    memory_format: Literal["auto", "contiguous", "channels_last"] | None = None  # of convolutions; auto: the faster
    attention: str | None = None  # back-end by diffusers' name, such as _native_flash; null: torch's choice
    compile: bool = False  # torch.compile of the network's blocks: minutes at the start, then faster

    def __post_init__(self) -> None:
        self.check_options()
        if self.compile:
            check_compiler(self.device)
        if self.attention:
            check_attention(self.attention, self.torch_dtype, self.device)
        if self.quantize:
            check_quantize(self.quantize, self.torch_dtype, self.device)
        self.evaluations, self.sharded, self.released = 0, False, False
        self.pipe = self.load()
        self.vae = self.place_vae(self.pipe.vae.requires_grad_(False))
        network = getattr(self.pipe, self.prefix).requires_grad_(False)
        if self.attention:
            set_attention(network, self.attention)
        if self.quantize:
            quantize_linears(network, self.quantize, self.device)
        place = torch.device("cpu") if STAYS_ON_HOST.get() else self.device
        self.module: nn.Module = network.to(place, memory_format=self.layout)
        self.check_size()
        self.schedule: Schedule = self.make_schedule()
        self._numbers: dict[Prompt, int] = {}  # of each prompt
        self._prompts: list[Prompt] = []  # by their numbers
        self._host_embeddings = Embeddings(self._encoded, 1e9 * self.embeddings_gb)
        self._table: Encoded = ()  # on the device, of the prompts that were asked for last
        self._places: dict[int, int] = {}  # of prompts, by their numbers, in that table
        self.negative = self.encode([self.negative_prompt])
        add_lora(self.module, self.lora_rank, self.lora_alpha or self.lora_rank, self.lora_targets)
        self._start: list[Tensor] = []  # what a run that starts from a LoRA starts from
        if self.lora:
            self.load_adapter(locate(self.lora))
            self._start = [weight.detach().clone() for weight in trained_weights(self.module)]
        if self.gradient_checkpointing:
            self.module.enable_gradient_checkpointing()
            self.module.train()  # diffusers checkpoints in training mode only; these networks have no dropout
        if self.compile:
            compile_blocks(self.blocks())

    # ------------------------------------------------------------------------------------------ a family's own

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[Prompt]) -> list[Encoded]:
        """What the network is given of each prompt, as tensors on any device: first its tokens' features (L, F)."""

    @abstractmethod
    def predict(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """The network's own output at latents x (B, C, h, w) and times t (B,), float32."""

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The parts of the network that are compiled, or whose frozen weights are gathered together when sharded."""

    @abstractmethod
    def output_part(self) -> nn.Module:
        """The part of the network that is first given its deepest features (B, C, h, w) or (B, L, F); not compiled."""

    @classmethod
    def in_diffusers(cls, options: Mapping[str, Any]) -> InDiffusers:
        """What to tell diffusers to draw as a model with these options of its config section does."""
        given = {name: options[name] for name in ("negative_prompt", "height", "width") if options.get(name)}
        return InDiffusers({}, {"guidance_scale": options.get("guidance", cls.guidance)} | given)

    def load(self) -> Any:
        """The pipeline, of a kind that is known to work.

        Raises: UsageError when `path` is not one.
        """
        config = self.single_file_config
        return load_pipeline(self.wanted, self.path, self.revision, config, self.torch_dtype, self.variant)

    def place_vae(self, vae: Any) -> Any:
        """The VAE on the device; with `offload_vae` each of its layers, while it or its gradient is computed."""
        if not self.offload_vae:
            return vae.to(self.device)
        from accelerate import cpu_offload

        return cpu_offload(vae, self.device)

    def make_schedule(self) -> Schedule:
        """The forward process that the network was trained on."""
        scheduler = self.pipe.scheduler
        return schedule_from_diffusers({**scheduler.config, "_class_name": type(scheduler).__name__})

    @property
    def layout(self) -> torch.memory_format:
        """Of the network and its input."""
        return LAYOUTS["channels_last" if self.memory_format == "channels_last" else "contiguous"]

    def lay_out(self, name: Literal["contiguous", "channels_last"]) -> None:
        """Change the memory layout of the network and its input."""
        self.memory_format = name
        self.module.to(memory_format=self.layout)

    @property
    def wanted(self) -> Family:
        """The family, without the parts that the options leave out."""
        return self.family

    # ------------------------------------------------------------------------------------------ sizes

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def vae_scale(self) -> int:
        """Pixels along the side of a latent."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def pixel_step(self) -> int:
        """What the height and the width of an image are multiples of."""
        return self.vae_scale

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latents."""
        network: Any = self.module
        side = network.config.get("sample_size") or self.pipe.default_sample_size
        own = (side, side) if isinstance(side, int) else side
        given = (None if pixels is None else pixels // self.vae_scale for pixels in (self.height, self.width))
        height, width = (mine or theirs for mine, theirs in zip(given, own, strict=True))
        return self.vae.config.latent_channels, height, width

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(3, H, W) of the images."""
        _, height, width = self.state_shape
        return 3, height * self.vae_scale, width * self.vae_scale

    def check_size(self) -> None:
        """Raises: UsageError on a height or width that no latents have."""
        for name, pixels in (("height", self.height), ("width", self.width)):
            if pixels is not None and (pixels < 1 or pixels % self.pixel_step):
                raise UsageError(f"config model.{name}: must be a multiple of {self.pixel_step} pixels, got {pixels}")

    def check_options(self) -> None:
        """Raises: UsageError on an option that could not be used whatever the pipeline."""
        for name in ("lora_rank", "lora_alpha", "decode_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"config model.{name}: must be at least 1, got {value}")
        if self.embeddings_gb < 0:
            raise UsageError(f"config model.embeddings_gb: must be at least 0, got {self.embeddings_gb:g}")
        check_guidance(self.guidance, self.negative_prompt)
        if self.compile and self.quantize == "int8":
            raise UsageError(
                "config model.compile: does not work with int8 weights, through which torch 2.14 compiles no backward "
                "pass: leave it out, or use model.quantize=nf4"
            )
        if not self.lora_targets:
            raise UsageError("config model.lora_targets: it is empty, so nothing would be trained; leave it out")

    # ------------------------------------------------------------------------------------------ prompts

    def encode(self, prompts: Sequence[Prompt]) -> Tensor:
        """The numbers (B,) of prompts; those that are too long to be read as a whole are told, once."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._numbers]
        self._numbers |= {prompt: len(self._numbers) + i for i, prompt in enumerate(new)}
        self._prompts += new
        self._check_lengths(new)
        return torch.tensor([self._numbers[prompt] for prompt in prompts])

    def _check_lengths(self, prompts: Sequence[Prompt]) -> None:
        texts = [prompt for prompt in prompts if prompt is not None]
        parts = [texts[start : start + 1000] for start in range(0, len(texts), 1000)]
        long: dict[str, tuple[int, int]] = {}  # their tokens, and how many are read
        for part in tqdm(parts, "reading the prompts", leave=False, disable=None, delay=1):
            for tokenizer in self.tokenizers:
                most, tokens = tokenizer.model_max_length, tokenizer(part).input_ids
                cut = {text: (len(ids), most) for text, ids in zip(part, tokens, strict=True) if len(ids) > most}
                long |= cut
        if long:
            prompt, (count, most) = next(iter(long.items()))
            others = f", the first of {len(long)} that are too long," if len(long) > 1 else ""
            print_main(
                f"warning: the prompt {quoted(prompt)}{others} has {count} tokens; the model reads the first {most}"
            )

    @property
    def tokenizers(self) -> list[Any]:
        """Those that say how much of a prompt is read: one of each text encoder."""
        return [getattr(self.pipe, name) for name in self.family.readers]

    @property
    def encoders(self) -> list[Any]:
        """The text encoders, which are on the host while they are not used."""
        found = (getattr(self.pipe, name) for name in self.family.readers.values())
        return [encoder for encoder in found if encoder is not None]

    @torch.no_grad()
    def _encoded(self, prompts: Sequence[Prompt]) -> list[Encoded]:
        if self.released:
            raise UsageError(
                f"config model.release_encoders: the prompt {quoted(prompts[0] or '')} came when the text encoders had "
                "been released: leave it out"
            )
        for encoder in self.encoders:
            encoder.to(self.device)
        found = [tuple(x.cpu() for x in encoded) for encoded in self.encode_prompts(prompts)]
        for encoder in self.encoders:
            encoder.to("cpu")  # makes room on a GPU
        return found

    def drop_encoders(self) -> None:
        """Encode every prompt so far, and free the text encoders' memory: no prompt can be added.

        Raises: UsageError where what is encoded does not fit into `embeddings_gb`.
        """
        self._host_embeddings.hold(self._prompts)
        for name in self.family.readers.values():
            setattr(self.pipe, name, None)
        self.released = True

    def embeddings(self, condition: Tensor) -> Encoded:
        """What the network is given of prompts by their numbers (B,), each (B, ...), on the device."""
        numbers = condition.tolist()
        if not self._places.keys() >= set(numbers):  # a roll-out asks for the same prompts at each of its steps
            self._places = {number: place for place, number in enumerate(dict.fromkeys(numbers))}
            table = self._host_embeddings([self._prompts[number] for number in self._places])
            self._table = tuple(x.to(self.device) for x in table)
        rows = torch.tensor([self._places[number] for number in numbers])
        return tuple(x[rows] for x in self._table)

    def features(self, condition: Tensor) -> Tensor:
        """Mean token features (B, F)."""
        return torch.cat([self.embeddings(some)[0].float().mean(1) for some in condition.split(64)])

    # ------------------------------------------------------------------------------------------ score and images

    def score(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """The guided score at latents x (B, C, h, w) and times t (B,), s = s_u + w (s_c - s_u)."""
        if self.guidance == 1:
            self.evaluations += len(x)
            return self.schedule.score(self.predict(x, t, condition), x, t)
        self.evaluations += 2 * len(x)
        both = torch.cat([self.negative.expand(len(x)), condition])
        unconditional, conditional = self.predict(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        if self.guidance_gradient == "conditional":
            unconditional = unconditional.detach()
        return self.schedule.score(unconditional + self.guidance * (conditional - unconditional), x, t)

    @torch.no_grad()
    def network_features(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """The network's deepest features (B, F) of latents x (B, C, h, w) at times t (B,), their mean over positions.

        Of a UNet these are what its middle block returns, of a transformer its last block; guidance has no part in it.
        """
        seen: list[Tensor] = []

        def look(_: nn.Module, args: tuple[Tensor, ...], options: dict[str, Any]) -> None:
            seen.append(args[0] if args else options["hidden_states"])

        hook = self.output_part().register_forward_pre_hook(look, with_kwargs=True)
        try:
            self.predict(x, t, condition)
        finally:
            hook.remove()
        self.evaluations += len(x)
        (found,) = seen
        return found.float().mean((2, 3) if found.dim() == 4 else 1)

    @contextmanager
    def guided(self, guidance: float) -> Iterator[None]:
        """Within it, scores are guided by another scale than `guidance`."""
        own, self.guidance = self.guidance, guidance
        try:
            yield
        finally:
            self.guidance = own

    def network_input(self, x: Tensor) -> Tensor:
        """Latents as the network takes them: in its precision and memory layout."""
        return x.to(self.torch_dtype, memory_format=self.layout)

    def network_time(self, t: Tensor) -> Tensor:
        """Times as the network was trained with them, on the device."""
        assert isinstance(self.schedule, DiscreteSchedule)  # another family says its own
        return self.schedule.network_time(t).to(self.device)

    def decode(self, x: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, H, W) float32 in [0, 1]; differentiable."""
        config = self.vae.config
        latents = (x / config.scaling_factor + (getattr(config, "shift_factor", None) or 0)).to(self.vae.dtype)
        slices = [self.vae.decode(part).sample for part in latents.split(self.decode_batch)]
        return (torch.cat(slices).float() / 2 + 0.5).clamp(0, 1)

    def encode_images(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> latents (B, C, h, w) float32, the means of the VAE's encoder."""
        config, scaled = self.vae.config, (2 * images - 1).to(self.device, self.vae.dtype)
        means = [self.vae.encode(part).latent_dist.mean for part in scaled.split(self.decode_batch)]
        return (torch.cat(means).float() - (getattr(config, "shift_factor", None) or 0)) * config.scaling_factor

    def shard(self) -> None:
        """Spread the network's frozen weights over the processes, which gather a block's when they come to it.

        A network that was kept on the host goes to the device block by block, each split before the next one follows.
        Every process keeps the whole LoRA. From now on all of them have to make the same calls.

        Raises: UsageError when the network is compiled or quantised, or is to have a memory layout.
        """
        for name in ("compile", "quantize", "memory_format"):
            if getattr(self, name):
                raise UsageError(f"config model.{name}: does not work with FSDP: leave it out, or start without FSDP")
        from torch.distributed import get_world_size
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        network = self.module.to(memory_format=torch.contiguous_format)
        own = set(trained_weights(network))
        mesh = init_device_mesh(self.device.type, (get_world_size(),))
        for block in self.blocks():
            fully_shard(block, mesh=mesh, ignored_params=own)
        fully_shard(network, mesh=mesh, ignored_params=own, reshard_after_forward=True)
        for weight in own:
            weight.data = weight.data.to(self.device)
        self._start = [weight.to(self.device) for weight in self._start]
        self.sharded = True

    # ------------------------------------------------------------------------------------------ adapter

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within it, the network is the one that tuning started from: without a LoRA, or with `lora`."""
        if self._start:
            with acting(trained_weights(self.module), self._start):
                yield
            return
        network: Any = self.module
        network.disable_adapters()
        try:
            yield
        finally:
            network.enable_adapters()

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Within it, a float32 network carries its LoRA in its weights: the same function in fewer operations.

        Half-precision weights and quantised ones would round the LoRA away, and sharded ones are not all here: they
        are left alone.
        """
        if self.torch_dtype != torch.float32 or self.sharded or self.quantize:
            yield
            return
        with merged_into_weights(self.module):
            yield

    def save_adapter(self, folder: Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write the LoRA as diffusers reads it and as ComfyUI and A1111 do."""
        save_lora(self.module, folder, public_name(self.path), metadata, self.prefix, self.family.tag)

    def load_adapter(self, folder: Path) -> None:
        """Read a LoRA, a file or its folder, into the existing adapter.

        Raises: UsageError as `load_lora`.
        """
        load_lora(self.module, folder, self.prefix)

    def fit_adapter(self, source: Path) -> None:
        """Give the adapter the modules that a LoRA has, a file or its folder, instead of `lora_targets`.

        Raises: UsageError as `load_lora`.
        """
        found = read_lora(self.module, find_lora(source), self.prefix)
        network: Any = self.module
        network.delete_adapters(list(network.peft_config))
        add_lora(self.module, self.lora_rank, self.lora_rank, sorted(found))


def check_guidance(guidance: float, negative_prompt: str | None) -> None:
    """Raises: UsageError on a scale that guides away from the prompt, and on a negative prompt without effect."""
    if not 1 <= guidance < math.inf:
        raise UsageError(f"config model.guidance: must be at least 1, which is no guidance; got {guidance}")
    if negative_prompt and guidance == 1:
        raise UsageError(
            f"config model.negative_prompt: {negative_prompt!r} has no effect with model.guidance=1; raise the guidance"
        )


def unet_layers(unet: Any) -> list[nn.Module]:
    """The residual and attention blocks of a UNet; smaller ones may have no middle, or one without attention."""
    parts = (part for part in (*unet.down_blocks, unet.mid_block, *unet.up_blocks) if part is not None)
    layers = (layer for part in parts for layer in (*part.resnets, *getattr(part, "attentions", ())))
    return [layer for layer in layers if layer is not None]


def first_up_block(unet: Any) -> nn.Module:
    """The block of a UNet that is given what the middle made, or what went down where there is no middle."""
    found: nn.Module = unet.up_blocks[0]
    return found
