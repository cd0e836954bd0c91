"""What computes a network's attention: a back-end by diffusers' name, tried before it is used."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from condrl.errors import UsageError, brief

KERNELS = {  # torch's own, for networks that call torch's attention themselves: UNets and Stable Diffusion 3's
    "_native_cudnn": SDPBackend.CUDNN_ATTENTION,
    "_native_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "_native_flash": SDPBackend.FLASH_ATTENTION,
    "_native_math": SDPBackend.MATH,
}
TORCHS = ("native", *KERNELS)


class WithKernel:
    """An attention processor of diffusers whose calls of torch's attention use one of its kernels alone."""

    def __init__(self, processor: Any, kernel: SDPBackend) -> None:
        self.processor, self.kernel = processor, kernel

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(self.kernel):
            return self.processor(*args, **kwargs)


def backends() -> list[str]:
    """The names in diffusers, without those that are code from the hub."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    return [backend.value for backend in AttentionBackendName if not backend.value.endswith("_hub")]


def why_not(name: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a back-end computes no attention with its gradient here; None where it does."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    q = torch.ones(1, 16, 2, 64, dtype=dtype, device=device, requires_grad=True)  # (B, tokens, heads, features)
    try:
        dispatch_attention_fn(q, q, q, backend=name).sum().backward()
    except Exception as error:  # whatever the packages raise, and None that is called where one is missing
        return brief(error)
    return None


def check_attention(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Try a back-end.

    Raises: UsageError with the available ones when it is unknown, its package is missing, or it has no gradient.
    """
    why = why_not(name, dtype, device) if name in backends() else "there is none of that name"
    if why is not None:
        works = [other for other in backends() if why_not(other, dtype, device) is None]
        raise UsageError(
            f"config model.attention: {name} does not work in {str(dtype).removeprefix('torch.')} on {device} here "
            f"({why}): leave it out, or use one of {', '.join(works)}"
        )


def set_attention(network: nn.Module, name: str) -> None:
    """Let a network's attention be computed by a back-end.

    Raises: UsageError when diffusers lets this network have torch's own alone, and it is none of those.
    """
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention

    for layer in [layer for layer in network.modules() if isinstance(layer, Attention | AttentionModuleMixin)]:
        processor: Any = layer.processor
        if hasattr(processor, "_attention_backend"):
            layer.set_attention_backend(name)  # not the network's, which is also that of every other network
        elif name in KERNELS:
            layer.set_processor(WithKernel(processor, KERNELS[name]))
        elif name not in TORCHS:
            kind = type(network).__name__
            raise UsageError(f"config model.attention: {name} is not for a {kind}: use one of {', '.join(TORCHS)}")
