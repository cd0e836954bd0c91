"""Reproduce the tables and figures of Gao, Zha and Zhou 2024, beside the paper's numbers and the lower bound.

    python scripts/research/reproduce_q_learning.py table3 --seeds 3  q-learning, DPOK, DDPO from a good model
    python scripts/research/reproduce_q_learning.py ours              the same rewards, nearer to the bound
    python scripts/research/reproduce_q_learning.py conditional       Algorithm 2: one Swiss roll per prompt
    python scripts/research/reproduce_q_learning.py figures           densities for beta 0, .1 and 1; scatter plots
    python scripts/research/reproduce_q_learning.py all               all of it
    python scripts/research/reproduce_q_learning.py report            write docs/q_learning.md from what --json holds
    python scripts/research/reproduce_q_learning.py all --quick       a short rehearsal: one seed, few episodes

Every trained network is kept under --work, so that a run that was stopped resumes with what is missing. The rows
of the tables are written to --json as they come, the figures beside it.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from condrl.commands.console import exit_code
from condrl.diffusion.rollout import rollout
from condrl.errors import UsageError
from condrl.io.records import write_json
from condrl.loading import load_config
from condrl.prompts import load_prompts
from condrl.rewards.scoring import score
from condrl.toys.datasets import make_dataset
from condrl.toys.divergence import knn_kl
from condrl.training.build import make_trainer
from condrl.training.checkpoint import newest_checkpoint
from condrl.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results" / "q_learning.json"
PAGE = ROOT / "docs" / "q_learning.md"
CONFIGS = ROOT / "configs" / "paper"
BATCHES, POINTS = 100, 300  # for the KL and its interval, as in the paper
DATA_REWARD = 0.444  # of the data itself
CLOSE = 0.01  # how near a reward must be to the one that a row asks for
SIMULATORS = {"SDE": ("euler_maruyama", 1.0), "ODE-Euler": ("euler_maruyama", 0.0), "DDIM": ("ddim", 0.0)}

# (algorithm, setting, reward asked for) -> (reward, KL) that the paper prints
TABLES: dict[str, dict[tuple[str, str, float | None], tuple[float | None, float | None]]] = {
    "table3": {
        ("pretrained", "A", None): (0.52, 0.17),
        ("ddpo", "A", None): (1.00, 2.97),
        **{("dpok", "A", r): (r, kl) for r, kl in ((0.7, 0.21), (0.8, 0.38), (0.9, 0.69))},
        **{("q_learning", "A", r): (r, kl) for r, kl in ((0.7, 0.29), (0.8, 0.39), (0.9, 0.66))},
    },
    "table4": {
        ("pretrained", "B", None): (0.55, 0.68),
        **{("dpok", "B", r): (r, kl) for r, kl in ((0.7, 0.90), (0.8, 1.03), (0.9, 1.21))},
        **{("q_learning", "B", r): (r, kl) for r, kl in ((0.7, 0.30), (0.8, 0.42), (0.9, 0.64))},
    },
    "table5": {
        ("q_learning", f"{simulator} {steps}", None): result
        for simulator, results in {
            "DDIM": ((0.44, 0.14), (0.45, 0.15), (0.46, 0.72)),
            "ODE-Euler": ((0.44, 0.11), (0.44, 0.23), (0.44, 0.56)),
            "SDE": ((0.45, 0.18), (0.46, 0.35), (0.46, 0.83)),
        }.items()
        for steps, result in zip((50, 10, 5), results, strict=True)
    },
    "table6": {
        ("q_learning", f"{simulator} {steps}", 0.8): (0.8, kl)
        for simulator, kls in {
            "DDIM": (0.50, 0.61, 1.22),
            "ODE-Euler": (0.62, 0.72, 1.07),
            "SDE": (0.24, 0.77, 1.29),
        }.items()
        for steps, kl in zip((50, 10, 5), kls, strict=True)
    },
    "ours": {
        ("pretrained", "ours", None): (0.52, 0.17),
        **{("q_learning", "ours", r): (r, kl) for r, kl in ((0.7, 0.29), (0.8, 0.39), (0.9, 0.66))},
    },
    "conditional": {("q_learning", prompt, 0.8): (None, None) for prompt in ("upright", "turned")},
}
TARGETS = (0.7, 0.8, 0.9)
NAMES = {"pretrained": "pretrained", "ddpo": "DDPO", "dpok": "DPOK", "q_learning": "q-learning"}
TITLES = {
    "table3": "Table 3: from the good model A",
    "table4": "Table 4: from the bad model B",
    "table5": "Table 5: simulators and steps, beta = 0",
    "table6": "Table 6: simulators and steps, reward .8",
    "ours": "Ours: nearer to the bound",
    "conditional": "Algorithm 2: the prompt selects the roll and the rectangle",
}
HEAD = """# Reward-directed q-learning, reproduced

