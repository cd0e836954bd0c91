"""The page: one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import yaml

from condrl.errors import naming
from condrl.models.lora import KOHYA_FILE, LORA_FILE
from condrl.report.charts import Chart, Mark, Series, number
from condrl.report.comparison import comparison, difference
from condrl.report.html import cells, code, fact, figure, section, table
from condrl.report.pictures import Room, film, pictures, room_for
from condrl.report.run import DIVERSITY, Finding, Run, change, measure_title, totals, verdict, with_distinct_names
from condrl.report.usage import (
    base_model,
    command,
    drawing,
    lora_code,
    public_base,
    readers,
    sampler_text,
)

OPENING = "<!doctype html>\n<!-- condrl report -->\n"
BAD = {
    "hacked": "What it was tuned on got better at the cost of other measures",
    "collapsed": "The run collapsed",
    "worse": "It is worse than its base",
}
COURSE = {
    "Path KL to the base model, nats": "base_kl",
    "Path KL in the objective, nats": "path_kl",
    "How a prompt's images differ": "diversity",
    "Norm of the gradient": "grad_norm",
    "What the value network explains": "value_explains",
}
MORE = {"diversity, difference": "diversity", "path KL, nats": "path_kl", "network calls": "network_calls"}
SAID = ("name", "rewards")  # otherwise, of what steers

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
    runs, room = with_distinct_names(runs), room_for(len(runs))
    if len(runs) == 1:
        title, body = runs[0].name, run_part(runs[0], room, 1)
    else:
        title = f"{len(runs)} runs"
        parts = (f'<div id="run-{i}">{run_part(run, room, 2)}</div>' for i, run in enumerate(runs, 1))
        body = f"<h1>{title}</h1>{comparison(runs, room)}{''.join(parts)}"
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} · condrl</title><style>{STYLE.read_text('utf-8')}</style>"
    )
    return f'{OPENING}<html lang="en"><head>{head}</head><body><main>{body}</main></body></html>\n'


def run_part(run: Run, room: Room, level: int) -> str:
    """All of a run, below a heading of that level."""
    findings = run.findings()
    found = verdict(run, findings)
    parts = {
        "What went wrong": diagnoses(findings),
        "Held-out prompts, base and tuned from the same noise": measures(run),
        "Its course": f'<div class="charts">{charts(run, findings)}</div>',
        "Base | tuned": pictures(run, room, found.word == "hacked", level + 2),
        "One seed over the run": film(run, room),
        "Evaluations": evaluations(run),
        "Use it": usage(run, found.word),
        "What it took": costs(run),
    }
    config = code(yaml.safe_dump(run.config, sort_keys=False), "The resolved config")
    tone = "good" if found.word == "better" else "bad" if found.word in BAD or is_wrong(run, findings) else ""
    return (
        f"<h{level}>{escape(run.name)}</h{level}><p>{escape(subtitle(run))}</p>"
        f'<div class="verdict {tone}" role="status"><strong>{found.word}</strong>. {escape(found.sentence)}</div>'
        + "".join(section(title, content, level + 1) for title, content in parts.items())
        + f"<details><summary>The resolved config</summary>{config}</details>"
    )


def subtitle(run: Run) -> str:
    """What was tuned, on what, and against what it is measured."""
    tuned_on = run.rewards_in_words or "no reward"
    return f"{(run.config.get('algorithm') or {}).get('name')}, tuned on {tuned_on}, against {public_base(run.base)}"


def is_wrong(run: Run, findings: Sequence[Finding]) -> bool:
    """Whether a run that goes on has something wrong."""
    return run.result is None and any(finding.lasting for finding in findings)


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
    body = [measure_row(run, name, row) for name, row in rows.items()]
    body += [measure_row(run, DIVERSITY, run.diversity)] if run.diversity else []
    best = (run.result or {}).get("best") or {}
    note = "" if run.path_kl is None else f"<p>Path KL to the base: {number(run.path_kl)} nats.</p>"
    if best.get("heldout"):
        of = "; ".join(f"{name} {change(row)}" for name, row in best["heldout"].items())
        note += (
            f"<p>Best on validation prompts: epoch {best['epoch']}, in lora_best/. On held-out ones {escape(of)}.</p>"
        )
    columns = ("measure", "base", "tuned", "difference, 95 %", "wins", "rewarded")
    return table(columns, body, "Held-out measures") + note


def measure_row(run: Run, name: str, row: dict[str, Any]) -> str:
    won = row.get("win_rate")  # None where no pair was scored
    wins = "" if won is None else f"{won if run.sign(name) > 0 else 1 - won:.0%}"
    rewarded = ("yes" if run.sign(name) > 0 else "yes, lower") if name in run.rewards else "no"
    base, tuned = (figure(row[who]["mean"]) for who in ("base", "tuned"))
    return (
        f'<th scope="row">{escape(name)}</th><td>{base}</td><td>{tuned}</td>{difference(run, name, row)}'
        f"<td>{wins}</td><td>{rewarded}</td>"
    )


def evaluations(run: Run) -> str:
    """What `condrl evaluate` measured afterwards."""
    if not run.evaluation:
        return ""
    found, steer = run.evaluation["evaluations"], run.evaluation.get("steer")
    names = list(dict.fromkeys(name for entry in found for name in entry["heldout"]))
    more = [title for title, key in MORE.items() if any(entry.get(key) is not None for entry in found)]
    rows = [evaluation_row(run, entry, names, more) for entry in found]
    compared = f"steered by {steered_by(steer)}, beside plain" if steer else "tuned beside base"
    images = run.evaluation["images_per_prompt"]
    drawn = f"{run.evaluation['prompts']} prompts, {images} {'image' if images == 1 else 'images'} each"
    note = f"{drawn}; {compared}; the base is {public_base(run.evaluation['base'])}."
    columns = ("sampler", "steps", "strength", *(f"{name}, difference" for name in names), *more)
    return f"<p>{escape(note)}</p>" + table(columns, rows, "Evaluations")


def evaluation_row(run: Run, entry: dict[str, Any], names: Sequence[str], more: Sequence[str]) -> str:
    sampler, strength = dict(entry["sampler"]), entry["strength"]
    steps = sampler.pop("steps")
    name = f"{sampler['name']} ({sampler_text(sampler)})" if sampler_text(sampler) else sampler["name"]
    values = [difference(run, name, entry["heldout"].get(name)) for name in names]
    values += [extra(run, entry.get(MORE[title])) for title in more]
    return cells(name, str(steps), "base" if strength is None else f"{strength:g}") + "".join(values)


def extra(run: Run, value: Any) -> str:
    """A cell with a path KL, a diversity's difference, or the calls of plain and steered."""
    if isinstance(value, dict) and "difference" in value:
        return difference(run, DIVERSITY, value)
    if isinstance(value, dict):
        return f"<td>{number(value['plain'])} plain, {number(value['steered'])} steered</td>"
    return f"<td>{'' if value is None else number(value)}</td>"


