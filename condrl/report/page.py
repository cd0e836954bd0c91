"""The page: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from condrl.errors import naming
from condrl.io.files import locate
from condrl.models.loading import hub_id
from condrl.report.charts import Chart, Mark, Series, number
from condrl.report.run import Finding, Line, Run, change, interval, verdict
from condrl.report.usage import base_model, diffusers_code, readers, single_file_config

OPENING = "<!doctype html>\n<!-- condrl report -->\n"
MOST_PIXELS = 256  # of a picture's longer side
SHOWN = 8  # pairs of pictures of each kind
FILM = 12  # pictures of a film strip

STYLE = Path(__file__).with_name("style.css")


def write_report(runs: Sequence[Run], path: Path) -> None:
    """Write the page of one run, or of several beside each other.

    Raises: RunError when the file cannot be written.
    """
    content = page(runs)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, "utf-8")


def page(runs: Sequence[Run]) -> str:
    """The HTML of the page."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    body = "".join(run_part(run, "h1" if len(runs) == 1 else "h2") for run in runs)
    if len(runs) > 1:
        body = f"<h1>{len(runs)} runs</h1>{table_of(runs)}{section('Reward and KL', frontier(runs))}{body}"
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} · condrl</title><style>{STYLE.read_text('utf-8')}</style>"
    )
    return f'{OPENING}<html lang="en"><head>{head}</head><body><main>{body}</main></body></html>\n'


def run_part(run: Run, heading: str) -> str:
    findings = run.findings()
    found = verdict(run, findings)
    tone = {"better": "good", "worse": "bad", "hacked": "bad", "collapsed": "bad"}.get(found.word, "")
    tuned_on = ", ".join(f"{name} (weight {weight:g})" for name, weight in run.rewards.items()) or "no reward"
    algorithm, model = (run.config.get(kind) or {} for kind in ("algorithm", "model"))
    config = escape(yaml.safe_dump(run.config, sort_keys=False))
    told = f"{algorithm.get('name')} on {model.get('path') or model.get('name')}, tuned on {tuned_on}"
    parts = [
        f"<{heading}>{escape(run.name)}</{heading}><p>{escape(told)}</p>",
        f'<div class="verdict {tone}" role="status"><strong>{found.word}</strong>. {escape(found.sentence)}</div>',
        section("What went wrong", diagnoses(findings)),
        section("Held-out prompts, base and tuned from the same noise", measures(run)),
        section("Its course", f'<div class="charts">{charts(run, findings)}</div>'),
        section("Base | tuned", pictures(run)),
        section("One seed over the run", film(run)),
        section("Use it", usage(run)),
        section("What it took", costs(run)),
        f"<details><summary>The resolved config</summary><pre>{config}</pre></details>",
    ]
    return "".join(parts)


def section(title: str, content: str) -> str:
    """Empty where there is nothing to show."""
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content.strip() else ""


# ---------------------------------------------------------------------------------------------- text


def diagnoses(findings: Sequence[Finding]) -> str:
    rows = "".join(
        f"<li>epoch {f.epoch}{'' if f.lasting else ', no longer at the end'}: {escape(f.text)}</li>" for f in findings
    )
    return f"<ol>{rows}</ol>" if rows else ""


def measures(run: Run) -> str:
    rows = (run.result or {}).get("heldout") or {}
    if not rows:
        return ""
    body = "".join(measure_row(run, name, row) for name, row in rows.items())
    best = (run.result or {}).get("best") or {}
    note = ""
    if best.get("heldout"):
        of = "; ".join(f"{name} {change(row)}" for name, row in best["heldout"].items())
        note = (
            f"<p>Best on validation prompts: epoch {best['epoch']}, in lora_best/. On held-out ones {escape(of)}.</p>"
        )
    head = "<tr><th>measure</th><th>base</th><th>tuned</th><th>difference, 95 %</th><th>wins</th><th>rewarded</th></tr>"
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>{note}'


def measure_row(run: Run, name: str, row: dict[str, Any]) -> str:
    difference = figure(row["difference"]["mean"], "+") + interval(row)
    tone = {1: "up", -1: "down", 0: ""}[run.gained(name, row)]
    won = row.get("win_rate")  # None where no pair was scored
    wins = "" if won is None else f"{won if run.sign(name) > 0 else 1 - won:.0%}"
    rewarded = ("yes" if run.sign(name) > 0 else "yes, lower") if name in run.rewards else "no"
    base, tuned = (figure(row[who]["mean"]) for who in ("base", "tuned"))
    return (
        f'<tr><td>{escape(name)}</td><td>{base}</td><td>{tuned}</td><td class="{tone}">{difference}</td>'
        f"<td>{wins}</td><td>{rewarded}</td></tr>"
    )


