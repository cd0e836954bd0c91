"""Frozen weights in 8 or 4 bits: those of a network's linear layers, rounded by torchao or by bitsandbytes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from condrl.errors import UsageError, brief
from condrl.models.loading import be_quiet

Quantize = Literal["int8", "nf4"]
PACKAGES = {"int8": ("torchao", "torchao"), "nf4": ("bitsandbytes", "bnb")}  # and condrl's extra that has it
NF4_BLOCK = 64  # weights that share a scale
TRIED = 64  # features of the layer that is tried


def check_quantize(kind: Quantize, dtype: torch.dtype, device: torch.device) -> None:
    """Round a small layer, and take its gradient.

    Raises: UsageError when the package that does it is not installed, or does not work on the device.
    """
    package, extra = PACKAGES[kind]
    if importlib.util.find_spec(package) is None:
        raise UsageError(f"config model.quantize: {kind} needs {package}: pip install 'condrl[{extra}]'")
    be_quiet()
    layer = nn.Sequential(nn.utils.skip_init(nn.Linear, TRIED, TRIED, dtype=dtype)).requires_grad_(False)
    for weight in layer.parameters():
        nn.init.ones_(weight)
    x = torch.ones(1, TRIED, dtype=dtype, device=device, requires_grad=True)
    try:
        quantize_linears(layer, kind, device)
        layer(x).sum().backward()
    except Exception as error:  # whatever a build of either raises where it has no kernels
        raise UsageError(
            f"config model.quantize: {kind} does not work on the device {device} here ({brief(error)}): leave it out"
        ) from error


def quantize_linears(network: nn.Module, kind: Quantize, device: torch.device) -> None:
    """Round the weights of a network's linear layers, each on its way to the device, where two copies may not fit.

    They are diffusers' own TorchAoConfig(Int8WeightOnlyConfig()), a scale for each output, and
    BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), a scale for 64 weights (Dettmers et al. 2023).
    """
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    for name in names:
        layer = network.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        network.set_submodule(name, ROUNDED[kind](layer, device))
    setattr(network, "is_loaded_in_4bit", kind == "nf4")  # noqa: B010, by which peft knows it


def in_int8(layer: nn.Linear, device: torch.device) -> nn.Module:
    """A linear layer on the device, with weights of 8 bits."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    rounding = Int8WeightOnlyConfig(set_inductor_config=False)  # which would let every matrix product be in TF32
    quantize_(layer, rounding, device=device)
    return layer


def in_nf4(layer: nn.Linear, device: torch.device) -> nn.Module:
    """A linear layer on the device, with weights of 4 bits, that computes in the precision that it had."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    options = {"compress_statistics": False, "quant_type": "nf4"}
    sizes, dtype = (layer.in_features, layer.out_features, layer.bias is not None), layer.weight.dtype
    rounded: nn.Module = Linear4bit(*sizes, dtype, device="meta", **options)
    rounded.weight = Params4bit(layer.weight.data, requires_grad=False, module=rounded, **options)
    rounded.bias = layer.bias
    return rounded.to(device).train()  # in evaluation mode CPUs with AVX512-BF16 get weights that have no gradient


ROUNDED: dict[Quantize, Callable[[nn.Linear, torch.device], nn.Module]] = {"int8": in_int8, "nf4": in_nf4}


# ---------------------------------------------------------------------------------------------- sizes


def shape_of(weight: Tensor) -> torch.Size:
    """The shape that a weight had before bitsandbytes made a column of it."""
    state = getattr(weight, "quant_state", None)
    return weight.shape if state is None else state.shape


def held_bytes(weight: Tensor) -> int:
    """The bytes of a weight, rounded with its scales or not."""
    if hasattr(weight, "__tensor_flatten__"):  # torchao's, which say the size that they had
        return sum(getattr(weight, name).nbytes for name in weight.__tensor_flatten__()[0])
    state = getattr(weight, "quant_state", None)  # bitsandbytes'
    return weight.nbytes + (state.absmax.nbytes if state is not None else 0)


def planned_bytes(network: nn.Module, kind: Quantize | None) -> int:
    """The bytes of a network's weights once its linear layers are rounded, from their shapes alone."""
    linears = {id(module.weight) for module in network.modules() if isinstance(module, nn.Linear)}
    return sum(rounded_bytes(p, kind) if kind and id(p) in linears else p.nbytes for p in network.parameters())


def rounded_bytes(weight: Tensor, kind: Quantize) -> int:
    """The bytes of a linear layer's weight (outputs, inputs) in a number of bits, with its scales in float32."""
    if kind == "int8":
        return weight.numel() + 5 * len(weight)  # a scale and a zero point for each output
    return -(-weight.numel() // 2) + 4 * -(-weight.numel() // NF4_BLOCK)
