"""Models of the published sizes with random weights: what a machine makes of them needs no download."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from torch import nn

from condrl.diffusion.model import Model
from condrl.io.files import ASSETS
from condrl.models.embeddings import Encoded, Prompt
from condrl.models.quantised import Quantize, planned_bytes
from condrl.registry import model as registry


@dataclass(frozen=True)
class Published:
    """The configurations of a published model's parts, as its repository has them."""

    title: str
    plugin: str  # of the model
    pixels: int  # along the sides of images, unless others are asked for
    guidance: float  # likewise
    weights: int  # of the network
    features: Sequence[Sequence[int]]  # shapes of what the text encoders make of a prompt, tokens first
    network: Mapping[str, Any]  # class and options
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any]


def published() -> dict[str, Published]:
    """Every published model that is known, by its short name."""
    entries = yaml.safe_load((ASSETS / "published" / "sizes.yaml").read_text("utf-8"))
    return {name: Published(**entry) for name, entry in entries.items()}


def make_part(config: Mapping[str, Any], kind: str | None = None) -> Any:
    """A part of a pipeline by its configuration, with diffusers' own random weights."""
    import diffusers

    options = {key: value for key, value in config.items() if key != "class"}
    return getattr(diffusers, kind or config["class"])(**options)


@contextmanager
def made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Within it, modules are made on a device and in a precision, never anywhere else or larger."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def random_model(size: Published, section: Mapping[str, Any], device: torch.device) -> Model:
    """The plugin that a config's model section names, around random networks of the published size.

    Text encoders are left out: a run has them on the host, and asks them once for each prompt.
    """
    options = {key: value for key, value in section.items() if key not in ("name", "path")}
    plugin: Any = registry.find(section["name"]).target

    class Random(plugin):
        tokenizers: tuple[Any, ...] = ()
        encoders: tuple[Any, ...] = ()

        def load(self) -> Any:
            in_float32 = self.family.vae_in_float32 and self.torch_dtype == torch.float16
            with made_on(device, torch.float32 if in_float32 else self.torch_dtype):
                vae = make_part(size.vae, "AutoencoderKL")
            with made_on(torch.device("cpu") if self.quantize else device, self.torch_dtype):
                network: nn.Module = make_part(size.network)
            parts = {self.prefix: network.eval(), "vae": vae.eval(), "scheduler": make_part(size.scheduler)}
            pixels, latent = size.vae["sample_size"], 2 ** (len(size.vae["block_out_channels"]) - 1)
            return SimpleNamespace(**parts, default_sample_size=pixels // latent)

        def encode_prompts(self, prompts: Sequence[Prompt]) -> list[Encoded]:
            return [tuple(torch.randn(*shape).to(self.torch_dtype) for shape in size.features) for _ in prompts]

    made: Model = Random(device, **options)
    return made


def weights_gb(size: Published, dtype: torch.dtype, quantize: Quantize | None = None) -> float:
    """GB of the network's weights alone."""
    with made_on(torch.device("meta"), dtype):
        return planned_bytes(make_part(size.network), quantize) / 1e9
