"""What is faster on this machine: the arithmetic of roll-outs and the memory layout, where they are `auto`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from condrl.algorithms.examples import has_half_precision
from condrl.config import Config
from condrl.diffusion.policy import Policy
from condrl.diffusion.rollout import start
from condrl.errors import print_main
from condrl.models.latent import LAYOUTS
from condrl.processes import Processes
from condrl.training.clock import now

IMAGES = 8  # denoised in the trial, at most
STEPS = 3  # timed of each arithmetic or layout, after one that is not
GAIN = 0.95  # of the time in float32, or in the usual layout: anything else has to be faster than that to be worth it


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


def set_memory_format(config: Config, policy: Policy, condition: Tensor, processes: Processes) -> None:
    """Give the network the memory layout that is faster here where `model.memory_format=auto`, which it replaces.

    The first process measures for all, some steps with conditions (B,), in the arithmetic that roll-outs may have.
    """
    if config.model.get("memory_format") != "auto":
        return
    few = condition[: min(IMAGES, config.train.rollout_batch)]
    own, line = measured_layout(policy, few, possible(config.train.rollout_dtype, policy))
    config.model["memory_format"] = processes.gather_objects(own)[0]
    model: Any = policy.model
    model.lay_out(config.model["memory_format"])
    print_main(f"model.memory_format=auto: {line}")


def possible(name: str | None, policy: Policy) -> list[torch.dtype | None]:
    """What `train.rollout_dtype` lets roll-outs have, None for the network's own arithmetic."""
    if name == "auto":
        return [None] if why_own(policy) else [None, torch.bfloat16]
    return [getattr(torch, name) if name else None]


def measured_layout(policy: Policy, condition: Tensor, dtypes: Sequence[torch.dtype | None]) -> tuple[str, str]:
    """The name of the faster memory layout for a step of a roll-out and its update; and what was measured, in words."""
    model: Any = policy.model
    usual, other = sorted(LAYOUTS, key=lambda name: LAYOUTS[name] != model.layout)
    best = {name: [torch.inf, torch.inf] for name in (usual, other)}
    for turn in range(1 + STEPS):
        for name in best:
            model.lay_out(name)
            drawn = min(timed_step(policy, condition, dtype)[0] for dtype in dtypes)
            found = drawn, timed_update(policy, condition)
            if turn:
                best[name] = list(map(min, best[name], found))
    chosen = other if sum(best[other]) < GAIN * sum(best[usual]) else usual
    words = (f"{drawn:.3g} s, and {learned:.3g} s with its gradient, {name}" for name, (drawn, learned) in best.items())
    return chosen, f"a step of {len(condition)} images takes {'; '.join(words)}: {chosen}"


def why_own(policy: Policy) -> str | None:
    """Why roll-outs keep the network's own arithmetic without a trial; None where they may be faster in another."""
    if has_half_precision(policy):
        return "the network has half precision already"
    return "quantised layers compute in model.dtype" if getattr(policy.model, "quantize", None) else None


def measured(policy: Policy, condition: Tensor) -> tuple[str | None, str]:
    """The name of the faster arithmetic, None for the network's own; and what was measured, in words."""
    if why := why_own(policy):
        return None, why
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


def timed_update(policy: Policy, condition: Tensor) -> float:
    """Seconds of a roll-out's first step with its gradient, which is not kept; nothing else changes."""
    calls = policy.model.evaluations
    place = start(policy, len(condition), torch.Generator().manual_seed(0))
    k = torch.zeros(len(condition), dtype=torch.long)
    begun = now()
    policy.transition(place.x, k, condition, place.solver_state).mean.square().sum().backward()
    seconds = now() - begun
    policy.model.module.zero_grad()
    policy.model.evaluations = calls
    return seconds
