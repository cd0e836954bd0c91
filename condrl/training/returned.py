"""What plugins return, compared with what they should: each difference is one line."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from condrl.algorithms.base import Collected
from condrl.algorithms.examples import Examples, Metrics
from condrl.diffusion.model import Model
from condrl.diffusion.policy import Policy
from condrl.diffusion.rollout import Rollout, start
from condrl.diffusion.schedule import Schedule
from condrl.diffusion.transition import Coefficients, Sampler, Transition
from condrl.errors import UsageError

PROBES = ((3,), (4, 2, 3))  # shapes of the states that a sampler is tried with: points, and latents
PARTS = [*Model.__annotations__, *(name for name in vars(Model) if not name.startswith("_"))]  # of a model
RECORDED = (  # what a run records itself, so that no metric of an algorithm may have these names
    *("epoch", "images", "updates", "lr", "skipped_updates", "network_calls", "failed_scores", "flat_groups"),
    *("diversity", "loss", "grad_norm", "base_kl", "kl_budget", "kappa", "diagnosis"),
)
FOLDERS = ("reward/", "heldout/", "validation/", "gain/", "seconds/")  # likewise, names that begin so


def check_times(sampler: Any, times: Tensor, name: str) -> None:
    """Raises: UsageError when what a plugin returned is not a sampler of the times that it was given."""
    if not isinstance(sampler, Sampler):
        raise UsageError(
            f"the sampler {name} returned a {type(sampler).__name__}: it should return Coefficients.at(...), or "
            "another condrl.diffusion.transition.Sampler"
        )
    if not torch.equal(sampler.times, times):
        raise UsageError(
            f"the sampler {name} has other times than it was given: it should keep them, as the config's steps and "
            "spacing choose the grid"
        )


def check_numbers(numbers: Coefficients, name: str) -> None:
    """Raises: UsageError when a sampler's coefficients are not one finite number for each step."""
    count = len(numbers.times) - 1
    for letter, values in (("A", numbers.A), ("B", numbers.B), ("S", numbers.S)):
        if values.shape != (count,) or not values.isfinite().all():
            got = f"shape {tuple(values.shape)}" if values.shape != (count,) else f"values {values.tolist()}"
            raise UsageError(f"the sampler {name} has {letter} of {got}: each of {count} steps needs a finite number")
    if (numbers.S < 0).any():
        raise UsageError(f"the sampler {name} has a negative S, which is a standard deviation: {numbers.S.tolist()}")


def check_steps(sampler: Sampler, name: str) -> None:
    """Raises: UsageError when the first or last step of a sampler that is not affine does not return what it should."""
    count, stochastic = len(sampler.times) - 1, sampler.stochastic
    if not isinstance(stochastic, Tensor) or stochastic.shape != (count,) or stochastic.dtype != torch.bool:
        raise UsageError(f"the sampler {name}: stochastic should be a tensor of {count} bools, one for each step")
    for shape in PROBES:
        x = torch.ones(2, *shape)
        first = sampler.init(x)
        check_solver_state(first, first, x, name)
        for k in {0, count - 1}:
            returned: Any = sampler.step(torch.full((2,), k), x, lambda x, t: -x, first)
            if not isinstance(returned, tuple) or len(returned) != 2 or not isinstance(returned[0], Transition):
                raise UsageError(f"the sampler {name}: step should return a Transition and the next solver state")
            check_transition(returned[0], x, f"the sampler {name}: step {k}")
            check_solver_state(returned[1], first, x, name)
            if k == 0 and stochastic[0] and not (returned[0].std > 0).all():  # the last step may have no length
                raise UsageError(f"the sampler {name}: step 0 has noise by `stochastic`, and its std is 0")


def check_solver_state(state: Any, first: Any, x: Tensor, name: str) -> None:
    """Raises: UsageError when a solver state is not one of states x (B, ...), or is there only now and then."""
    if (state is None) != (first is None):
        raise UsageError(f"the sampler {name}: init and step should both return a solver state, or both None")
    if state is not None and not is_like(state, x):
        raise UsageError(
            f"the sampler {name}: its solver state is {described(state)} for states of {described(x)}: it should be "
            "one such tensor"
        )