def figure(value: float | None, sign: str = "") -> str:
    return "not measured" if value is None else f"{value:{sign}z.3f}"


def usage(run: Run) -> str:
    """How to load the LoRA; empty before there is one."""
    if not (run.folder / "lora" / "pytorch_lora_weights.safetensors").is_file():
        return ""
    config = single_file_config(run)
    where = config if config is None or hub_id(config) else str(locate(config))
    code = diffusers_code(run, str(locate(base_model(run))), str(run.folder.resolve() / "lora"), where)
    return (
        f"<p>condrl: <code>condrl sample {escape(str(run.folder))} --prompt &quot;...&quot;</code></p>"
        f"<p>diffusers:</p><pre>{escape(code)}</pre><p>{readers(run)}: copy "
        "<code>lora/comfyui_lora.safetensors</code> to their folder of LoRAs; strength 1 is what was tuned.</p>"
    )


def costs(run: Run) -> str:
    result, last = run.result or {}, run.lines[-1] if run.lines else {}
    seconds = sum(v for line in run.timings for k, v in line.items() if k.startswith("seconds/"))
    facts = {
        "epochs": len(run.lines),
        "images": result.get("images", last.get("images")),
        "network calls": result.get("network_calls", last.get("network_calls")),
        "seconds": result.get("seconds", round(seconds, 1)),
        "peak memory, GB": result.get("peak_memory_gb"),
        "processes": result.get("processes"),
        "seed": result.get("seed"),
        "revision": result.get("revision"),
        "versions": ", ".join(f"{name} {version}" for name, version in (result.get("versions") or {}).items()),
    }
    rows = "".join(f"<tr><th>{k}</th><td>{escape(fact(v))}</td></tr>" for k, v in facts.items() if v not in (None, ""))
    return f'<div class="scroll"><table>{rows}</table></div>'


def fact(value: Any) -> str:
    return f"{value:,.0f}" if isinstance(value, float) and value == int(value) else str(value)


# ---------------------------------------------------------------------------------------------- charts


def charts(run: Run, findings: Sequence[Finding]) -> str:
    marks = [
        Mark(epoch, ", ".join(str(i) for i, f in enumerate(findings, 1) if f.epoch == epoch))
        for epoch in dict.fromkeys(f.epoch for f in findings)
    ]
    rewards = [name for name in run.rewards if run.series(f"reward/{name}")]
    drawn = [Chart("Reward of the images it learned from", [Series("total", run.series("reward/total"))], marks=marks)]
    if len(rewards) > 1:
        each = [Series(name, run.series(f"reward/{name}")) for name in rewards]
        drawn.append(Chart("Each reward", each, marks=marks))
    drawn += [Chart(name, [measured(run, name)], marks=marks) for name in run.measures]
    for title, name in (
        ("Path KL to the base model, nats", "base_kl"),
        ("Path KL in the objective, nats", "path_kl"),
        ("How a prompt's images differ", "diversity"),
        ("Norm of the gradient", "grad_norm"),
        ("What the value network explains", "value_explains"),
    ):
        drawn.append(Chart(title, [Series(name, run.series(name))], marks=marks))
    return "".join(chart.html() for chart in drawn)


def measured(run: Run, name: str) -> Series:
    """A measure over the run, from the base model's."""
    points, errors = run.series(name), [error for _, error in run.series(f"{name}_ci95")]
    if name in run.before:
        points = [(0.0, run.before[name]), *points]
        errors = [run.before.get(f"{name}_ci95", 0.0), *errors]
    return Series(name, points, errors if len(errors) == len(points) else ())


def frontier(runs: Sequence[Run]) -> str:
    """What each run measured against the path KL that it had spent by then."""
    names = dict.fromkeys(name for run in runs for name in run.measures)
    drawn = []
    for name in names:
        every = [Series(run.name, against_kl(run, name)) for run in runs]
        drawn.append(Chart(name, every, x_label="path KL to the base model, nats"))
    html = "".join(chart.html() for chart in drawn)
    return f'<div class="charts">{html}</div>' if html else ""


