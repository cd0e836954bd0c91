"""Measure this machine on a model of a published size, with random weights: nothing is downloaded.

    condrl benchmark sd15 --batch 8 --steps 4
    condrl benchmark sd3.5-medium --dtype bfloat16 model.gradient_checkpointing=false
    condrl benchmark shapes                      the embedded pipeline, small enough for any machine

An epoch is rolled out and learned from as a run does it, beside bare calls of the network, as many and at the same
batch, without and with a backward pass. The share of the peak is that of the fastest large matrix product measured in
the same arithmetic. `key=value` overrides change the run, such as algorithm.name=ddpo sampler.eta=1 or
model.height=1024. --json FILE writes what was measured.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from condrl.commands.arguments import check_json, parser_of
from condrl.commands.console import exit_code
from condrl.config import Config
from condrl.errors import UsageError, print_main
from condrl.loading import load_config
from condrl.registry import suggestion

if TYPE_CHECKING:
    import torch

    from condrl.training.published import Published
    from condrl.training.trainer import Trainer

SHAPES = "shapes"
BATCHES = {SHAPES: 64}  # other models have 4
PROMPT = "a photograph of a cat"


class Calls(NamedTuple):
    """Network evaluations of one image each, without and with a backward pass."""

    plain: int
    learning: int


class Work(NamedTuple):
    """A phase of an epoch: its seconds, what comes out of it, and the network evaluations in it."""

    seconds: float
    samples: int  # images, or pairs of image and step
    calls: Calls


def parse(words: list[str]) -> argparse.Namespace:
    parser = parser_of("benchmark", __doc__)
    parser.add_argument("words", nargs="+", metavar="MODEL key=value", help=f"{SHAPES}, sd15, sdxl, sd3.5-medium, flux")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the frozen weights")
    parser.add_argument("--batch", type=int, help="images denoised together, and pairs of a forward and backward")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps")
    parser.add_argument("--repeats", type=int, default=3, help="epochs timed, after one that is not; 0: that one")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_intermixed_args(words)


def main(words: list[str]) -> int:
    """Exit code: 0, 1 when the machine cannot do it, 2 for bad input."""
    return exit_code(lambda: benchmark(parse(words)))


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print a table, write it if asked to; returns what was measured."""
    from condrl.io.records import write_json
    from condrl.training.published import published

    name, *overrides = args.words
    sizes = published()
    if name not in (SHAPES, *sizes):
        near = suggestion(name, (SHAPES, *sizes))
        raise UsageError(f"there is no model {name!r} to measure.{near} Available: {', '.join((SHAPES, *sizes))}")
    if args.json:
        check_json(args.json)
    size = sizes.get(name)
    config = load_config([*settings(args, size), *overrides])
    found = {"model": name, **measure(config, size, args.repeats)}
    print("\n".join(table(found)))
    if args.json:
        write_json(args.json, found)
    return found


def settings(args: argparse.Namespace, size: Published | None) -> list[str]:
    """The run that is measured, as overrides: nft on a prompt, whose images are learned from in one update."""
    batch = BATCHES.get(args.words[0], 4) if args.batch is None else args.batch
    if batch < 1 or args.steps < 1 or args.repeats < 0:
        raise UsageError("--batch and --steps must be at least 1, and --repeats at least 0")
    model = ["model.name=stable_diffusion", "model.path=asset:shapes", "model.guidance=1"]
    if size:
        sides = [f"model.{side}={size.pixels}" for side in ("height", "width")]
        model = [f"model.name={size.plugin}", f"model.guidance={size.guidance}", *sides]
        model += ["model.gradient_checkpointing=true", "model.decode_batch=1"]
    dtype = args.dtype or ("bfloat16" if size else "float32")
    images = max(2, batch)  # a group
    train = {"prompts_per_epoch": 1, "images_per_prompt": images, "updates_per_epoch": 1}
    train |= {"rollout_batch": batch, "loss_batch": batch}
    return [
        *(*model, f"model.dtype={dtype}", "sampler.name=ddim", f"sampler.steps={args.steps}", "sampler.eta=0"),
        *("algorithm.name=nft", "rewards.jpeg_compressibility.weight=1", "prompts.train=asset:shapes/train.txt"),
        *(f"train.{key}={value}" for key, value in train.items()),
    ]


