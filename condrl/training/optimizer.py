"""The optimiser of what is trained: AdamW, or bitsandbytes' with moments of 8 bits."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from condrl.config import TrainConfig
from condrl.errors import UsageError, brief

MOMENT_BYTES = {"adamw": 8, "adamw8bit": 2}  # of both moments, for a weight in float32 that has 4
PROBED = 4096  # weights: bitsandbytes keeps the moments of fewer in float32


def check_optimizer(name: str) -> None:
    """Raises: UsageError when the package that has the optimiser is not installed."""
    if name == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError("config train.optimizer: adamw8bit needs bitsandbytes: pip install 'condrl[bnb]'")


def check_runs(train: TrainConfig, device: torch.device) -> None:
    """Take a step on the device with weights that are thrown away.

    Raises: UsageError when the optimiser cannot work there; bitsandbytes does not on every device.
    """
    if train.optimizer == "adamw":
        return
    check_optimizer(train.optimizer)
    try:
        state_of_a_step(train, [torch.zeros(PROBED, device=device)])
    except Exception as error:  # whatever a build of bitsandbytes raises where it has no kernels
        raise UsageError(
            f"config train.optimizer: {train.optimizer} does not work on the device {device} here ({brief(error)}): "
            "use train.optimizer=adamw"
        ) from error


def make_optimizer(train: TrainConfig, groups: Sequence[Mapping[str, Any]]) -> torch.optim.Optimizer:
    """The optimiser that `train` asks for, of groups of parameters with settings that replace `train`'s."""
    made = [dict(group) for group in groups]
    if train.optimizer == "adamw":
        return torch.optim.AdamW(made, train.lr, train.betas, weight_decay=train.weight_decay, fused=True)
    from bitsandbytes.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(made, lr=train.lr, betas=train.betas, weight_decay=train.weight_decay)
    return optimizer


def state_of_a_step(train: TrainConfig, weights: Sequence[Tensor]) -> dict[int, Any]:
    """What the optimiser keeps of weights like these after a step, by their numbers: what a checkpoint should hold."""
    twins = [nn.Parameter(torch.zeros_like(weight)) for weight in weights]
    if not twins:
        return {}  # before the first update
    optimizer = make_optimizer(train, [{"params": twins}])
    for twin in twins:
        twin.grad = torch.zeros_like(twin)
    optimizer.step()
    state: dict[int, Any] = optimizer.state_dict()["state"]
    return state


def negative_moment(state: Mapping[Any, Any], name: str = "state") -> str | None:
    """The name of a second moment, or of its scale, that is below zero, which no optimiser makes; None without one."""
    for key, value in state.items():
        part = f"{name}.{key}"
        if isinstance(value, Mapping):
            if found := negative_moment(value, part):
                return found
        elif key in ("exp_avg_sq", "absmax2") and (value < 0).any():
            return part
    return None
