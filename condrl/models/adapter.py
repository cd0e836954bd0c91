"""The LoRA on a network: put there, computed, and merged into its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from condrl.errors import UsageError
from condrl.models.lora import lora_layers


def add_lora(network: Any, rank: int, alpha: int, targets: Sequence[str]) -> None:
    """Add a float32 LoRA that starts at zero to a frozen network.

    Raises: UsageError when no module's name ends as `targets` say, or one that does has no matrix.
    """
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    for target in targets:
        check_target(network, target)
    settings = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(targets))
    network.add_adapter(settings)
    cast_training_params(network, torch.float32)
    for layer in lora_layers(network).values():
        layer.__class__ = in_precision_of_input(layer.__class__)


def check_target(network: nn.Module, target: str) -> None:
    """Raises: UsageError when no module is called so, or one that gets no LoRA."""
    found = [(name, m) for name, m in network.named_modules() if name == target or name.endswith("." + target)]
    if not found:
        raise UsageError(f"config model.lora_targets: no module of the network is called {target!r}")
    for name, module in found:
        weight = getattr(module, "weight", None)
        if weight is None or weight.dim() < 2:
            raise UsageError(
                f"config model.lora_targets: {target!r} is {name or 'the network'}, a {type(module).__name__}, which "
                "gets no LoRA: name linear layers or convolutions"
            )


class InPrecisionOfInput(nn.Module):
    """A layer of peft whose LoRA is computed in half precision where its input is.

    peft computes every LoRA in float32, which doubles what a network in half precision reads, writes and keeps for it.
    """

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self
        if torch.finfo(x.dtype).bits > 16 or layer.disable_adapters or layer.merged or not layer.lora_A:
            found: Tensor = super().forward(x)
            return found
        result: Tensor = layer.base_layer(x)
        (name,) = layer.lora_A
        down, up, scale = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
        if isinstance(down, nn.Linear):  # one operation multiplies by `up`, scales and adds, and rounds once
            inner = F.linear(x, down.weight.to(x.dtype)).flatten(0, -2)
            return torch.addmm(result.flatten(0, -2), inner, up.weight.T.to(x.dtype), alpha=scale).view_as(result)
        inner = F.conv2d(x, down.weight.to(x.dtype), None, down.stride, down.padding, down.dilation, down.groups)
        return torch.add(result, F.conv2d(inner, up.weight.to(x.dtype)), alpha=scale)


@cache
def in_precision_of_input(kind: Any) -> type[InPrecisionOfInput]:
    """A class of peft's layers whose LoRA is computed so, made once from peft's own."""
    return kind if issubclass(kind, InPrecisionOfInput) else type(kind.__name__, (InPrecisionOfInput, kind), {})


@contextmanager
def merged_into_weights(network: nn.Module) -> Iterator[None]:
    """Within it, a network carries its LoRA in copies of its weights: the same function in fewer operations."""
    every = lora_layers(network).values()
    layers = [layer for layer in every if not layer.disable_adapters and not layer.merged]  # it may be nested
    weights = [layer.get_base_layer().weight for layer in layers]
    originals = [weight.data for weight in weights]
    try:
        for layer in layers:
            layer.merge(safe_merge=True)  # into a copy of the weight
        yield
    finally:
        for layer, weight, original in zip(layers, weights, originals, strict=True):
            layer.merged_adapters.clear()
            weight.data = original  # put back, not subtracted: no rounding is left behind