def measure(config: Config, size: Published | None, repeats: int) -> dict[str, Any]:
    """What the machine makes of a run, beside bare calls of its network."""
    import torch

    from condrl.models.quantised import shape_of
    from condrl.training.host import device_name, peak_memory_gb, provenance
    from condrl.training.memory import memory
    from condrl.training.preflight import attempt

    trainer = make(config, size)
    model, train = trainer.policy.model, config.train
    print_main(memory(trainer, attempt(trainer).needs))
    rounded = trainer.policy.rollout_dtype
    dtype = rounded or getattr(torch, config.model["dtype"])
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    epochs = [epoch(trainer, number) for number in range(repeats + 1)]
    memory_gb = peak_memory_gb(model.device)
    guided = 2 if config.model.get("guidance", 1) != 1 else 1
    bare = {who: bare_seconds(trainer, works[-1].calls, guided, repeats, who) for who, works in columns(epochs).items()}
    peak, cost = peak_flops(model.device, dtype), flops(trainer)
    return {
        "device": device_name(model.device),
        "weights": sum(shape_of(p).numel() for p in model.module.parameters() if not p.requires_grad),
        **{"dtype": config.model["dtype"], "quantize": config.model.get("quantize")},
        **{"rollout_dtype": train.rollout_dtype, "peak_tflops": peak / 1e12},
        **{"pixels": list(model.sample_shape[1:]), "batch": train.rollout_batch, "steps": config.sampler["steps"]},
        **{"guidance": config.model.get("guidance"), "algorithm": config.algorithm["name"]},
        **{who: compared(works[1:] or works, bare[who], cost, peak) for who, works in columns(epochs).items()},
        "peak_memory_gb": memory_gb,
        **provenance(),
    }


def columns(epochs: list[dict[str, Work]]) -> dict[str, list[Work]]:
    """The work of each epoch, by phase."""
    return {who: [found[who] for found in epochs] for who in epochs[0]}


def make(config: Config, size: Published | None) -> Trainer:
    """The trainer of the embedded pipeline, or of random networks of a published size.

    Raises: UsageError when there is no room for the network's weights.
    """
    import torch

    from condrl.processes import Processes
    from condrl.prompts import Row
    from condrl.training.build import make_trainer
    from condrl.training.checks import check_combination
    from condrl.training.host import make_accelerator, set_threads_and_seed
    from condrl.training.memory import free_gb
    from condrl.training.published import random_model, weights_gb

    check_combination(config)
    set_threads_and_seed(config)
    processes, model = Processes(make_accelerator(config)), None
    device = processes.accelerator.device
    if size:
        dtype, quantize = getattr(torch, config.model["dtype"]), config.model.get("quantize")
        needed, free = weights_gb(size, dtype, quantize), free_gb(device)
        if free is not None and needed > free:
            raise UsageError(f"{size.title} has {needed:.1f} GB of weights, and {free:.1f} GB are free on {device}")
        model = random_model(size, config.model, device)
    return make_trainer(config, [Row(0, PROMPT)], processes=processes, model=model)


# ---------------------------------------------------------------------------------------------- an epoch


def epoch(trainer: Trainer, number: int) -> dict[str, Work]:
    """An epoch's roll-out and update; what it decodes and scores in between is not timed."""
    from condrl.training.clock import Clock

    clock, found = Clock(), {}
    with counted(trainer) as calls:
        collected = trainer.collect(number, clock)
        images = len(collected.rows)
        found["rollout"] = Work(clock.seconds["rollout"], images, take(calls))
        examples = trainer.examples(collected, number)
        trainer.learner.update(examples, collected, number)
        clock.lap("update")
        pairs = images * (trainer.config.train.steps_per_image or len(examples.k))
        found["update"] = Work(clock.seconds["update"], pairs, take(calls))
    return found


