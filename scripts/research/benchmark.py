"""Measure condrl itself.

    python scripts/research/benchmark.py overhead    an epoch against the bare UNet calls it needs
    python scripts/research/benchmark.py options     each option for speed or memory, on and off in turn
    python scripts/research/benchmark.py safety      what checkpoints and diagnosis take of an epoch
    python scripts/research/benchmark.py memory      peak memory with 10 and with 40 denoising steps
    python scripts/research/benchmark.py sd15        Stable Diffusion 1.5's full size with random weights
    python scripts/research/benchmark.py rewards     each reward at its published size, as a share of an epoch
    python scripts/research/benchmark.py images      every algorithm's recipe on images, at the same budget
    python scripts/research/benchmark.py signal      the signal-to-noise of each recipe's gradient
    python scripts/research/benchmark.py exact       every algorithm on toys, against the exact optimum
    python scripts/research/benchmark.py anchors     nft's bias against kappa, its stages, its baseline, its epochs
    python scripts/research/benchmark.py transfer    tuned at one noise level, sampled at another, beside the theory
    python scripts/research/benchmark.py steps       tuned with 20 steps, deployed with 8 and 80
    python scripts/research/benchmark.py q_learning  episodes per second, beside a plain loop over steps

`key=value` overrides change configs/quickstart.yaml, the recipes in configs/shapes, or the toys' configs for the last
four. `images` keeps its runs under --folder and resumes them when it is started again; seeds that --json FILE has
are kept and not run again, as are its rows by `exact` and `anchors`.
--json FILE writes what was measured.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from full_size import REWARDS, save_sd15
from image_table import DEPLOYED, images, read, signal
from tqdm import tqdm

from condrl.algorithms.examples import RatioExamples, check_ratios
from condrl.commands import benchmark as command
from condrl.commands.console import exit_code
from condrl.config import Config
from condrl.diffusion.policy import Policy
from condrl.errors import UsageError
from condrl.io.records import write_json
from condrl.loading import load_config
from condrl.prompts import Row as Prompt
from condrl.prompts import load_prompts
from condrl.rewards.scoring import make_reward
from condrl.rewards.scoring import score as score_of
from condrl.toys.exact import means_of, solve
from condrl.toys.oracle import Line
from condrl.training.build import make_sampler, make_trainer
from condrl.training.checks import transfer as transfer_factor
from condrl.training.clock import Clock, seconds
from condrl.training.host import peak_memory_gb, provenance
from condrl.training.preflight import attempt
from condrl.training.trainer import Trainer

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"


def quickstart_trainer(config: Config, prompts: int | None = None) -> Trainer:
    return make_trainer(config, load_prompts(config.prompts.train, "prompts.train")[:prompts])


# ---------------------------------------------------------------------------------------------- overhead


def overhead(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    """Epochs of the trainer, each beside tight loops of the same UNet calls; medians of the ratios.

    The bare roll-out calls the UNet without any LoRA; the bare update calls it with its LoRA, forward and backward,
    and without it as often as the algorithm evaluates the policy that made the images.
    """
    trainer = quickstart_trainer(config)
    model: Any = trainer.policy.model
    images, guided = config.images_per_epoch, 2 if config.model["guidance"] != 1 else 1
    forward_batch = best_batch(trainer, images * guided, train=False)
    backward_batch = best_batch(trainer, images * guided, train=True)
    rounding, rows, counts = trainer.policy.rollout_dtype, [], {}
    for epoch in tqdm(range(args.repeats + 1), desc="epochs"):
        clock, before = Clock(), model.evaluations
        experience = trainer.collect(epoch, clock)
        counts["rollout"], before = model.evaluations - before, model.evaluations
        examples = trainer.examples(experience, epoch)
        clock.lap("examples")
        counts["examples"], before = model.evaluations - before, model.evaluations
        trainer.learner.update(examples, experience, epoch)
        clock.lap("update")
        counts["update"] = model.evaluations - before
        with model.reference():
            bare_rollout = seconds(lambda: bare(trainer, counts["rollout"], forward_batch, train=False, dtype=rounding))
            bare_examples = seconds(lambda: bare(trainer, counts["examples"], forward_batch, train=False))
        bare_update = bare_examples + seconds(lambda: bare(trainer, counts["update"], backward_batch, train=True))
        rows.append({**clock.seconds, "bare_rollout": bare_rollout, "bare_update": bare_update})
        rows[-1]["update"] += rows[-1].pop("examples")
    rows = rows[1:]  # the first warms up
    whole = [row["rollout"] + row["decode"] + row["score"] + row["update"] for row in rows]
    return {
        "rollout_ratio": statistics.median(row["rollout"] / row["bare_rollout"] for row in rows),
        "update_ratio": statistics.median(row["update"] / row["bare_update"] for row in rows),
        "images_per_second": images / statistics.median(whole),
        "rollout_ratios": [row["rollout"] / row["bare_rollout"] for row in rows],
        "update_ratios": [row["update"] / row["bare_update"] for row in rows],
        "seconds": {name: statistics.median(row[name] for row in rows) for name in rows[0]},
        "bare_batch": {"rollout": forward_batch, "update": backward_batch},
        "unet_evaluations": counts,
        "threads": torch.get_num_threads(),
    }


OPTIONS = (
    "train.rollout_dtype=bfloat16",
    "model.dtype=bfloat16",
    "model.memory_format=channels_last",
    "model.memory_format=channels_last train.rollout_dtype=bfloat16",
    "model.attention=_native_flash",
    "model.attention=_native_math",
    "model.gradient_checkpointing=true",
    "model.compile=true",
    "",  # and a LoRA that is not merged into the weights for roll-outs
)


def options(config: Config, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The speed of the roll-outs and updates of `condrl benchmark shapes` with each option, over that without it.

    Epochs are in turn, in one process; of the ratios, the median, the least and the most. Beside them the bytes that a
    trial's backward pass holds of a pair of image and step, without and with the option.
    """
    run, rows = command.settings(command.parse(["shapes", "--batch", "16"]), None), []
    for option in OPTIONS:
        pair = [command.make(load_config([*run, *given, *args.words]), None) for given in ([], option.split())]
        if not option:
            setattr(pair[1].policy.model, "merged", nullcontext)  # noqa: B010
        epochs = [[command.epoch(trainer, number) for trainer in pair] for number in range(args.repeats + 1)][1:]
        row: dict[str, Any] = {"option": option or "a LoRA that is not merged"}
        for phase in ("rollout", "update"):
            ratios = [off[phase].seconds / on[phase].seconds for off, on in epochs]
            row[phase] = [round(f(ratios), 3) for f in (statistics.median, min, max)]
        row["pair_mb"] = [round(attempt(trainer).needs.learn.each / 1e6, 2) for trainer in pair]
        print(row, flush=True)
        rows.append(row)
    return rows


