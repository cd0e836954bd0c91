"""The first held-out pictures of a run whose prompt is obeyed by base or tuned alone, as README.md shows them.

condrl finetune quickstart run.seed=0 run.threads=1 evaluate.pictures=512
python scripts/research/changed_pictures.py runs/quickstart docs/before_after.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from condrl.io.records import from_json
from condrl.rewards.pixels import from_pil
from condrl.training.pictures import save_comparison

MEASURE, PAIRS = "shapes_exact", 8


def main(run: Path, out: Path) -> None:
    lines = [from_json(line) for line in (run / "heldout.jsonl").read_text("utf-8").splitlines()]
    changed = [line for line in lines if line["base"][MEASURE] != line["tuned"][MEASURE]]
    better = sum(line["tuned"][MEASURE] > line["base"][MEASURE] for line in changed)
    print(f"{len(changed)} of {len(lines)} changed: {better} better, {len(changed) - better} worse")
    shown = [line for line in changed if line.get("pictures")][:PAIRS]
    base, tuned = ([from_pil(Image.open(run / line["pictures"][who])) for line in shown] for who in ("base", "tuned"))
    before, after = ([f"{MEASURE} {line[who][MEASURE]:g}" for line in shown] for who in ("base", "tuned"))
    save_comparison(out, base, tuned, [line["prompt"] for line in shown], list(zip(before, after, strict=True)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