def check_transition(found: Transition, x: Tensor, what: str) -> None:
    """Raises: UsageError when the distribution of the next states is not one of states like x (B, ...)."""
    if not is_like(found.mean, x):
        raise UsageError(f"{what} has a mean of {described(found.mean)} for states of {described(x)}")
    std: Any = found.std
    if not isinstance(std, Tensor) or not (std.dim() == 0 or spreads(std, x)):
        raise UsageError(
            f"{what} has a std of {described(std)} for states of {described(x)}: it should be one number, or "
            "broadcastable with as many dimensions, as condrl.diffusion.schedule.like(std, x) makes it"
        )
    if not (found.mean.isfinite().all() and std.isfinite().all() and (std >= 0).all()):
        raise UsageError(f"{what} has a mean or a std that is not finite, or a negative std")


def spreads(std: Tensor, x: Tensor) -> bool:
    """Whether a std is of the type of x and broadcastable to it, with as many dimensions."""
    sizes = zip(std.shape, x.shape, strict=False)
    return std.dtype == x.dtype and std.dim() == x.dim() and all(n in (1, size) for n, size in sizes)


def is_like(value: Any, x: Tensor) -> bool:
    """Whether something is a tensor of the shape and the type of x."""
    return isinstance(value, Tensor) and value.shape == x.shape and value.dtype == x.dtype


def described(value: Any) -> str:
    """The shape and the type of a tensor, or the type of something else, in words."""
    if not isinstance(value, Tensor):
        return f"type {type(value).__name__}"
    return f"shape {tuple(value.shape)} in {str(value.dtype).removeprefix('torch.')}"


def check_parts(model: Any, name: str) -> None:
    """Raises: UsageError when a model lacks what condrl.diffusion.model.Model lists."""
    if lacking := [part for part in PARTS if not hasattr(model, part)]:
        raise UsageError(
            f"the model {name} has no {lacking[0]}: it should have what condrl.diffusion.model.Model lists, as below "
            "condrl.models.points.Points or condrl.models.latent.LatentModel"
        )
    for part, kind in (("schedule", Schedule), ("module", nn.Module), ("state_shape", Sequence)):
        if not isinstance(found := getattr(model, part), kind):
            raise UsageError(f"the model {name}: {part} should be a {kind.__name__}, and is a {type(found).__name__}")


@torch.no_grad()
def check_score(policy: Policy, condition: Tensor, name: str) -> None:
    """Check what a model says of noise, for conditions (B,), and what it decodes.

    Raises: UsageError when it is not like the state, not finite, or not of the shape that the model tells.
    """
    model = policy.model
    x = start(policy, len(condition), torch.Generator().manual_seed(0)).x
    score: Any = model.score(x, policy.sampler.times[torch.zeros(len(condition), dtype=torch.long)], condition)
    if not is_like(score, x):
        raise UsageError(
            f"the model {name} has a score of {described(score)} for states of {described(x)}: predict and score "
            "should return one value for each of the state's, of its type"
        )
    if not score.isfinite().all():
        raise UsageError(
            f"the model {name} has a score that is not finite, before any update; if model.dtype is float16, use "
            "bfloat16 or float32"
        )
    samples: Any = model.decode(x)
    shape = (len(condition), *model.sample_shape)
    if not isinstance(samples, Tensor) or samples.shape != shape:
        raise UsageError(f"the model {name} decodes to {described(samples)}, and by its sample_shape to {shape}")


def check_rollout(found: Any, images: int) -> None:
    """Raises: UsageError when an algorithm did not roll out one trajectory for each image."""
    if not isinstance(found, Rollout):
        raise UsageError(
            f"the algorithm's rollout returned a {type(found).__name__}, not a condrl.diffusion.rollout.Rollout"
        )
    counts = {found.states.shape[1], found.log_probs.shape[1], len(found.condition)}
    if counts != {images}:
        got = " and ".join(map(str, sorted(counts)))
        raise UsageError(f"the algorithm's rollout returned {got} trajectories for {images} images")


def check_collected(found: Any) -> None:
    """Raises: UsageError when an algorithm did not collect what an epoch learns from."""
    if not isinstance(found, Collected):
        raise UsageError(
            f"the algorithm's collect returned a {type(found).__name__}, not what context.score returned, or another "
            "condrl.algorithms.base.Collected"
        )


