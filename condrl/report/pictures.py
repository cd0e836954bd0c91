"""The pictures of a page: pairs of base and tuned, and one seed over a run."""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from condrl.report.charts import spaced
from condrl.report.html import figure, region
from condrl.report.run import Line, Run, records
from condrl.report.usage import drawing

WHOS = ("base", "tuned")
EXACT_PIXELS = 96  # of the longer side of pictures that are kept exactly


@dataclass(frozen=True)
class Room:
    """How much the pictures of a run may take of a page."""

    pixels: int = 256  # of a picture's longer side
    pairs: int = 8  # of each kind
    frames: int = 12  # of a film strip


def room_for(runs: int) -> Room:
    """Less for each run, the more there are, so that a page stays small enough to be mailed."""
    share = runs**-0.5
    return Room(max(96, int(256 * share)), max(2, int(8 * share)), max(4, int(12 * share)))


# ---------------------------------------------------------------------------------------------- pairs


def pictures(run: Run, room: Room, is_hacked: bool, level: int) -> str:
    """The worst regressions and the best gains of those that were drawn, then the first prompts."""
    kinds = pair_kinds(run, room.pairs, is_hacked)
    parts = "".join(
        f'<h{level}>{title}</h{level}><div class="pairs">{"".join(pair(run, line, room) for line in lines)}</div>'
        for title, lines in kinds.items()
        if lines
    )
    again = f"<p>To draw a pair again: <code>{escape(drawing(run))} --seeds SEED --compare</code></p>"
    return again + parts if parts else ""


def pair_kinds(run: Run, most: int, is_hacked: bool) -> dict[str, list[Line]]:
    """The lines to show, by the title above them.

    Of a hacked run, those that lost most in what was not rewarded come first, and none of these is among the gains.
    """
    drawn = [line for line in run.images if line.get("pictures")]
    unrewarded = [name for line in drawn[:1] for name in line["base"] if name not in run.rewards] if is_hacked else []
    order = sorted(drawn, key=lambda line: (gain(run, line, unrewarded), gain(run, line)))
    worse = [line for line in order if gain(run, line, unrewarded) < 0 or gain(run, line) < 0]
    better = sorted((line for line in order if gain(run, line) > 0 and line not in worse), key=lambda x: -gain(run, x))
    worse, better = worse[:most], better[:most]
    others = [line for line in drawn if line not in worse and line not in better][:most]
    return {"Worst regressions": worse, "Best gains": better, "Others, in the prompts' order": others}


def gain(run: Run, line: Line, names: Collection[str] | None = None) -> float:
    """What an image gained in all measures, or in some, each in units of its spread; lower is better where so tuned."""
    values = [(name, b, line["tuned"].get(name)) for name, b in line["base"].items() if names is None or name in names]
    return sum(run.sign(name) * (t - b) / run.spread(name) for name, b, t in values if b is not None and t is not None)


def pair(run: Run, line: Line, room: Room) -> str:
    images = "".join(picture(run.folder / line["pictures"][who], f"{who}: {line['prompt']}", room) for who in WHOS)
    changes = [moved(run, line, name) for name in line["base"]]
    scores = "; ".join(f'<span class="{tone}">{escape(text)}</span>' for tone, text in changes)
    return (
        f'<div class="pair"><div>{images}</div><p>{escape(line["prompt"])}</p><p>{scores}</p>{cost(run, line)}'
        f"<p>seed {line['seed']}</p></div>"
    )


def moved(run: Run, line: Line, name: str) -> tuple[str, str]:
    """Whether a measure of an image got better, up, or worse, down, and how it moved."""
    base, tuned = line["base"][name], line["tuned"].get(name)
    if base is None or tuned is None:
        return "", f"{name} not measured"
    if figure(base) == figure(tuned):
        return "", f"{name} {figure(base)}, unchanged"
    tone = "up" if run.sign(name) * (tuned - base) > 0 else "down"
    return tone, f"{name} {'rose' if tuned > base else 'fell'} from {figure(base)} to {figure(tuned)}"


def cost(run: Run, line: Line) -> str:
    """Says so where an image gained at the cost of what was not rewarded."""
    lost = [name for name in line["base"] if name not in run.rewards and moved(run, line, name)[0] == "down"]
    if not lost or gain(run, line) <= 0:
        return ""
    names, verb = escape(" and ".join(lost)), "was" if len(lost) == 1 else "were"
    return f'<p class="down">Not a plain gain: it came at the cost of {names}, which {verb} not rewarded.</p>'


# ---------------------------------------------------------------------------------------------- films


def film(run: Run, room: Room) -> str:
    """The same prompts and seeds at each evaluation."""
    strips: dict[int, list[Path]] = defaultdict(list)
    for file in sorted((run.folder / "film").glob("epoch_[0-9]*_[0-9]*.png")):
        strips[int(file.stem.split("_")[2])].append(file)
    return "".join(strip(run, number, files, room) for number, files in sorted(strips.items()))


def strip(run: Run, number: int, files: Sequence[Path], room: Room) -> str:
    shown = {epoch_of(files[i]): files[i] for i in spaced(len(files), room.frames)}
    lines = {epoch: evaluated(run, epoch, number) for epoch in shown}
    what = next((str(line["prompt"]) for line in lines.values() if line), f"evaluated image {number + 1}")
    frames = "".join(
        f"<figure>{picture(file, f'{what}, epoch {epoch}', room)}<span>epoch {epoch}{scores(lines[epoch])}</span>"
        "</figure>"
        for epoch, file in shown.items()
    )
    return f'<p>{escape(what)}</p><div class="film"{region(what)}>{frames}</div>'


def evaluated(run: Run, epoch: int, number: int) -> Line:
    """What was measured of an image after an epoch; empty where the run kept nothing of it."""
    return next(iter(records(run.folder / "evaluations" / f"epoch_{epoch:05d}.jsonl")[number : number + 1]), {})


def scores(line: Line) -> str:
    found = [f"{name} {figure(value)}" for name, value in line.get("measures", {}).items()]
    return escape(": " + ", ".join(found) if found else "")


def epoch_of(file: Path) -> int:
    return int(file.stem.split("_")[1])


# ---------------------------------------------------------------------------------------------- files


def picture(path: Path, text: str, room: Room) -> str:
    return f'<img src="{embedded(path, room.pixels)}" alt="{escape(text, quote=True)}">'


def embedded(path: Path, most: int = Room.pixels) -> str:
    """A picture as text within the page, no larger than needed; empty where there is none that can be read."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
    except OSError:
        return ""
    kind = "png" if max(small.size) <= EXACT_PIXELS else "jpeg"
    small.thumbnail((most, most))
    content = io.BytesIO()
    small.save(content, kind, quality=85)  # a png is exact
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
