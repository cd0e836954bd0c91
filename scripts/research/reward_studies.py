"""Tune the embedded pipeline on the embedded CLIP, alone and against another reward, and see what it does.

    python scripts/research/reward_studies.py clip       on CLIP alone: does it obey better, or cheat?
    python scripts/research/reward_studies.py trade_off  on CLIP and small JPEG files at once, by several weights
    python scripts/research/reward_studies.py all

Runs are kept under --work and resume where they were stopped; docs/results/rewards.json and two plots hold the results.
`key=value` overrides change configs/quickstart.yaml.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from condrl.commands.console import exit_code
from condrl.io.records import write_json
from condrl.loading import load_config
from condrl.toys.plots import axes_of
from condrl.training.resume import check_same_settings

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
RESULTS = ROOT / "docs" / "results" / "rewards.json"
CLIP = ("rewards.shapes.weight=0", "rewards.shapes_exact.weight=0", "rewards.clip.model=asset:shapes_clip")
SHARES = (0.0, 0.25, 0.5, 0.6, 0.75, 1.0)  # of the weight that the JPEG's size has
Row = dict[str, Any]


def tuned(folder: Path, overrides: Sequence[str]) -> tuple[Row, list[Row]]:
    """The result and the record of a run; tuned now unless it was before.

    Raises: UsageError when it was with other settings.
    """
    config = load_config([str(QUICKSTART), *overrides, f"run.dir={folder}"])
    check_same_settings(config, folder / "config.yaml")
    if not (folder / "result.json").exists():
        command = [sys.executable, str(ROOT / "scripts" / "finetune.py"), *overrides]
        subprocess.run([*command, f"run.dir={folder}", "run.resume=auto"], check=True)
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    return json.loads((folder / "result.json").read_text("utf-8")), [json.loads(line) for line in lines]


def clip(args: argparse.Namespace) -> list[Row]:
    """Held-out measures before, during and after tuning on CLIP alone, with the path KL to the base model."""
    rows = []
    for seed in range(args.seeds):
        # the budget is never spent: it is there to be recorded
        frequent = ("evaluate.every=7", "train.kl_budget=1e9", f"run.seed={seed}")
        result, lines = tuned(args.work / f"clip_{seed}", [*CLIP, *frequent, *args.words])
        curve = [  # a line's KL is of the policy before its update, its held-out measures of the one after
            {"epoch": line["epoch"], "kl": after["base_kl"], **heldout(line)}
            for line, after in pairwise(lines)
            if heldout(line)
        ]
        rows.append({"seed": seed, "heldout": result["heldout"], "curve": curve})
        print(f"seed {seed}: {summary(result)}; at the end about {lines[-1]['base_kl']:.1f} nats", flush=True)
    figure, panels = axes_of(1, 3)
    for panel, measure in zip(panels[0], ("clip", "shapes_exact", "shapes"), strict=True):
        for row in rows:
            base = row["heldout"][measure]["base"]["mean"]
            points = [(0.0, base), *((point["kl"], point[measure]) for point in row["curve"])]
            panel.plot(*zip(*points, strict=True), marker="o", label=f"seed {row['seed']}")
        panel.set(title=measure, xlabel="path KL to the base model, nats")
    panels[0][0].legend()
    figure.savefig(args.json.with_name("clip_alone.png"), dpi=110)
    return rows


def heldout(line: Row) -> dict[str, float]:
    """The held-out measures of a line of the record, by name."""
    return {name.removeprefix("heldout/"): value for name, value in line.items() if name.startswith("heldout/")}


def summary(result: Row) -> str:
    measures = result["heldout"].items()
    return ", ".join(f"{name} {m['base']['mean']:.3f} -> {m['tuned']['mean']:.3f}" for name, m in measures)


def trade_off(args: argparse.Namespace) -> list[Row]:
    """Held-out CLIP and JPEG size, tuned on both, each divided by its standard deviation."""
    rows = []
    for share in SHARES:
        weights = [f"rewards.clip.weight={1 - share}", f"rewards.jpeg_compressibility.weight={share}"]
        measures = ["evaluate.measures.jpeg_compressibility={}", "evaluate.measures.clip.model=asset:shapes_clip"]
        overrides = [*CLIP, *weights, *measures, "train.normalise_rewards=true", *args.words]
        result, _ = tuned(args.work / f"share_{share:g}", overrides)
        rows.append({"share": share, "heldout": result["heldout"]})
        print(f"share {share:g}: {summary(result)}", flush=True)
    figure, panels = axes_of(1, 1, 4.0)
    panel, names = panels[0][0], ("jpeg_compressibility", "clip")
    points = [[row["heldout"][name]["tuned"]["mean"] for name in names] for row in rows]
    panel.plot(*zip(*points, strict=True), marker="o", label="tuned")
    panel.plot(*[[rows[0]["heldout"][name]["base"]["mean"]] for name in names], "k*", markersize=12, label="base")
    for row, point in zip(rows, points, strict=True):
        panel.annotate(f"{row['share']:g}", point, textcoords="offset points", xytext=(5, 5))
    panel.set(
        xlabel="minus the JPEG's size, kB", ylabel="CLIP's cosine", title="the share of the weight that the JPEG has"
    )
    panel.legend()
    figure.savefig(args.json.with_name("trade_off.png"), dpi=110)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    studies = {"clip": clip, "trade_off": trade_off}
    parser.add_argument("what", choices=[*studies, "all"])
    parser.add_argument("words", nargs="*", metavar="key=value")
    parser.add_argument("--seeds", type=int, default=3, help="of `clip`")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "reward_studies", help="where runs are kept")
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_intermixed_args()
    known = json.loads(args.json.read_text("utf-8")) if args.json.exists() else {}
    for name, study in studies.items():
        if args.what in (name, "all"):
            args.json.parent.mkdir(parents=True, exist_ok=True)
            known[name] = study(args)
            write_json(args.json, known)


if __name__ == "__main__":
    sys.exit(exit_code(main))
