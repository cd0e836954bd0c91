"""The arithmetic of roll-outs, where `train.rollout_dtype=auto`: whichever is faster on this machine."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from condrl.algorithms.examples import has_half_precision
from condrl.config import Config
from condrl.diffusion.policy import Policy
from condrl.diffusion.rollout import start
from condrl.errors import print_main
from condrl.processes import Processes

IMAGES = 8  # denoised in the trial, at most
STEPS = 3  # timed of each arithmetic, after one that is not
GAIN = 0.95  # of the time in float32: rounding has to save more than that to be worth it


def set_rollout_dtype(config: Config, policy: Policy, condition: Tensor, processes: Processes) -> None:
    """Give the policy the arithmetic that `train.rollout_dtype` asks for; `auto` is replaced by what is faster here.

    The first process measures for all, some steps with conditions (B,).
    """
    if config.train.rollout_dtype == "auto":
        own, line = measured(policy, condition[: min(IMAGES, config.train.rollout_batch)])
        config.train.rollout_dtype = processes.gather_objects(own)[0]
        print_main(f"train.rollout_dtype=auto: {line}")
    name = config.train.rollout_dtype
    policy.rollout_dtype = getattr(torch, name) if name else None


def measured(policy: Policy, condition: Tensor) -> tuple[str | None, str]:
    """The name of the faster arithmetic, None for the network's own; and what was measured, in words."""
    if has_half_precision(policy):
        return None, "the network has half precision already"
    if getattr(policy.model, "quantize", None):
        return None, "quantised layers compute in model.dtype"
    best: dict[torch.dtype | None, float] = {None: torch.inf, torch.bfloat16: torch.inf}
    finite = True
    for turn in range(1 + STEPS):  # in turns, so that another program's load is on both
        for dtype in best:
            seconds, is_finite = timed_step(policy, condition, dtype)
            finite &= is_finite
            if turn:
                best[dtype] = min(best[dtype], seconds)
    full, rounded = best.values()
    words = f"a step of {len(condition)} images takes {full:.3g} s in float32 and {rounded:.3g} s in bfloat16"
    if not finite:
        return None, f"{words}, which overflows: float32"
    return ("bfloat16", f"{words}: bfloat16") if rounded < GAIN * full else (None, f"{words}: float32")


@torch.no_grad()
def timed_step(policy: Policy, condition: Tensor, dtype: torch.dtype | None) -> tuple[float, bool]:
    """Seconds of a roll-out's first step in that arithmetic, and whether its mean is finite; nothing else changes."""
    calls, before = policy.model.evaluations, policy.rollout_dtype
    place = start(policy, len(condition), torch.Generator().manual_seed(0))
    k = torch.zeros(len(condition), dtype=torch.long)
    policy.rollout_dtype = dtype
    with policy.rolling_out():
        begun = now()
        transition, _ = policy.step(place.x, k, condition, place.solver_state)
        seconds = now() - begun
    policy.rollout_dtype, policy.model.evaluations = before, calls
    return seconds, bool(transition.mean.isfinite().all())


def now() -> float:
    """The time in seconds, once a GPU has done what it was asked to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