def bare(trainer: Trainer, count: int, batch: int, train: bool, dtype: torch.dtype | None = None) -> None:
    """`count` UNet evaluations in batches, and their backward passes when training; in half precision by `dtype`."""
    model: Any = trainer.policy.model
    x = torch.randn(batch, *model.state_shape, device=model.device).to(model.torch_dtype)
    x = x.contiguous(memory_format=model.layout)
    t = torch.randint(0, 1000, (batch,), device=model.device)
    (embedded,) = model.embeddings(torch.zeros(batch, dtype=torch.long))
    rounded = torch.autocast(model.device.type, dtype, enabled=dtype is not None)
    with torch.set_grad_enabled(train), rounded:
        for start in range(0, count, batch):
            n = min(batch, count - start)
            out = model.module(x[:n], t[:n], embedded[:n]).sample
            if train:
                out.float().sum().backward()
    model.module.zero_grad()


def best_batch(trainer: Trainer, most: int, train: bool) -> int:
    """The batch size, of powers of two up to `most`, with the most UNet evaluations per second."""
    sizes = [size for size in (16, 32, 64, 128, 256) if size <= most] or [most]
    speed = {}
    for size in sizes:
        bare(trainer, size, size, train)
        speed[size] = 256 / min(seconds(functools.partial(bare, trainer, 256, size, train)) for _ in range(2))
    return max(speed, key=lambda size: speed[size])


