"""What a page of several runs has on top: their numbers, the same prompts' pictures, measures by path KL."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from html import escape
from typing import Any

from condrl.report.charts import Chart, Series, number
from condrl.report.html import fact, figure, section, table
from condrl.report.pictures import Room, picture
from condrl.report.run import Line, Run, interval, measure_title, totals, verdict
from condrl.report.usage import deployed_sampler, public_base

PROMPTS = 8  # whose pictures are shown side by side
KL_LABEL = "path KL to the base model, nats"


def comparison(runs: Sequence[Run], room: Room) -> str:
    """What the runs have in common, and what not."""
    return (
        section("Comparison", warnings(runs) + table_of(runs))
        + section("The same prompts", side_by_side(runs, room))
        + section("Measures by path KL", frontier(runs))
    )


# ---------------------------------------------------------------------------------------------- numbers


def warnings(runs: Sequence[Run]) -> str:
    """Why the runs' numbers do not compare, if so; a run without held-out images says nothing of its prompts."""
    ended = [run for run in runs if run.images]
    bases = {run.base: public_base(run.base) for run in runs}
    reasons = []
    if len(bases) > 1:
        reasons.append(f"base models ({'; '.join(bases.values())})")
    if differ(ended, lambda run: frozenset((line["row"], line["prompt"]) for line in run.images)):
        reasons.append("held-out prompts")
    if differ(ended, sampler_key):
        reasons.append("samplers of held-out prompts")
    if not reasons:
        return ""
    return f'<p class="down">The runs have different {escape(" and ".join(reasons))}: their numbers do not compare.</p>'


def differ(runs: Sequence[Run], of: Callable[[Run], Hashable]) -> bool:
    return len({of(run) for run in runs}) > 1


def sampler_key(run: Run) -> str:
    return repr(sorted(deployed_sampler(run).items()))


def table_of(runs: Sequence[Run]) -> str:
    """A row for each run, with links to their parts of the page."""
    names = list(dict.fromkeys(name for run in runs for name in (run.result or {}).get("heldout", {})))
    with_kl = any(run.path_kl is not None for run in runs)
    columns = [
        *("run", "algorithm", "verdict"),
        *(f"{name}, difference" for name in names),
        *(["path KL, nats"] if with_kl else []),
        *("network calls", "seconds", "images"),
    ]
    return table(columns, [run_row(run, i, names, with_kl) for i, run in enumerate(runs, 1)], "Comparison of the runs")


def run_row(run: Run, i: int, names: Sequence[str], with_kl: bool) -> str:
    rows, took = (run.result or {}).get("heldout", {}), totals(run)
    kl = [] if not with_kl else ["" if run.path_kl is None else number(run.path_kl)]
    costs = ["" if took[key] is None else fact(took[key]) for key in ("network calls", "seconds", "images")]
    texts = [str((run.config.get("algorithm") or {}).get("name")), verdict(run, run.findings()).word]
    return (
        f'<th scope="row"><a href="#run-{i}">{escape(run.name)}</a></th>'
        + "".join(f"<td>{escape(text)}</td>" for text in texts)
        + "".join(difference(run, name, rows.get(name)) for name in names)
        + "".join(f"<td>{text}</td>" for text in [*kl, *costs])
    )


def difference(run: Run, name: str, row: dict[str, Any] | None) -> str:
    """A cell with the paired difference of a measure and its interval; empty where it was not measured."""
    if row is None:
        return "<td></td>"
    tone = {1: "up", -1: "down", 0: ""}[run.gained(name, row)]
    return f'<td class="{tone}">{figure(row["difference"]["mean"], "+")}{whole_interval(row)}</td>'


def whole_interval(row: dict[str, Any]) -> str:
    """An interval that is not broken over two lines."""
    return interval(row).replace(", ", ",&nbsp;")


# ---------------------------------------------------------------------------------------------- pictures


def side_by_side(runs: Sequence[Run], room: Room) -> str:
    """The pictures of prompts and seeds that all runs drew which have pictures at all."""
    drawn = {i: {(x["prompt"], x["seed"]): x for x in run.images if x.get("pictures")} for i, run in enumerate(runs)}
    drawn = {i: found for i, found in drawn.items() if found}
    if len(drawn) < 2:
        return ""
    first = next(iter(drawn.values()))
    shared = [key for key in first if all(key in found for found in drawn.values())][:PROMPTS]
    return "".join(
        side(prompt, seed, [(runs[i], found[prompt, seed]) for i, found in drawn.items()], room)
        for prompt, seed in shared
    )


def side(prompt: str, seed: int, lines: Sequence[tuple[Run, Line]], room: Room) -> str:
    """A prompt's picture by the base, once for each of the bases and samplers, then by each run's tuned model."""
    bases: dict[Hashable, list[tuple[Run, Line]]] = {}
    for run, line in lines:
        bases.setdefault((run.base, sampler_key(run)), []).append((run, line))
    shown = [(base_of([run for run, _ in those], len(bases)), *those[0], "base") for those in bases.values()]
    shown += [(run.name, run, line, "tuned") for run, line in lines]
    images = "".join(
        f"<figure>{picture(run.folder / line['pictures'][who], f'{name}: {prompt}', room)}<span>{escape(name)}</span>"
        "</figure>"
        for name, run, line, who in shown
    )
    return f'<p>{escape(prompt)}, seed {seed}</p><div class="side">{images}</div>'


def base_of(runs: Sequence[Run], bases: int) -> str:
    return "base" if bases == 1 else f"base of {', '.join(run.name for run in runs)}"


# ---------------------------------------------------------------------------------------------- path KL


def frontier(runs: Sequence[Run]) -> str:
    """What each run measured against the path KL that it had spent by then."""
    names = dict.fromkeys(name for run in runs for name in run.measures)
    drawn = [Chart(measure_title(name), [spending(run, name) for run in runs], KL_LABEL) for name in names]
    html = "".join(chart.html() for chart in drawn)
    if not html:
        return ""
    without = [run.name for run in runs if not any(against_kl(run, name) for name in names)]
    note = f"<p>Not in the charts, for want of a path KL: {escape(', '.join(without))}.</p>" if without else ""
    return f'<p>The numbers at the dots are epochs.</p><div class="charts">{html}</div>{note}'


def spending(run: Run, name: str) -> Series:
    found = against_kl(run, name)
    return Series(run.name, [(kl, value) for _, kl, value in found], labels=[str(epoch) for epoch, _, _ in found])


def against_kl(run: Run, name: str) -> list[tuple[int, float, float]]:
    """(epoch, path KL, measure), from the base model's, which has none; empty where no path KL was recorded.

    A line's KL is that before its updates: it belongs to the measures of the epoch before, if there are any.
    """
    by_epoch = {line["epoch"]: line for line in run.lines} | {0: run.before}
    found = {}
    for line in run.lines:
        epoch = line["epoch"] - 1 if name in by_epoch.get(line["epoch"] - 1, {}) else line["epoch"]
        if "base_kl" in line and name in by_epoch[epoch]:
            found[epoch] = epoch, float(line["base_kl"]), float(by_epoch[epoch][name])
    base = {0: (0, 0.0, float(run.before[name]))} if found and name in run.before else {}
    return [point for _, point in sorted((base | found).items())]