def against_kl(run: Run, name: str) -> list[tuple[float, float]]:
    """A measure by the path KL at which it was taken, from the base model's, which has none.

    A line's KL is that before its updates: it belongs to the measures of the epoch before, if there are any.
    """
    by_epoch = {line["epoch"]: line for line in run.lines} | {0: run.before}
    found = [(0.0, float(run.before[name]))] if name in run.before else []
    for line in run.lines:
        value = by_epoch.get(line["epoch"] - 1, {}).get(name, line.get(name))
        if "base_kl" in line and value is not None:
            found.append((float(line["base_kl"]), float(value)))
    return list(dict.fromkeys(found))


def table_of(runs: Sequence[Run]) -> str:
    names = dict.fromkeys(name for run in runs for name in (run.result or {}).get("heldout", {}))
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = ""
    for run in runs:
        found = (run.result or {}).get("heldout", {})
        cells = "".join(f"<td>{escape(change(found[n])) if n in found else ''}</td>" for n in names)
        word = verdict(run, run.findings()).word
        rows += f"<tr><td>{escape(run.name)}</td><td>{word}</td>{cells}</tr>"
    return (
        f'<div class="scroll"><table><thead><tr><th>run</th><th>verdict</th>{head}</tr></thead><tbody>{rows}</tbody>'
        "</table></div>"
    )


# ---------------------------------------------------------------------------------------------- pictures


def pictures(run: Run) -> str:
    """The worst regressions and the best gains of those that were drawn, then the first prompts."""
    drawn = [line for line in run.images if line.get("pictures")]
    rest = sorted(drawn, key=lambda line: gain(run, line))
    worse = [line for line in rest if gain(run, line) < 0][:SHOWN]
    better = [line for line in reversed(rest) if gain(run, line) > 0][:SHOWN]
    others = [line for line in drawn if line not in worse and line not in better][:SHOWN]
    kinds = (("Worst regressions", worse), ("Best gains", better), ("Others, in the prompts' order", others))
    return "".join(
        f'<h3>{title}</h3><div class="pairs">{"".join(pair(run, line) for line in lines)}</div>'
        for title, lines in kinds
        if lines
    )


def gain(run: Run, line: Line) -> float:
    """What an image gained in all measures, each in units of its spread; one with a negative weight is better lower."""
    values = [(name, b, line["tuned"].get(name)) for name, b in line["base"].items()]
    return sum(run.sign(name) * (t - b) / run.spread(name) for name, b, t in values if b is not None and t is not None)


def pair(run: Run, line: Line) -> str:
    images = "".join(
        f'<img src="{embedded(run.folder / line["pictures"][who])}" alt="{who}: {escape(line["prompt"], quote=True)}">'
        for who in ("base", "tuned")
    )
    scores = ", ".join(f"{name} {figure(b)} to {figure(line['tuned'].get(name))}" for name, b in line["base"].items())
    return f'<div class="pair"><div>{images}</div><p>{escape(line["prompt"])}</p><p>{escape(scores)}</p></div>'


def film(run: Run) -> str:
    """The same prompts and seeds at each evaluation."""
    rows = []
    for number_ in range(SHOWN):
        files = sorted((run.folder / "film").glob(f"epoch_[0-9]*_{number_}.png"))
        files = [files[i * (len(files) - 1) // max(1, FILM - 1)] for i in range(FILM)] if len(files) > FILM else files
        frames = "".join(
            f'<figure><img src="{embedded(f)}" alt="epoch {epoch_of(f)}"><span>epoch {epoch_of(f)}</span></figure>'
            for f in files
        )
        rows.append(f'<div class="film" tabindex="0">{frames}</div>' if frames else "")
    return "".join(rows)


def epoch_of(file: Path) -> str:
    return number(int(file.stem.split("_")[1]))


def embedded(path: Path) -> str:
    """A picture as text within the page, no larger than needed; empty where there is none that can be read."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
    except OSError:
        return ""
    if max(small.size) <= MOST_PIXELS:
        kind = "png"
    else:
        small.thumbnail((MOST_PIXELS, MOST_PIXELS))
        kind = "jpeg"
    content = io.BytesIO()
    small.save(content, kind, quality=85)  # a png is exact
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