def check_examples(found: Any, images: int) -> None:
    """Raises: UsageError when an algorithm's examples are not of these images by the steps that they name."""
    if not isinstance(found, Examples):
        got = type(found).__name__
        raise UsageError(f"the algorithm's examples returned a {got}, not condrl.algorithms.examples.Examples")
    k: Any = found.k
    if not isinstance(k, Tensor) or k.dim() != 1 or k.dtype != torch.long or not len(k) or k.min() < 0:
        raise UsageError(f"the algorithm's examples: k is {described(k)}: it should be the steps (n,), as int64")
    for field in dataclasses.fields(found):
        value, axis = getattr(found, field.name), field.metadata.get("axis")
        if axis is None or value is None:
            continue
        if not isinstance(value, Tensor) or value.dim() <= axis or value.shape[axis] != images:
            where = "(B, ...)" if axis == 0 else "(K, B, ...)"
            raise UsageError(
                f"the algorithm's examples: {field.name} is {described(value)}: it should be a tensor {where} of "
                f"{images} images"
            )
        if field.metadata["by_step"] and len(value) <= k.max():
            raise UsageError(
                f"the algorithm's examples: {field.name} has {len(value)} rows, and k has the step {int(k.max())}, "
                "which is counted from 0"
            )


def check_loss(returned: Any, pairs: int) -> tuple[Tensor, Metrics]:
    """The loss and the metrics that an algorithm returned for some pairs.

    Raises: UsageError when it is not a loss of each with a gradient, and metrics.
    """
    if not isinstance(returned, tuple) or len(returned) != 2 or not isinstance(returned[0], Tensor):
        raise UsageError("the algorithm's loss should return two things: a tensor, and a dict of metrics")
    loss, metrics = returned
    check_each(loss, pairs, "loss")
    check_metrics(metrics, pairs)
    return loss, metrics


def check_each(loss: Any, pairs: int, what: str) -> None:
    """Raises: UsageError when a loss is not one of each pair, with a gradient."""
    if not isinstance(loss, Tensor) or loss.shape != (pairs,):
        got = f"has shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"is a {type(loss).__name__}"
        raise UsageError(
            f"the algorithm's {what} {got} for {pairs} pairs: it should be the loss of each, ({pairs},), not their mean"
        )
    if not loss.requires_grad:
        raise UsageError(
            f"the algorithm's {what} has no gradient in what is trained: is it detached, or under no_grad?"
        )


def check_metrics(metrics: Any, count: int) -> None:
    """Raises: UsageError when metrics are not tensors of one or of `count` values under names that are free."""
    if not isinstance(metrics, Mapping):
        raise UsageError(
            f"the algorithm's metrics are a {type(metrics).__name__}: they should be a dict of tensors by name"
        )
    check_names(metrics)
    for name, value in metrics.items():
        what = f"the algorithm's metric {name!r}"
        if name in RECORDED or name.startswith(FOLDERS):
            raise UsageError(f"{what} has a name that a run records itself: give it another")
        if not isinstance(value, Tensor):
            raise UsageError(f"{what} is a {type(value).__name__}: it should be a tensor")
        if value.shape not in ((), (count,)) or value.is_complex():
            raise UsageError(
                f"{what} is {described(value)}: it should be one number, or ({count},), whose mean is recorded"
            )


def check_own_measures(measures: Any, rows: int, others: Collection[str]) -> None:
    """Raises: UsageError when an algorithm's own measures are not of each row, or have the names of others."""
    if not isinstance(measures, Mapping):
        raise UsageError(f"the algorithm's measures are a {type(measures).__name__}: they should be a dict by name")
    check_names(measures)
    for name, values in measures.items():
        if name in others:
            raise UsageError(f"the algorithm's measure {name!r} has the name of a reward that is measured too")
        if not isinstance(values, Tensor) or values.shape != (rows,):
            raise UsageError(
                f"the algorithm's measure {name!r} is {described(values)}: it should be a value of each row, ({rows},)"
            )


def check_names(named: Mapping[Any, Any]) -> None:
    """Raises: UsageError when a name is not text."""
    for name in named:
        if not isinstance(name, str):
            raise UsageError(f"the algorithm has a metric named {name!r}, a {type(name).__name__}: it should be text")