`python scripts/research/reproduce_q_learning.py all` makes these tables (Gao, Zha and Zhou 2024), `report` this page.
KL is that of the generated points to the data, by nearest neighbours (k = 1, 100 batches of 300 against 300 fresh
points); intervals are 95 %, over seeds (Student's t) where there are several, else over batches. No method can have
a KL below the bound at its reward. An episode is a batch of 300 trajectories. The paper leaves the roll's scale,
the rectangle and the diffusion open: ours are in `configs/paper/`, chosen so that the data's own reward is the
paper's. Its bad model B had 30,000 episodes; here 3,000 give the KL that it reports. Where fewer than the paper's
50,000 episodes were run, the last column says so.
"""
NOTES = {  # below the titles
    "table5": "Each continues from A with its own simulator; the paper's are trained from scratch.\n",
    "table6": "Each continues from the model of Table 5.\n",
    "ours": """What changed: each step starts at a noised data point and learns from the score given that point
(`algorithm.score=paired`), less what does not depend on the action; the network adds to the score of a Gaussian as wide
as the data (`model.preconditioned`); exploration is a fifth, steps are 50, and the learning rate falls from 6e-3 to 0
(the value's from 2e-3): `configs/paper/swiss_roll_paired.yaml`. An episode is 300 steps at each time. The first row has
learned the data's distribution from scratch, and the others start from it, for the same number of episodes.
""",
}
FIGURES = """## Figures

The line's density for three weights of the reward, and 1,000 points of the rolls of `ours`, with the data
(`python scripts/research/reproduce_q_learning.py figures`).

![densities for beta 0, .1 and 1](results/q_learning_densities.png)

![Swiss rolls](results/q_learning_rolls.png)
"""
Row = dict[str, Any]  # of the results
Run = dict[str, Any]  # a Measured, with its seed and episodes


@dataclass(frozen=True)
class Cell:
    """Where a result stands in the tables."""

    table: str
    algorithm: str
    setting: str
    target: float | None  # the reward asked for

    @classmethod
    def of(cls, row: Row) -> Cell:
        return cls(*(row[name] for name in ("table", "algorithm", "setting", "target")))

    @property
    def key(self) -> tuple[str, str, float | None]:
        return self.algorithm, self.setting, self.target


@dataclass(frozen=True)
class Spec:
    """A network to train."""

    algorithm: str
    seed: int
    episodes: int
    weight: float = 0.0  # of the reward against the divergence: beta; for dpok 2 / kappa
    simulator: str = "SDE"
    steps: int = 20
    start: Spec | None = None  # the network to start from
    config: str = "swiss_roll"  # of configs/paper

    def folder(self, work: Path) -> Path:
        text = json.dumps(asdict(self), sort_keys=True)
        return work / f"{self.algorithm}_{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def overrides(self, work: Path) -> list[str]:
        """The config file and what differs from it."""
        sampler, eta = SIMULATORS[self.simulator]
        overrides = [
            str(CONFIGS / f"{self.config}.yaml"),
            f"sampler.name={sampler}",
            f"sampler.eta={eta}",
            f"sampler.steps={self.steps}",
        ]
        overrides += [f"run.dir={self.folder(work)}", "run.overwrite=true", f"run.seed={self.seed}"]
        overrides += [f"model.seed={self.seed}", f"train.epochs={self.episodes}", f"algorithm.name={self.algorithm}"]
        if self.start:
            overrides.append(f"model.weights={self.start.folder(work)}")
        if self.algorithm == "q_learning":
            return [*overrides, f"algorithm.beta={self.weight}"]
        kappa = 2 / self.weight if self.weight else 0.0
        return [
            *overrides,
            f"algorithm.kappa={kappa}",
            "algorithm.normalise=false",
            f"train.loss_batch={300 * self.steps}",
        ]


def trained(spec: Spec, work: Path) -> Trainer:
    """The spec's network; trained now unless it was before, or is now by another process."""
    folder = spec.folder(work)
    if spec.start:
        trained(spec.start, work)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return loaded_or_trained(spec, folder, work)


def loaded_or_trained(spec: Spec, folder: Path, work: Path) -> Trainer:
    config = load_config(spec.overrides(work))
    torch.manual_seed(spec.seed)
    trainer = make_trainer(config, load_prompts(config.prompts.train, "prompts.train"))
    if (folder / "done.json").exists():
        trainer.policy.model.load_adapter(folder)
        return trainer
    if checkpoint := newest_checkpoint(folder / "checkpoints"):
        trainer.load_state_dict(checkpoint[1])
    else:
        (folder / "metrics.jsonl").unlink(missing_ok=True)
    trainer.fit()
    trainer.policy.model.save_adapter(folder)
    write_json(folder / "done.json", asdict(spec))
    return trainer


@dataclass(frozen=True)
class Measured:
    """What a policy's samples are like: mean actions, batches of 300 against 300 fresh points of the data."""

    reward: float
    kl: float
    ci95: float  # half-width for the KL, over batches
    weight: float


def measure(trainer: Trainer, weight: float, prompt: int = 0) -> Measured:
    """The policy's reward and KL for a prompt, from new noise and new data."""
    rows = [trainer.rows[prompt]] * (BATCHES * POINTS)
    x, data = generated(trainer, prompt, len(rows)), fresh_data(trainer, prompt, len(rows))
    kls = [knn_kl(a, b, 1) for a, b in zip(x.split(POINTS), data.split(POINTS), strict=True)]
    reward = score(trainer.rewards, x, rows).total.mean().item()
    return Measured(reward, statistics.mean(kls), 1.96 * statistics.stdev(kls) / len(kls) ** 0.5, weight)


def generated(trainer: Trainer, prompt: int, count: int) -> Tensor:
    """Samples (count, d) of the policy's mean actions."""
    condition = trainer.policy.model.encode([trainer.rows[prompt].prompt] * count)
    return rollout(trainer.policy, condition, torch.Generator().manual_seed(10_000_000), count).samples


def fresh_data(trainer: Trainer, prompt: int, count: int) -> Tensor:
    """Points (count, d) of the data's distribution that no training has seen."""
    name = trainer.rows[prompt].prompt
    return make_dataset(name, trainer.config.model["data"][name], count, torch.Generator().manual_seed(10_000_001))


def at_reward(spec: Spec, target: float, work: Path, tries: int, guess: float | None) -> Measured:
    """The measurement at the weight whose reward is nearest to `target`, found by secant steps in the logit.

    For p* the logit of the reward is affine in the weight, with slope 1/2 (docs/theory.md 12).
    """
    found: list[Measured] = []
    weight = guess or 2 * (logit(target) - logit(DATA_REWARD))
    for _ in range(tries):
        found.append(measure(trained(replace(spec, weight=weight), work), weight))
        if abs(found[-1].reward - target) < CLOSE:
            break
        weight = next_weight(found, target)
    return min(found, key=lambda m: abs(m.reward - target))


def next_weight(found: Sequence[Measured], target: float) -> float:
    """Where the line through the two measurements nearest to the target meets it; with one, a line of slope 1/2."""
    nearest = sorted(found, key=lambda m: abs(m.reward - target))[:2]
    slope = 0.5
    if len(nearest) == 2 and nearest[0].weight != nearest[1].weight:
        rise = logit(nearest[0].reward) - logit(nearest[1].reward)
        slope = min(max(rise / (nearest[0].weight - nearest[1].weight), 0.1), 2.0)
    return max(0.01, nearest[0].weight + (logit(target) - logit(nearest[0].reward)) / slope)


def logit(p: float) -> float:
    p = min(max(p, 1e-3), 1 - 1e-3)
    return math.log(p / (1 - p))


def lower_bound(reward: float, data: float = DATA_REWARD) -> float:
    """The least KL to the data at which an indicator has this mean (docs/theory.md 12)."""
    parts = ((reward, data), (1 - reward, 1 - data))
    return sum(p * math.log(p / q) for p, q in parts if p > 0)


def spec_of(cell: Cell, seed: int, args: argparse.Namespace) -> Spec:
    """The network behind a cell of a table, whose weight is still to be found where the cell asks for a reward."""
    good = Spec("q_learning", seed, args.episodes)
    if cell.table in ("table5", "table6"):
        simulator, steps = cell.setting.rsplit(" ", 1)
        free = replace(good, episodes=args.simulator_episodes, simulator=simulator, steps=int(steps), start=good)
        return free if cell.table == "table5" else replace(free, episodes=args.q_episodes, start=free)
    if cell.table == "ours":
        distribution = Spec("q_learning", seed, args.ours_episodes, steps=50, config="swiss_roll_paired")
        return distribution if cell.target is None else replace(distribution, start=distribution)
    if cell.table == "conditional":  # one weight, p*'s for the reward asked for: both prompts in one run
        weight = 2 * (logit(0.8) - logit(DATA_REWARD))
        return replace(good, episodes=args.scratch_episodes, weight=weight, config="conditional")
    start = good if cell.setting == "A" else replace(good, episodes=args.bad_episodes)
    if cell.algorithm == "pretrained":
        return start
    episodes = args.q_episodes if cell.algorithm == "q_learning" else args.tuning_episodes
    return Spec(cell.algorithm, seed, episodes, start=start)


def job(cell: Cell, spec: Spec, guess: float | None, args: argparse.Namespace) -> Measured:
    """Train what a cell needs for one seed, and measure it."""
    torch.set_num_threads(1)
    if cell.target is None:
        return measure(trained(spec, args.work), 0.0)
    if cell.table == "conditional":
        trainer = trained(spec, args.work)
        prompts = [row.prompt for row in trainer.rows]
        return measure(trainer, spec.weight, prompts.index(cell.setting))
    return at_reward(spec, cell.target, args.work, args.tries, guess)


def row_of(cell: Cell, runs: Sequence[Run]) -> Row:
    """A row of the results: means over seeds; the interval is over seeds where there are several, else over batches."""
    paper_reward, paper_kl = TABLES[cell.table][cell.key]
    reward, kl = (statistics.mean(run[name] for run in runs) for name in ("reward", "kl"))
    spread = [run["kl"] for run in runs]
    return {
        "table": cell.table,
        "algorithm": cell.algorithm,
        "setting": cell.setting,
        "target": cell.target,
        "reward": reward,
        "kl": kl,
        "ci95": half_width(spread) if len(spread) > 1 else runs[0]["ci95"],
        "paper_reward": paper_reward,
        "paper_kl": paper_kl,
        "bound": lower_bound(reward),
        "seeds": len(runs),
        "runs": sorted(runs, key=lambda run: run["seed"]),
    }


def half_width(values: Sequence[float]) -> float:
    """Of the 95 % interval of their mean (Student's t)."""
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(len(values), 1.96)
    return t * statistics.stdev(values) / len(values) ** 0.5


def tables(names: Sequence[str], args: argparse.Namespace) -> None:
    """Print the rows of the tables as they are done; what --json already holds is not repeated."""
    cells = [Cell(table, *key) for table in TABLES for key in TABLES[table]]
    held = {Cell.of(row): row["runs"] for row in rows_of(args.json)}
    known: dict[Cell, list[Run]] = {cell: held.get(cell, []) for cell in cells}
    chosen = [cell for cell in cells if cell.table in names and (not args.settings or cell.setting in args.settings)]
    if not chosen:
        settings = ", ".join(sorted({repr(cell.setting) for cell in cells if cell.table in names}))
        raise UsageError(f"--settings: none of {', '.join(args.settings)} is one of {settings}")
    with ProcessPoolExecutor(args.jobs) as pool:
        futures: dict[Future[Measured], tuple[Cell, Spec]] = {}
        for cell in chosen:
            runs = known[cell]
            guess = statistics.mean(run["weight"] for run in runs) if runs and cell.target else None
            for spec in (spec_of(cell, seed, args) for seed in range(args.seeds)):
                if not any((run["seed"], run["episodes"]) == (spec.seed, spec.episodes) for run in runs):
                    futures[pool.submit(job, cell, spec, guess, args)] = cell, spec
        for future in as_completed(futures):
            cell, spec = futures[future]
            run = {"seed": spec.seed, "episodes": spec.episodes, **asdict(future.result())}
            known[cell] = [r for r in known[cell] if r["seed"] != spec.seed] + [run]
            print(line_of(row_of(cell, known[cell])), flush=True)
            write_json(args.json, [row_of(cell, runs) for cell, runs in known.items() if runs])


def rows_of(results: Path) -> list[Row]:
    rows: list[Row] = json.loads(results.read_text("utf-8")) if results.exists() else []
    return rows


# ---------------------------------------------------------------------------------------------- figures


def figures(args: argparse.Namespace) -> None:
    """Write densities on the line for three weights, and the Swiss rolls of `ours`, with the data.

    Raises: UsageError when the results have no rows of `ours`.
    """
    from matplotlib import pyplot as plt

    ours = [row for row in rows_of(args.json) if row["table"] == "ours"]
    if not ours:
        raise UsageError(f"{args.json} has no rows of `ours`: run `reproduce_q_learning.py ours` first")
    figure, axes = plt.subplots(figsize=(6, 4))
    for beta in (0.0, 0.1, 1.0):
        trainer = trained(Spec("q_learning", 0, args.scratch_episodes, weight=beta, config="mixture"), args.work)
        x = generated(trainer, 0, 30_000)[:, 0]
        axes.hist(x.numpy(), bins=200, range=(-8, 8), density=True, histtype="step", label=f"beta {beta:g}")
    axes.hist(
        fresh_data(trainer, 0, 30_000)[:, 0].numpy(), bins=200, range=(-8, 8), density=True, alpha=0.3, label="data"
    )
    axes.set_xlabel("x")
    axes.legend()
    figure.savefig(args.json.with_name("q_learning_densities.png"), dpi=120, bbox_inches="tight")

    figure, panels = plt.subplots(1, len(ours) + 1, figsize=(3.5 * len(ours) + 3.5, 3.6), sharex=True, sharey=True)
    for panel, row in zip(panels[1:], ours, strict=True):
        run = row["runs"][0]
        given = argparse.Namespace(**{**vars(args), "ours_episodes": run["episodes"]})
        trainer = trained(replace(spec_of(Cell.of(row), run["seed"], given), weight=run["weight"]), args.work)
        panel.scatter(*generated(trainer, 0, 1000).T, s=3)
        panel.set_title(f"beta {run['weight']:.2f}, reward {run['reward']:.2f}")
    panels[0].scatter(*fresh_data(trainer, 0, 1000).T, s=3)
    panels[0].set_title("data")
    figure.savefig(args.json.with_name("q_learning_rolls.png"), dpi=120, bbox_inches="tight")


# ---------------------------------------------------------------------------------------------- report


def report(rows: Sequence[Row]) -> str:
    """The page of the tables and of what they say about the paper's claims."""
    parts = [HEAD]
    if older := dict.fromkeys(
        TITLES[row["table"]] for row in rows if any(run.get("normaliser") for run in row["runs"])
    ):
        parts.append(f"Trained by an earlier version, with the paper's normaliser in q: {'; '.join(older)}.\n")
    for table in TABLES:
        of_table = [row for row in rows if row["table"] == table]
        parts += [f"## {TITLES[table]}\n", *([NOTES[table]] if table in NOTES else [])]
        parts += [table_of(of_table) if of_table else "Not measured yet.\n"]
    parts += ["## The paper's claims\n", "| claim | from the rows above |\n| --- | --- |"]
    parts += [f"| {claim} | {verdict} |" for claim, verdict in claims(rows)]
    return "\n".join([*parts, "", FIGURES])


def table_of(rows: Sequence[Row]) -> str:
    lines = ["| | asked for | reward (paper) | KL (paper) | bound | seeds | episodes |", "|" + " --- |" * 7]
    for row in rows:
        asked = "" if row["target"] is None else f"{row['target']:.1f}"
        episodes = ", ".join(sorted({f"{run['episodes']:,}" for run in row["runs"]}))
        paper = ["" if row[name] is None else f" ({row[name]:.2f})" for name in ("paper_reward", "paper_kl")]
        lines.append(
            f"| {NAMES[row['algorithm']]}, {row['setting']} | {asked} | {row['reward']:.2f}{paper[0]} | "
            f"{row['kl']:.2f} +- {row['ci95']:.2f}{paper[1]} | {row['bound']:.2f} | {row['seeds']} | {episodes} |"
        )
    return "\n".join(lines) + "\n"


def claims(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """What the paper claims, and whether the rows say so.

    A KL counts at the reward that was asked for: it is moved there along the lower bound.
    """
    known = {(r["table"], r["algorithm"], r["setting"], r["target"]): r for r in rows}

    def kl(table: str, algorithm: str, setting: str, target: float | None) -> float:
        row = known[table, algorithm, setting, target]
        moved = 0.0 if target is None else lower_bound(target) - lower_bound(row["reward"])
        return float(row["kl"] + moved)

    def each(values: Sequence[bool], texts: Sequence[str]) -> str:
        return ("true: " if all(values) else "false: ") + ", ".join(texts)

    def over_optimises() -> str:
        row = known["table3", "ddpo", "A", None]
        return each([row["reward"] > 0.98 and row["kl"] >= 1.5], [f"reward {row['reward']:.2f}, KL {row['kl']:.2f}"])

    def alike() -> str:
        both = [(kl("table3", "dpok", "A", r), kl("table3", "q_learning", "A", r)) for r in TARGETS]
        return each([abs(a - b) <= 0.15 for a, b in both], [f"{a:.2f} and {b:.2f}" for a, b in both])

    def half() -> str:
        both = [(kl("table4", "dpok", "B", r), kl("table4", "q_learning", "B", r)) for r in TARGETS]
        return each([b <= a / 2 for a, b in both], [f"{b:.2f} of {a:.2f}" for a, b in both])

    def better_than_b() -> str:
        own = kl("table4", "pretrained", "B", None)
        found = [kl("table4", "q_learning", "B", r) for r in TARGETS]
        return each([value < own for value in found], [f"{value:.2f}" for value in found]) + f", B itself {own:.2f}"

    def ordered(table: str, target: float | None) -> str:
        texts, same = [], []
        for steps in (50, 10, 5):
            ours = {s: kl(table, "q_learning", f"{s} {steps}", target) for s in SIMULATORS}
            paper = {s: known[table, "q_learning", f"{s} {steps}", target]["paper_kl"] for s in SIMULATORS}
            order, theirs = (sorted(found, key=found.__getitem__) for found in (ours, paper))
            same.append(order == theirs)
            texts.append(f"{steps} steps: {' < '.join(order)}" + ("" if same[-1] else f" (paper {' < '.join(theirs)})"))
        return each(same, texts)

    def recovers() -> str:
        row = known["table3", "pretrained", "A", None]
        recovered = row["kl"] - row["ci95"] <= 0.17 and abs(row["reward"] - DATA_REWARD) < 0.03
        return each(
            [recovered], [f"KL {row['kl']:.2f} (paper .17), reward {row['reward']:.2f} (data {DATA_REWARD:.2f})"]
        )

    def no_worse() -> str:
        cells = [("table3", "A", r) for r in TARGETS] + [("table4", "B", r) for r in TARGETS]
        rows = [(kl(t, "q_learning", s, r), known[t, "q_learning", s, r]) for t, s, r in cells]
        as_low = [value <= row["paper_kl"] + row["ci95"] for value, row in rows]
        return each(as_low, [f"{row['setting']} {value:.2f} ({row['paper_kl']:.2f})" for value, row in rows])

    def halfway() -> str:
        rows = [(kl("ours", "q_learning", "ours", r), r, known["ours", "q_learning", "ours", r]) for r in TARGETS]
        most = [lower_bound(r) + (row["paper_kl"] - lower_bound(r)) / 2 for _, r, row in rows]
        texts = [f"{value:.2f} (at most {limit:.2f})" for (value, _, _), limit in zip(rows, most, strict=True)]
        return each([value <= limit for (value, _, _), limit in zip(rows, most, strict=True)], texts)

    checks: list[tuple[str, Callable[[], str]]] = [
        ("DDPO over-optimises: reward to 1, KL at least 1.5", over_optimises),
        ("from A, DPOK and q-learning are within .15 KL of each other", alike),
        ("from B, q-learning's KL is at most half of DPOK's", half),
        ("and below that of B itself", better_than_b),
        ("the simulators' order in Table 5", lambda: ordered("table5", None)),
        ("the simulators' order in Table 6", lambda: ordered("table6", 0.8)),
        ("beta = 0 recovers the distribution of the data", recovers),
        ("(ours) q-learning's KL is no higher than the paper's and our interval", no_worse),
        ("(ours) half the paper's distance to the bound", halfway),
    ]
    return [(claim, _or_missing(check)) for claim, check in checks]


def _or_missing(check: Callable[[], str]) -> str:
    try:
        return check()
    except KeyError as error:
        return f"not measured yet: {' '.join(str(part) for part in error.args[0])}"


def line_of(row: Row) -> str:
    reward, kl = ("" if row[name] is None else f"paper {row[name]:.2f}, " for name in ("paper_reward", "paper_kl"))
    return (
        f"{row['table']}  {row['algorithm']:<10} {row['setting']:<12} reward {row['reward']:.2f} "
        f"({reward}asked for {row['target']})  KL {row['kl']:.2f} +- {row['ci95']:.2f} ({kl}bound {row['bound']:.2f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*TABLES, "figures", "report", "all"])
    parser.add_argument("--quick", action="store_true", help="a rehearsal: one seed, few episodes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--episodes", type=int, default=50_000)
    parser.add_argument("--bad-episodes", type=int, default=3_000, help="of the bad model B; the paper took 30000")
    parser.add_argument("--q-episodes", type=int, default=50_000, help="of q-learning from a pretrained model")
    parser.add_argument("--scratch-episodes", type=int, default=50_000, help="of conditional and the line's figure")
    parser.add_argument("--simulator-episodes", type=int, default=2_000, help="of table5's models, from A")
    parser.add_argument("--ours-episodes", type=int, default=3_000, help="of ours, for the distribution and from it")
    parser.add_argument("--tuning-episodes", type=int, default=3_000, help="of DDPO and DPOK")
    parser.add_argument(
        "--settings", nargs="+", help="of the tables, the rows to make: A, 'SDE 50', upright; default all"
    )
    parser.add_argument("--tries", type=int, default=4, help="weights tried for a row that asks for a reward")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "q_learning", help="where networks are kept")
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.tries = 1, 2
        args.json = args.work / "quick.json" if args.json == RESULTS else args.json
        args.episodes = args.scratch_episodes = 400
        args.q_episodes, args.bad_episodes = 200, 150
        args.tuning_episodes = args.ours_episodes = args.simulator_episodes = 100
    chosen = [name for name in TABLES if args.what in (name, "all")]
    if chosen:
        tables(chosen, args)
    if args.what in ("figures", "all"):
        figures(args)
    if args.what in ("report", "all"):
        page = PAGE if args.json == RESULTS else args.json.with_suffix(".md")
        page.write_text(report(rows_of(args.json)), "utf-8")


if __name__ == "__main__":
    sys.exit(exit_code(main))