def steered_by(section: dict[str, Any]) -> str:
    """The plugin with its options, and the rewards."""
    options = [f"{key}={value}" for key, value in section.items() if key not in SAID and value is not None]
    rewards = ", ".join(section.get("rewards") or {})
    return ", ".join([section["name"], *options]) + (f" (rewards: {rewards})" if rewards else "")


def usage(run: Run, word: str) -> str:
    """How to load the LoRA, the best one where the last is not to be recommended; empty before there is one."""
    there = [name for name in ("lora", "lora_best") if (run.folder / name / LORA_FILE).is_file()]
    if not there:
        return ""
    name, folder = there[-1] if word in BAD else there[0], f"path/to/{run.folder.resolve().name}"
    lines = code(lora_code(run, f"{folder}/{name}"), "Code for diffusers")
    return (
        f"{warning(word, name)}<p>condrl: <code>{escape(drawing(run, name))}</code></p><p>diffusers:</p>{lines}"
        f"<p>{readers(run)}: copy <code>{name}/{KOHYA_FILE}</code> to their folder of LoRAs; strength 1 is what was "
        f"tuned.</p>{asset_note(run)}"
    )


def warning(word: str, name: str) -> str:
    """What to know before a LoRA is used that is not better."""
    if word not in BAD:
        return ""
    advice = "Look at the pictures above before you use lora/."
    if name == "lora_best":
        advice = "Rather use lora_best/, of the epoch that was best on validation prompts, as the lines below do."
    return f'<p class="down">{BAD[word]}. {advice}</p>'


def asset_note(run: Run) -> str:
    """Where a base is that comes with condrl."""
    base = base_model(run)
    if not base.startswith("asset:"):
        return ""
    return f"<p>{escape(base)} comes with condrl: it is condrl/assets/{escape(base.removeprefix('asset:'))}.</p>"


def costs(run: Run) -> str:
    result, took = run.result or {}, totals(run)
    facts = {
        "epochs": len(run.lines),
        **took,
        "peak memory, GB": result.get("peak_memory_gb"),
        "hardware": result.get("hardware"),
        "processes": result.get("processes"),
        "seed": result.get("seed"),
        "revision": (result.get("revision") or "")[:10],
        "versions": ", ".join(f"{name} {version}" for name, version in (result.get("versions") or {}).items()),
    }
    rows = [cells(name, fact(value)) for name, value in facts.items() if value not in (None, "")]
    line = f"<p>The command:</p>{code(command(result['command']), 'The command')}" if result.get("command") else ""
    return table((), rows, "What it took") + line


# ---------------------------------------------------------------------------------------------- charts


def charts(run: Run, findings: Sequence[Finding]) -> str:
    marks = [
        Mark(epoch, ", ".join(str(i) for i, f in enumerate(findings, 1) if f.epoch == epoch))
        for epoch in dict.fromkeys(f.epoch for f in findings)
    ]
    span = (0.0, float(run.lines[-1]["epoch"])) if run.lines else None
    chart = partial(Chart, marks=marks, span=span)
    rewards = [name for name in run.rewards if run.series(f"reward/{name}")]
    drawn = [chart("Reward of the images it learned from", [Series("total", run.series("reward/total"))])]
    if len(rewards) > 1:
        drawn.append(chart("Each reward", [Series(name, run.series(f"reward/{name}")) for name in rewards]))
    drawn += [chart(measure_title(name), [measured(run, name)], base=run.before.get(name)) for name in run.measures]
    drawn.append(chart("Gain over the base, from the same noise", gains(run), base=0.0, of_differences=True))
    drawn += [chart(title, [Series(name, run.series(name))]) for title, name in COURSE.items()]
    return "".join(each.html() for each in drawn)


def gains(run: Run) -> list[Series]:
    """The paired differences to the base over the run, with their intervals."""
    names = dict.fromkeys(name.partition("/")[2] for name in run.measures)
    found = {name: (run.series(f"gain/{name}"), run.series(f"gain/{name}_ci95")) for name in names}
    return [
        Series(name, [(0.0, 0.0), *points], [0.0, *(error for _, error in errors)])
        for name, (points, errors) in found.items()
        if points
    ]


def measured(run: Run, name: str) -> Series:
    """A measure over the run, from the base model's."""
    points, errors = run.series(name), [error for _, error in run.series(f"{name}_ci95")]
    if name in run.before:
        points = [(0.0, run.before[name]), *points]
        errors = [run.before.get(f"{name}_ci95", 0.0), *errors]
    return Series("tuned", points, errors if len(errors) == len(points) else ())