# ---------------------------------------------------------------------------------------------- safety


def safety(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of an epoch's record with its diagnosis, of the copy kept in case it is stopped, and of a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        config.run.dir = folder
        trainer = quickstart_trainer(config)
        parts: dict[str, list[float]] = {"epoch": [], "diagnosis": [], "copy": [], "checkpoint": []}
        record = trainer.recorder.record

        def timed(*arguments: Any) -> dict[str, Any]:
            begun = time.perf_counter()
            line = record(*arguments)
            parts["diagnosis"].append(time.perf_counter() - begun)
            return line

        vars(trainer.recorder)["record"] = timed
        for number in range(args.repeats + 1):
            parts["epoch"].append(seconds(functools.partial(trainer.run_epoch, number)))
            parts["copy"].append(seconds(lambda: copy.deepcopy(trainer.state_dict())))
            parts["checkpoint"].append(seconds(trainer.checkpoint))
    found = {name: statistics.median(values[1:]) for name, values in parts.items()}
    every = max(1.0, config.run.checkpoint_seconds / found["epoch"])  # epochs between checkpoints
    return found | {"share": (found["diagnosis"] + found["copy"] + found["checkpoint"] / every) / found["epoch"]}


# ---------------------------------------------------------------------------------------------- memory


def memory(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of an epoch, each number of steps in a process of its own."""
    peaks = {}
    for steps in (10, 40):
        command = [sys.executable, __file__, "epoch", *args.words, f"sampler.steps={steps}"]
        command += ["--threads", str(args.threads)] if args.threads else []
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise UsageError(f"the epoch with {steps} steps failed with exit code {done.returncode}")
        peaks[steps] = json.loads(done.stdout.splitlines()[-1])
    stored = peaks[40]["stored_gb"] - peaks[10]["stored_gb"]
    grown = peaks[40]["peak_memory_gb"] - peaks[10]["peak_memory_gb"]
    return {"steps": peaks, "grown_gb": grown, "stored_latents_grown_gb": stored}


def epoch(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    """One epoch's peak memory, for `memory`."""
    trainer = quickstart_trainer(config)
    for number in range(3):
        experience: Any = trainer.collect(number, Clock())
        trainer.learner.update(trainer.examples(experience, number), experience, number)
        stored = experience.rollout.states.nbytes / 1e9
        del experience
    return {"peak_memory_gb": peak_memory_gb(trainer.policy.model.device), "stored_gb": stored}


# ---------------------------------------------------------------------------------------------- full size


def sd15(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    """Stable Diffusion 1.5's own configuration with random weights, saved, loaded, rolled out once and updated once."""
    with tempfile.TemporaryDirectory() as folder:
        save_sd15(Path(folder))
        overrides = [f"model.path={folder}", "rewards.shapes.weight=0", "rewards.jpeg_compressibility.weight=1"]
        small = ["sampler.steps=2", "train.prompts_per_epoch=1", "train.images_per_prompt=2", "train.rollout_batch=1"]
        update = ["train.updates_per_epoch=1", "train.steps=null", "train.steps_per_image=1", "train.loss_batch=1"]
        overrides += ["model.gradient_checkpointing=true", *small, *update, *args.words]
        config = load_config([str(QUICKSTART), *overrides])
        loading = time.perf_counter()
        trainer = quickstart_trainer(config, prompts=4)
    clock = Clock()
    loaded = clock.last - loading
    experience = trainer.collect(0, clock)
    examples = trainer.examples(experience, 0)
    if isinstance(examples, RatioExamples):
        check_ratios(examples, trainer.policy, config.train.loss_batch)
    clock.lap("check")
    metrics = trainer.learner.update(examples, experience, 0)
    clock.lap("update")
    weights = sum(p.numel() for p in trainer.policy.model.module.parameters())
    return {
        "peak_memory_gb": peak_memory_gb(trainer.policy.model.device),
        "unet_weights": weights,
        "seconds": {"load": loaded, **clock.seconds},
        "grad_norm": metrics["grad_norm"],
        "network_calls": trainer.policy.model.evaluations,
        "settings": overrides[1:],
    }


RECIPES = {  # of an epoch, for each image: UNet calls to roll out, and to learn from, forward and backward
    "50 guided steps, all trained": (100, 100),
    "configs/quickstart.yaml": (10, 2),  # 10 steps without guidance, two draws of nft
}


def rewards(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds for an image of 512 x 512 by each reward at its published size, as shares of epochs at SD 1.5's size."""
    costs = {}
    for name in tqdm(
        REWARDS, desc="rewards"
    ):  # before this process is large: a new one's peak begins with its parent's
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            costs[name] = process.submit(reward_cost, name, args.repeats, torch.get_num_threads()).result()
    call, both, decode = seconds_of_unet(args)
    for name, own in costs.items():
        for recipe, (calls, passes) in RECIPES.items():
            own[recipe] = own["seconds"] / (own["seconds"] + calls * call + passes * both + decode)
        shares = ", ".join(f"{own[recipe]:.2%} of {recipe}" for recipe in RECIPES)
        tqdm.write(f"{name:<24} {own['seconds']:.3f} s an image, {own['peak_memory_gb']:.1f} GB: {shares}")
    return {"unet_call": call, "unet_call_and_backward": both, "decode": decode, "rewards": costs}


def seconds_of_unet(args: argparse.Namespace) -> tuple[float, float, float]:
    """Of one call for one image of Stable Diffusion 1.5, of one with its backward pass, and of decoding the image."""
    with tempfile.TemporaryDirectory() as folder:
        save_sd15(Path(folder))
        overrides = [f"model.path={folder}", "model.gradient_checkpointing=true", *args.words]
        model = quickstart_trainer(load_config([str(QUICKSTART), *overrides]), prompts=1).policy.model
    condition, x, t = torch.zeros(1, dtype=torch.long), torch.randn(1, *model.state_shape), torch.full((1,), 0.5)
    x, t = x.to(model.device), t.to(model.device)

    def median(work: Callable[[], Any]) -> float:
        return statistics.median(seconds(work) for _ in range(args.repeats))

    with torch.no_grad():
        call, decode = median(lambda: model.score(x, t, condition)), median(lambda: model.decode(x))
    return call, median(lambda: model.score(x, t, condition).square().sum().backward()), decode


def reward_cost(name: str, repeats: int, threads: int) -> dict[str, Any]:
    """A reward's seconds for an image, and this process's peak memory."""
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        with ProcessPoolExecutor(1, get_context("spawn")) as other:  # so that its memory does not count
            options = other.submit(REWARDS[name], Path(folder)).result()
        reward = make_reward(name, options)
        x, rows = torch.rand(4, 3, 512, 512, device=device), [Prompt(i, f"a cat of {i} colours") for i in range(4)]
        with torch.no_grad():
            reward(x, rows)  # loads the model and encodes the prompts
            times = [seconds(lambda: reward(x, rows)) / len(rows) for _ in range(repeats)]
    return {"seconds": statistics.median(times), "peak_memory_gb": peak_memory_gb(device)}


# ---------------------------------------------------------------------------------------------- toys

TOYS = Path(__file__).resolve().parents[2] / "configs" / "toy"
ANCHORED = [  # nft with kappa alone
    f"algorithm.{option}"
    for option in ("temperature=0", "normalise=false", "adaptive=false", "draws=8", "times=[0.008,0.99]")
]
ALGORITHMS: dict[str, list[str]] = {  # that have a kappa and learn from rewards, with what one wants on a toy
    "reinforce": [],
    "ddpo": [],
    "dpok": [],
    "grpo": ["algorithm.clip_range=0.2"],  # its own is for tens of thousands of dimensions
    "ctrl": [],
    "draft": [],
    "alignprop": [],
    "adjoint_matching": [],
    "log_variance": [],
    "feynman_kac": [],
    "nft": [*ANCHORED, "algorithm.stages=2"],
    "rwr": [],
    "d3po": [],
    "online_dpo": ["algorithm.draws=16", "train.lr=5e-4", "sampler.name=exponential"],  # whose bounds are exact
}
Row = dict[str, Any]
ANCHORS: list[Row] = [  # lengthened: each stage has as many epochs as a run of one stage, not 1 / stages of them
    {"kappa": kappa, "stages": stages, "baseline": baseline, "lengthened": lengthened}
    for kappa, baseline, every, lengthened in (
        (0.5, "group", (2, 4), True),
        (0.5, "value", (2, 4), True),
        (0.5, "group", (1, 2, 4), False),
        (0.5, "value", (1, 4), False),
        (0.25, "group", (1, 2, 4), False),
        (1.0, "group", (1, 2, 4), False),
    )
    for stages in every
]


def toy_trainer(problem: str, overrides: list[str]) -> Trainer:
    """A toy's trainer with a folder of its own for what it records."""
    folder = tempfile.mkdtemp(prefix="condrl_toy_")
    config = load_config([str(TOYS / f"{problem}.yaml"), f"run.dir={folder}", *overrides])
    torch.manual_seed(config.run.seed)
    return make_trainer(config, load_prompts(config.prompts.train, "prompts.train"))


def exact(config: Config, args: argparse.Namespace) -> list[Row]:
    """Rows of algorithm x problem x seed: how much of the gap to the best possible objective was closed.

    Rows of the file `--json` stay, and are not run again unless by other options.
    """
    rows: list[Row] = read(args.json) if args.json and args.json.exists() else []
    known = {key_of(row) for row in rows}
    for problem, algorithm, seed in itertools.product(args.problems, args.algorithms, range(args.seeds)):
        words = [*ALGORITHMS.get(algorithm, []), *args.words]
        row = {"algorithm": algorithm, "problem": problem, "seed": seed, "words": words}
        if key_of(row) in known:
            continue
        overrides = [f"algorithm.name={algorithm}", "algorithm.kappa=0.5", f"run.seed={seed}", *words]
        row |= {**gap(problem, overrides), "revision": provenance()["revision"]}
        keep(rows, row, f"{algorithm:<16} {problem} seed {seed}", args)
    print(markdown(rows), flush=True)
    return rows


def key_of(row: Row) -> tuple[Any, ...]:
    """What tells two rows of `exact` apart."""
    return (row["algorithm"], row["problem"], row["seed"], *row["words"])


def markdown(rows: list[Row]) -> str:
    """The table of docs/measured.md: the range of the gap closed over seeds, and the mean KL to p*, by problem."""
    problems = ("g1", "m1", "p1")
    heads = [f"{problem.upper()}: gap closed | KL to p*" for problem in problems]
    lines = [f"| algorithm | seeds | {' | '.join(heads)} |", "| --- " * 8 + "|"]
    for algorithm in ALGORITHMS:
        own = [row for row in rows if row["algorithm"] == algorithm and row["words"] == ALGORITHMS[algorithm]]
        cells = [cell for problem in problems for cell in cells_of([row for row in own if row["problem"] == problem])]
        lines.append(f"| `{algorithm}` | {len({row['seed'] for row in own})} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cells_of(rows: list[Row]) -> tuple[str, str]:
    """The range of what rows closed, and their mean KL to the optimum; dashes without rows."""
    if not rows:
        return "-", "-"
    closed = [row["gap_closed"] for row in rows]
    low, high = thousandths(min(closed)), thousandths(max(closed))
    kl = thousandths(statistics.fmean(row["kl_to_optimum"] for row in rows))
    return low if low == high else f"{low} to {high}", kl


def thousandths(number: float) -> str:
    return f"{number:.3f}".replace("0.", ".", 1) if abs(number) < 0.9995 else f"{number:.3f}"


def keep(rows: list[Row], row: Row, label: str, args: argparse.Namespace) -> None:
    """Add what `gap` found to the rows, print it, and write all so far."""
    rows.append(row)
    print(
        f"{label}  gap closed {row['gap_closed']:.4f}  KL to p* {row['kl_to_optimum']:.4f}  "
        f"{row['reward_queries']} queries  {row['seconds']:.0f} s",
        flush=True,
    )
    if args.json:
        write_json(args.json, rows)


def anchors(config: Config, args: argparse.Namespace) -> list[Row]:
    """Rows of seed x problem x ANCHORS: how near nft with a kappa comes to the best possible objective.

    Rows of the file `--json` stay, and are not run again unless by other options.
    """
    rows: list[Row] = read(args.json) if args.json and args.json.exists() else []
    known = {anchor_of(row) for row in rows}
    for seed, problem, chosen in itertools.product(range(args.seeds), args.problems, ANCHORS):
        row = {"problem": problem, **chosen, "seed": seed, "words": args.words}
        if anchor_of(row) in known:
            continue
        options = [f"algorithm.{name}={chosen[name]}" for name in ("kappa", "stages", "baseline")]
        overrides = ["algorithm.name=nft", *ANCHORED, *options, f"run.seed={seed}", *args.words]
        if chosen["lengthened"]:
            epochs = load_config([str(TOYS / f"{problem}.yaml"), *args.words]).train.epochs
            overrides.append(f"train.epochs={epochs * chosen['stages']}")
        row |= {**gap(problem, overrides), "revision": provenance()["revision"]}
        keep(rows, row, f"{problem} {chosen} seed {seed}", args)
    print(anchors_markdown(rows), flush=True)
    return rows


def anchor_of(row: Row) -> tuple[Any, ...]:
    """What tells two rows of `anchors` apart."""
    return (row["problem"], *(row[name] for name in ANCHORS[0]), row["seed"], *row["words"])


def anchors_markdown(rows: list[Row]) -> str:
    """The table of docs/measured.md: the range of the gap closed over seeds, by anchor and problem."""
    problems = ("g1", "m1", "p1")
    lines = [f"| kappa | stages | baseline | epochs | {' | '.join(p.upper() for p in problems)} |", "| --- " * 7 + "|"]
    for chosen in sorted(ANCHORS, key=lambda anchor: (anchor["kappa"], *list(anchor.values())[2:], anchor["stages"])):
        own = [row for row in rows if not row["words"] and chosen.items() <= row.items()]
        cells = [cells_of([row for row in own if row["problem"] == problem])[0] for problem in problems]
        epochs = "for each stage" if chosen["lengthened"] else "in all"
        lines.append(
            f"| {chosen['kappa']:g} | {chosen['stages']} | {chosen['baseline']} | {epochs} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def gap(problem: str, overrides: list[str]) -> Row:
    """Tune a toy and audit it."""
    trainer = toy_trainer(problem, overrides)
    solved = solve(trainer.policy, trainer.rows, trainer.rewards, trainer.config.algorithm["kappa"])
    tuning = seconds(trainer.fit)
    audits = solved.audit(trainer.policy)
    return {
        "gap_closed": solved.gap_closed(audits),
        "kl_to_optimum": solved.kl_to_optimum(audits),
        "reward_queries": trainer.images,
        "seconds": tuning,
        "optimum": solved.optimum,
        "pretrained": solved.pretrained,
        "objective": sum(audit.objective for audit in audits) / len(audits),
    }


def transfer(config: Config, args: argparse.Namespace) -> list[Row]:
    """Tune N(1, .49) on r = .9 x at one (eta, N), sample at another (eta', M): shifts of the mean, over b v / kappa.

    Beside them the theory's M(eta, eta') (1 - rho_T^(eta^2 + eta'^2)), exact for infinite N and M (docs/theory.md 7).
    """
    rows: list[Row] = []
    for eta in (0.5, 1.0, 1.4):
        overrides = ["algorithm.kappa=0.5", "rewards.quadratic.curvature=[0]", f"sampler.eta={eta}", *args.words]
        trainer = toy_trainer("g1", overrides)
        trainer.fit()
        schedule = trainer.policy.model.schedule
        alpha, sigma = (c(torch.tensor(schedule.end)).item() for c in (schedule.alpha, schedule.sigma))
        rho = alpha * 0.7 / (alpha**2 * 0.49 + sigma**2) ** 0.5
        for deployed_eta, count in itertools.product((0.0, 0.5, 1.0), sorted({trainer.policy.steps, 1000})):
            theory = transfer_factor(eta, deployed_eta) * (1 - rho ** (eta**2 + deployed_eta**2))
            row = {"eta": eta, "steps": trainer.policy.steps, "deployed_eta": deployed_eta, "deployed_steps": count}
            row |= {"shift": shift(trainer, deployed_eta, count), "theory": theory}
            print(
                f"eta {eta} with {row['steps']} steps -> eta {deployed_eta} with {count}: "
                f"shift {row['shift']:.3f}, theory {row['theory']:.3f}",
                flush=True,
            )
            rows.append(row)
    return rows


def shift(trainer: Trainer, eta: float, count: int) -> float:
    """How far a tuned Gaussian's mean moves under a sampler of another noise level and step count, over b v / kappa."""
    model, line, row = trainer.policy.model, Line(-9, 9, 1000), trainer.rows[0]
    section = {**trainer.config.sampler, "steps": count, "eta": eta}
    sampler = make_sampler(section, model.schedule)
    policy = Policy(model, sampler)
    assert sampler.affine is not None
    tuned = means_of(policy, line, row)
    with model.reference():
        base = means_of(policy, line, row)
    ends = []
    for means in (tuned, base):
        masses = line.masses(-line.x.square() / (2 * model.schedule.prior_std**2))
        for mean, std in zip(means, sampler.affine.S.tolist(), strict=True):
            masses = line.push(masses, mean, std)
        ends.append((masses * line.x).sum().item())
    return (ends[0] - ends[1]) / (0.9 * 0.49 / trainer.config.algorithm["kappa"])


def steps(config: Config, args: argparse.Namespace) -> list[Row]:
    """Tune M1 with 20 steps, deploy with 8, 20 and 80: the gap each closes in the chain that it is deployed with."""
    rows: list[Row] = []
    for algorithm, seed in itertools.product(args.algorithms, range(args.seeds)):
        overrides = [f"algorithm.name={algorithm}", "algorithm.kappa=0.5", "sampler.steps=20", f"run.seed={seed}"]
        trainer = toy_trainer("m1", [*overrides, *ALGORITHMS.get(algorithm, []), *args.words])
        trainer.fit()
        for count in (8, 20, 80):
            section = {**trainer.config.sampler, "steps": count}
            policy = Policy(trainer.policy.model, make_sampler(section, trainer.policy.model.schedule))
            solved = solve(policy, trainer.rows, trainer.rewards, 0.5)
            audits = solved.audit(policy)
            row = {"algorithm": algorithm, "seed": seed, "steps": 20, "deployed_steps": count}
            rows.append(row | {"gap_closed": solved.gap_closed(audits), "reward": audits[0].reward})
            print(f"{algorithm:<16} seed {seed}  20 -> {count:<3} gap closed {rows[-1]['gap_closed']:.4f}", flush=True)
    return rows


# ---------------------------------------------------------------------------------------------- q-learning


def q_learning(config: Config, args: argparse.Namespace) -> list[Row]:
    """Batches of episodes per second of configs/paper/swiss_roll.yaml: the trainer's, and a plain loop's, by turns."""
    config = load_config([str(TOYS.parent / "paper" / "swiss_roll.yaml"), f"run.dir={tempfile.mkdtemp()}", *args.words])
    trainer = make_trainer(config, load_prompts(config.prompts.train, "prompts.train"))
    plain = PlainLoop(trainer)
    trainer.run_epoch(0)
    plain()
    ours, theirs = [], []
    for _ in range(args.repeats):
        ours.append(seconds(lambda: repeat(lambda: trainer.run_epoch(trainer.epoch), 20)) / 20)
        theirs.append(seconds(lambda: repeat(plain, 5)) / 5)
    ratios = [slow / fast for slow, fast in zip(theirs, ours, strict=True)]
    row: Row = {"batches_per_second": 1 / statistics.median(ours), "batch": plain.batch}
    row |= {"plain_batches_per_second": 1 / statistics.median(theirs)}
    row |= {"ratio": statistics.median(ratios), "ratios": [min(ratios), max(ratios)]}
    print(json.dumps(row))
    return [row]


def repeat(work: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        work()


class PlainLoop:
    """Algorithm 1 of Gao et al. 2024 as one would first write it: step by step, all pairs of states and points."""

    def __init__(self, trainer: Trainer) -> None:
        self.policy, self.algorithm, self.rewards = trainer.policy, trainer.algorithm, trainer.rewards
        self.row, self.batch = trainer.rows[0], trainer.config.train.images_per_prompt
        self.parameters = [*trainer.learner.weights, *self.algorithm.networks()["value"].module.parameters()]
        self.optimizer = torch.optim.Adam(self.parameters, 1e-3)

    def __call__(self) -> None:
        """One update from one batch of episodes."""
        model: Any = self.policy.model
        algorithm: Any = self.algorithm
        sampler: Any = self.policy.sampler
        times, schedule = sampler.times, model.schedule
        condition = torch.zeros(self.batch, dtype=torch.long)
        features, loss = model.features(condition), torch.zeros(())
        y = schedule.prior_std * torch.randn(self.batch, 2)
        for k in range(self.policy.steps):
            t, step = times[k].expand(self.batch), (times[k] - times[k + 1]).item()
            g2, alpha, sigma = (f(times[k]).item() for f in (schedule.g2, schedule.alpha, schedule.sigma))
            mean = model.score(y, t, condition)
            action = (mean + (algorithm.temperature / (2 * g2)) ** 0.5 * torch.randn_like(y)).detach()
            points = model.data[0][torch.randint(len(model.data[0]), (self.batch, algorithm.samples))]
            log_density = -(y[:, None] - alpha * points).square().sum(2) / (2 * sigma**2)
            score = (alpha * (log_density.softmax(1)[..., None] * points).sum(1) - y) / sigma**2
            running = -g2 * (score - action).square().sum(1)
            q = -g2 * (action - mean).square().sum(1)
            later = sampler.A[k] * y + sampler.B[k] * action + sampler.S[k] * torch.randn_like(y)
            later = later.float()
            value = algorithm.value(y, t, features)
            with torch.no_grad():
                if k == self.policy.steps - 1:
                    rows = [self.row] * self.batch
                    ahead = algorithm.beta * score_of(self.rewards, later, rows).total
                else:
                    ahead = algorithm.value(later, times[k + 1].expand(self.batch), features)
            loss = loss + (ahead + running * step - value - q * step).square().mean() / 2
            y = later
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


OWN_CONFIGS = (options, images, signal, exact, anchors, transfer, steps, q_learning)  # not the quickstart's


MEASURES: dict[str, Any] = {f.__name__: f for f in (overhead, safety, memory, epoch, sd15, rewards, *OWN_CONFIGS)}


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=MEASURES)
    parser.add_argument("words", nargs="*", metavar="key=value")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--repeats", type=int, default=5, help="measured epochs")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument(
        "--problems", type=lambda s: s.split(","), default=["g1", "m1", "p1"], help="toys of `exact` and `anchors`"
    )
    parser.add_argument(
        "--algorithms", type=lambda s: s.split(","), default=list(ALGORITHMS), help="of `exact`, such as dpok,ctrl"
    )
    parser.add_argument("--seeds", type=int, default=1, help="seeds of `exact`, `anchors`, `steps`, `images`")
    parser.add_argument("--recipes", nargs="+", metavar="NAME", help="of `images` and `signal`; by default all")
    parser.add_argument("--configs", choices=sorted(DEPLOYED), default="shapes", help="the folder of those recipes")
    parser.add_argument("--folder", type=Path, default=Path("runs/images"), help="where `images` keeps its runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs of `images` side by side")
    return parser.parse_intermixed_args(words)


def main() -> None:
    args = parse(sys.argv[1:])
    if args.threads:
        torch.set_num_threads(args.threads)
    has_own_config = MEASURES[args.what] in OWN_CONFIGS
    found: Any = MEASURES[args.what](load_config([str(QUICKSTART), *([] if has_own_config else args.words)]), args)
    if args.json:
        write_json(args.json, found if has_own_config else {**found, **provenance()})
    if not has_own_config:
        print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(exit_code(main))