@contextmanager
def counted(trainer: Trainer) -> Iterator[Counter[bool]]:
    """Within it, network evaluations are counted, by whether they have a gradient."""
    model: Any = trainer.policy.model
    calls, predict = Counter[bool](), model.predict

    def counting(x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        predicted: torch.Tensor = predict(x, t, condition)
        calls[predicted.requires_grad] += len(x)
        return predicted

    model.predict = counting
    try:
        yield calls
    finally:
        del model.predict


def take(calls: Counter[bool]) -> Calls:
    """What was counted, and is now counted from nothing."""
    found = Calls(calls[False], calls[True])
    calls.clear()
    return found


# ---------------------------------------------------------------------------------------------- bare calls


def bare_call(trainer: Trainer, batch: int, learning: bool, rounded: bool) -> None:
    """A call of the network on random latents, with its LoRA and its backward pass, or without either."""
    import torch

    policy = trainer.policy
    model: Any = policy.model
    device = model.device
    x, t = torch.randn(batch, *model.state_shape, device=device), torch.full((batch,), 0.5, device=device)
    condition = torch.zeros(batch, dtype=torch.long)
    if learning:
        model.predict(x, t, condition).square().mean().backward()
        model.module.zero_grad()
        return
    dtype = policy.rollout_dtype if rounded else None
    with torch.no_grad(), model.reference(), torch.autocast(device.type, dtype, enabled=dtype is not None):
        model.predict(x, t, condition)


def bare_seconds(trainer: Trainer, calls: Calls, guided: int, repeats: int, phase: str) -> float:
    """Seconds of as many evaluations at the batch of the phase: the median call's, times how many there are."""
    from condrl.training.clock import seconds

    train = trainer.config.train
    batch = guided * (train.rollout_batch if phase == "rollout" else train.loss_batch)
    total = 0.0
    for learning, count in enumerate(calls):
        if count:
            works = [
                seconds(lambda: bare_call(trainer, batch, bool(learning), phase == "rollout"))  # noqa: B023
                for _ in range(repeats + 1)
            ]
            total += statistics.median(works[1:] or works) * count / batch
    return total


def flops(trainer: Trainer) -> tuple[float, float]:
    """Floating-point operations of an evaluation of one image, without and with a backward pass.

    Those of matrix products, convolutions and attention, also where they are done twice to save memory.
    """
    from torch.utils.flop_counter import FlopCounterMode

    found = []
    for learning in (False, True):
        with FlopCounterMode(display=False, custom_mapping=attention_on_a_cpu() | product_in_nf4()) as counter:
            bare_call(trainer, 1, learning, rounded=False)
        found.append(float(counter.get_total_flops()))
    return found[0], found[1]


def attention_on_a_cpu() -> dict[Any, Callable[..., int]]:
    """What torch does not count: two products forward, and five backward."""
    import torch

    def forward(q: Any, k: Any, v: Any, *rest: Any, **options: Any) -> int:
        (b, h, n, d), m, e = q, k[-2], v[-1]
        return 2 * b * h * n * m * (d + e)

    def backward(grad: Any, q: Any, k: Any, v: Any, *rest: Any, **options: Any) -> int:
        (b, h, n, d), m, e = q, k[-2], v[-1]
        return 2 * b * h * n * m * (3 * d + 2 * e)

    name = "_scaled_dot_product_flash_attention_for_cpu"
    return {getattr(torch.ops.aten, name): forward, getattr(torch.ops.aten, f"{name}_backward"): backward}


def product_in_nf4() -> dict[Any, Callable[..., int]]:
    """Likewise, of bitsandbytes where it is loaded: a product with weights of 4 bits, forward alone."""
    import torch

    def forward(x: Any, packed: Any, shape: Any, *rest: Any, **options: Any) -> int:
        return 2 * math.prod(x) * shape[0]  # (outputs, inputs)

    product = getattr(torch.ops.bitsandbytes, "gemm_4bit", None)
    return {product: forward} if product is not None else {}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of the fastest of some products of large matrices."""
    import torch

    from condrl.training.clock import seconds

    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / min(seconds(lambda: a @ b) for _ in range(10))


# ---------------------------------------------------------------------------------------------- what is shown


def compared(works: list[Work], bare: float, cost: tuple[float, float], peak: float) -> dict[str, float]:
    """A phase beside the bare calls that it needs."""
    took, count = statistics.median(work.seconds for work in works), works[-1].samples
    done = sum(number * each for number, each in zip(works[-1].calls, cost, strict=True))
    return {
        "per_second": count / took,
        "bare_per_second": count / bare,
        "of_bare": bare / took,
        "of_peak": done / took / peak,
        "seconds": took,
        "plain_calls": works[-1].calls.plain,
        "learning_calls": works[-1].calls.learning,
    }


def table(found: dict[str, Any]) -> list[str]:
    """What was measured, in lines."""
    height, width = found["pixels"]
    rounded = f", roll-outs in {found['rollout_dtype']}" if found["rollout_dtype"] else ""
    dtype = f"{found['quantize']} and {found['dtype']}" if found["quantize"] else found["dtype"]
    lines = [
        f"{found['model']}: {found['weights']:,} weights in {dtype}{rounded}, {width} x {height} pixels, "
        f"batch {found['batch']}, {found['steps']} steps, guidance {found['guidance']:g}, {found['algorithm']}",
        f"on {found['device']}: {found['peak_tflops']:.3g} TFLOP/s at its peak, {found['peak_memory_gb']:.2f} GB taken",
        f"{'':<10}{'a second':>12}{'bare calls':>12}{'of bare':>10}{'of peak':>10}",
    ]
    for who, name in (("rollout", "roll-out"), ("update", "update")):
        row = found[who]
        numbers = (
            f"{row['per_second']:>12.4g}{row['bare_per_second']:>12.4g}{row['of_bare']:>10.2f}{row['of_peak']:>10.2f}"
        )
        lines.append(f"{name:<10}{numbers}  {'images' if who == 'rollout' else 'pairs of image and step'}")
    return lines
