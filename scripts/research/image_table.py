"""Every algorithm's recipe on the embedded pipelines, at the same budget of network work; for benchmark.py."""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import condrl
from condrl.config import Config
from condrl.io.records import from_json
from condrl.loading import load_config
from condrl.prompts import load_prompts
from condrl.shapes import scenes
from condrl.training.build import make_trainer
from condrl.training.clock import Clock
from condrl.training.evaluate import paired_difference
from condrl.training.trainer import Trainer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
EXACT, GRADED = "shapes_exact", "shapes"
GAINS = (0.05, 0.1)  # of what is obeyed exactly, whose cost is reported
DEPLOYED = {  # what is measured of the recipes of a folder: images by DDPM's steps, or by the ODE
    "shapes": ("evaluate.sampler.steps=10", "evaluate.sampler.eta=1"),
    "shapes_flow": ("evaluate.sampler.name=ddim", "evaluate.sampler.steps=10", "evaluate.sampler.eta=0"),
}


class Work:
    """Counts network calls of one image, 1 for a forward pass, 3 for one with its backward pass, and scored samples."""

    def __init__(self, trainer: Trainer) -> None:
        self.calls = self.units = self.queries = 0
        first, *others = trainer.rewards  # all are asked alike
        ask = first.call

        @functools.wraps(ask)
        def asked(samples: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
            self.queries += len(samples)
            return ask(samples, *rest, **more)

        trainer.rewards = [replace(first, call=asked), *others]
        model: Any = trainer.policy.model
        predict = model.predict

        def counted(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = predict(x, *rest)
            self.calls += len(output)
            self.units += 3 * len(output) if output.requires_grad else len(output)
            return output

        model.predict = counted


def work_of_an_epoch(config: Config) -> Work:
    """What the first epoch of a run needs: the roll-out, and what is learned from it."""
    trainer = make_trainer(config, load_prompts(config.prompts.train, "prompts.train"))
    work = Work(trainer)
    experience = trainer.collect(0, Clock())
    trainer.learner.update(trainer.examples(experience, 0), experience, 0)
    return work


# ---------------------------------------------------------------------------------------------- runs


def recipes(args: argparse.Namespace) -> list[Path]:
    folder = CONFIGS / args.configs
    return [folder / f"{name}.yaml" for name in args.recipes] if args.recipes else sorted(folder.glob("*.yaml"))


def images(_: Config, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run what is missing of every recipe and seed, `--jobs` at a time, and summarise all that is there.

    A seed in the file `--json` is not run again, so that the table can grow over many sessions and folders.
    """
    known: list[dict[str, Any]] = read(args.json) if args.json and args.json.exists() else []
    seeds = {row["recipe"]: {seed["seed"]: seed for seed in row["seeds"]} for row in known}
    runs = [(recipe, seed) for seed in range(args.seeds) for recipe in recipes(args)]
    missing = [(recipe, seed) for recipe, seed in runs if seed not in seeds.get(recipe.stem, {})]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda run: tune(args.folder, run[0], run[1], args.words), missing))
    rows = {row["recipe"]: row for row in known}
    for recipe in recipes(args):
        new = [seed for which, seed in missing if which == recipe]
        if new:
            rows[recipe.stem] = summary(args.folder, recipe, new, seeds.get(recipe.stem, {}), args.words)
    found = sorted(rows.values(), key=lambda row: -row["gain"])
    print(markdown(found), flush=True)
    return found


def tune(folder: Path, recipe: Path, seed: int, words: Iterable[str]) -> None:
    """Tune by a recipe, or continue where that was interrupted, then measure; by one thread."""
    run = folder / f"{recipe.stem}_{seed}"
    own = [f"run.dir={run}", f"run.seed={seed}", "run.threads=1"]
    if not (run / "result.json").exists():
        call("finetune", str(recipe), *words, *own, "run.resume=auto")
    if not (run / "evaluation" / "evaluation.json").exists():
        deployed = DEPLOYED[recipe.parent.name]
        call("evaluate", str(run), "evaluate.images_per_prompt=2", *deployed, "--overwrite")


def call(*words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "condrl", *words], stdout=subprocess.DEVNULL)
    if done.returncode:
        raise condrl.UsageError(f"condrl {' '.join(words)} ended with exit code {done.returncode}")


# ---------------------------------------------------------------------------------------------- summaries


def summary(
    folder: Path, recipe: Path, new: Iterable[int], known: dict[int, dict[str, Any]], words: list[str]
) -> dict[str, Any]:
    """A recipe's row: what its runs gained, new ones and those already known by their seeds, and what that took."""
    with tempfile.TemporaryDirectory() as scratch:
        config = load_config([str(recipe), *words, f"run.dir={scratch}"])
        work = work_of_an_epoch(config)
    seeds = known | {seed: seed_row(folder / f"{recipe.stem}_{seed}", work) | {"seed": seed} for seed in new}
    found = [seeds[seed] for seed in sorted(seeds)]
    gains = [row[EXACT]["difference"]["mean"] for row in found]
    return {
        "recipe": recipe.stem,
        "algorithm": config.algorithm["name"],
        "gain": statistics.mean(gains),
        "lowest": min(row[EXACT]["difference"]["ci95"][0] for row in found),
        "work_per_image": work.units / config.images_per_epoch,
        "queries_per_image": work.queries / config.images_per_epoch,
        "seeds": found,
    }


def seed_row(run: Path, work: Work) -> dict[str, Any]:
    result, evaluation = (read(run / name) for name in ("result.json", "evaluation/evaluation.json"))
    lines = [from_json(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    found, explained = evaluation["evaluations"][0], explained_variance(lines)
    return {
        EXACT: found["heldout"][EXACT],
        GRADED: found["heldout"][GRADED],
        "kinds": by_kind(run / "evaluation" / "evaluation.jsonl"),
        "diversity": found["diversity"],
        "path_kl": next((line["base_kl"] for line in reversed(lines) if "base_kl" in line), found.get("path_kl")),
        "images": result["images"],
        "calls": work.calls * len(lines),
        "work": work.units * len(lines),
        "seconds": result["seconds"],
        "peak_memory_gb": result["peak_memory_gb"],
        "curve": (curve := learning_curve(lines, result["before"], work.units)),
        "cost": {f"+{gain:g}": cost(curve, gain) for gain in GAINS},
        "diagnosis": sorted({name for line in lines for name in line["diagnosis"]}),
        **({"value_explains": explained} if explained else {}),
    }


def explained_variance(lines: list[dict[str, Any]]) -> list[float]:
    """What a value network explained of the returns from each step, at the end of a run; empty without one."""
    names = [name for name in lines[-1] if name.startswith("value_explains/step_")]
    return [statistics.mean(line[name] for line in lines[-10:]) for name in names]


KINDS = ("1 object", "2 objects", "3 objects", "relation")
HEAD = (
    "recipe | exact, mean | by seed | graded | 1 object | 2 | 3 | relation | best | to +.05 | to +.10 "
    "| KL | diversity | images | queries | work | s | GB | diagnosis"
)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of docs/measured.md: means over seeds, but for the gains by seed and costs, which are seed 0's."""
    lines = [f"| {HEAD} |", "| --- " * (HEAD.count("|") + 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(cells(row)) + " |" for row in rows)])


def cells(row: dict[str, Any]) -> list[str]:
    seeds = row["seeds"]

    def mean(value: Callable[[dict[str, Any]], float | None]) -> float | None:
        found = [number for seed in seeds if (number := value(seed)) is not None]
        return statistics.mean(found) if found else None

    def gain(seed: dict[str, Any]) -> str:
        difference = seed[EXACT]["difference"]
        low, high = difference["ci95"]
        return f"{signed(difference['mean'])} [{signed(low)}, {signed(high)}]"

    def of_kind(kind: str) -> float | None:
        return mean(lambda seed: seed["kinds"][kind]["difference"]["mean"] if kind in seed["kinds"] else None)

    kl = mean(lambda seed: seed["path_kl"])
    return [
        f"`{row['recipe']}`",
        signed(row["gain"]),
        ", ".join(map(gain, seeds)),
        signed(mean(lambda seed: seed[GRADED]["difference"]["mean"])),
        *(signed(of_kind(kind)) for kind in KINDS),
        signed(mean(lambda seed: max(point["gain"] for point in seed["curve"]))),
        *(reached(seeds[0]["cost"][f"+{gain:g}"]) for gain in GAINS),
        "-" if kl is None else f"{kl:.0f}",
        f"{mean(lambda seed: seed['diversity']['tuned']['mean'] / seed['diversity']['base']['mean']):.2f}",
        f"{seeds[0]['images']:,}",
        f"{seeds[0]['images'] * row['queries_per_image']:,.0f}",
        f"{seeds[0]['work'] / 1000:.0f}k",
        f"{mean(lambda seed: seed['seconds']):,.0f}",
        f"{mean(lambda seed: seed['peak_memory_gb']):.1f}",
        ", ".join(sorted({name for seed in seeds for name in seed["diagnosis"]})) or "-",
    ]


def signed(number: float | None) -> str:
    return "-" if number is None else f"{number:+.3f}".replace("0.", ".", 1)


def reached(cost: dict[str, float] | None) -> str:
    return f"{cost['images']:,} / {cost['work'] / 1000:.0f}k" if cost else "-"


def read(path: Path) -> Any:
    return from_json(path.read_text("utf-8"))


def by_kind(record: Path) -> dict[str, dict[str, Any]]:
    """What is obeyed exactly, base, tuned and paired, by kind of prompt."""
    base: dict[str, dict[str, list[float]]] = {}
    tuned: dict[str, dict[str, list[float]]] = {}
    for line in map(json.loads, record.read_text("utf-8").splitlines()):
        request = scenes.parse(line["prompt"])
        kind = "relation" if request.relation else f"{len(request.objects)} object{'s' * (len(request.objects) > 1)}"
        for where, who in ((base, "base"), (tuned, "tuned")):
            where.setdefault(kind, {}).setdefault(line["prompt"], []).append(line[who][EXACT])
    found: dict[str, dict[str, Any]] = {}
    for kind in sorted(base):
        b, t = (torch.tensor([statistics.fmean(x) for x in where[kind].values()]) for where in (base, tuned))
        found[kind] = {"prompts": len(b), "base": b.mean().item(), "tuned": t.mean().item()}
        found[kind] |= {"difference": vars(paired_difference(b, t))}
    return found


def learning_curve(lines: list[dict[str, Any]], first: dict[str, float], work: float) -> list[dict[str, Any]]:
    """What validation prompts gained, against images and work."""
    key = f"validation/{EXACT}"
    return [
        {"images": line["images"], "work": work * line["epoch"], "gain": line[key] - first[key]}
        for line in lines
        if key in line
    ]


def cost(curve: list[dict[str, Any]], gain: float) -> dict[str, float] | None:
    """Images and work until the first evaluation with this gain; None where there is none."""
    return next(({k: p[k] for k in ("images", "work")} for p in curve if p["gain"] >= gain), None)


# ---------------------------------------------------------------------------------------------- gradients


def signal(_: Config, args: argparse.Namespace) -> list[dict[str, Any]]:
    """|E g|^2 / Var g of the gradient g that one epoch gives at the base model, with its standard error."""
    rows: list[dict[str, Any]] = []
    for recipe in recipes(args):
        with tempfile.TemporaryDirectory() as scratch:
            found = signal_to_noise(recipe, [*args.words, f"run.dir={scratch}"], args.repeats)
        rows.append({"recipe": recipe.stem, **found})
        an_epoch = f"{found['ratio']:.4f} +- {found['error']:.4f} an epoch of {found['images']} images"
        scale = f"{found['noise_scale']:,.0f}" if found["ratio"] > 0 else "unknown"
        per_work = 1e5 * found["ratio"] / found["work"]
        print(f"{recipe.stem:<20} {an_epoch}, noise scale {scale}, {per_work:.2f} per 100,000 of work", flush=True)
    return rows


def signal_to_noise(recipe: Path, words: Iterable[str], epochs: int) -> dict[str, float]:
    """From the inner products of the gradients of independent epochs, all at the same weights.

    The noise scale is the number of images whose mean gradient is half noise: tr Cov / |E|^2 of one image's (McCandlish
    et al. 2018).
    """
    config = load_config([str(recipe), *words])
    trainer = make_trainer(config, load_prompts(config.prompts.train, "prompts.train"))
    work = Work(trainer)
    gradients = torch.stack([gradient(trainer, epoch) for epoch in range(epochs)])
    ratio, error = ratio_of(gradients)
    images = config.images_per_epoch
    found = {"ratio": ratio, "error": error, "work": work.units / epochs, "epochs": epochs, "images": images}
    return found | {"noise_scale": images / ratio}


def ratio_of(gradients: torch.Tensor) -> tuple[float, float]:
    """|E g|^2 / E |g - E g|^2 of independent draws (n, d), and its standard error by the jackknife."""
    products, every = gradients @ gradients.T, torch.arange(len(gradients))

    def ratio(chosen: torch.Tensor) -> float:
        some = products[chosen][:, chosen]
        squares, count = some.diagonal(), len(chosen)
        mean = (some.sum() - squares.sum()) / (count * (count - 1))  # over pairs of different draws: without bias
        return (mean / (squares.mean() - mean)).item()

    without = torch.tensor([ratio(every[every != left_out]) for left_out in every])
    return ratio(every), ((len(every) - 1) * without.var(correction=0)).sqrt().item()


def gradient(trainer: Trainer, epoch: int) -> torch.Tensor:
    """The gradient of an epoch's whole loss by the trained weights, in one vector."""
    experience, learner = trainer.collect(epoch, Clock()), trainer.learner
    examples = trainer.examples(experience, epoch)
    steps = learner.draw_steps(examples.k, examples.count, torch.Generator().manual_seed(epoch))
    pairs = torch.stack([torch.arange(examples.count)[:, None].expand_as(steps), steps], -1).flatten(0, 1)
    for some in pairs.split(trainer.config.train.loss_batch):
        loss, _ = trainer.algorithm.loss(trainer.policy, examples.at(*some.unbind(1)))
        loss.sum().backward()
    found = torch.cat([weight.grad.flatten() for weight in learner.weights if weight.grad is not None]).double()
    learner.optimizer.zero_grad()
    return found
