"""torch.compile of a network's blocks: minutes at the start of a run, then fewer and larger operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from condrl.errors import UsageError, brief

MOST = 1024  # graphs of one block's code; torch's own limit is 8, after which it silently stops compiling


def check_compiler(device: torch.device) -> None:
    """Compile a sum.

    Raises: UsageError when that cannot be done here: it takes a C++ compiler on a CPU, and Triton on a GPU.
    """

    def add_one(x: Tensor) -> Tensor:
        return x.sin() + 1

    try:
        torch.compile(add_one)(torch.zeros(8, device=device))
    except Exception as error:  # whatever the tools that it needs raise
        needed = "a C++ compiler" if device.type == "cpu" else "Triton and a C compiler"
        raise UsageError(
            f"config model.compile: torch.compile does not work on {device} here, it needs {needed}: leave it out "
            f"({brief(error)})"
        ) from error


def compile_blocks(blocks: Sequence[nn.Module]) -> None:
    """Have blocks compiled when they are first called, and again for each batch size and each use of the LoRA.

    Blocks of the same code and shapes share a graph. Sizes are not left open: the code for any size is slower, and
    torch 2.14 cannot make it for narrow networks.
    """
    import torch._dynamo

    settings = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, MOST)
    settings.accumulated_recompile_limit = max(settings.accumulated_recompile_limit, 8 * MOST)
    for block in blocks:
        block.compile(dynamic=False)
