"""Line charts as SVG, in the page's own colours."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 440, 200  # little more than a phone shows, so that the numbers can be read there
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 14, 34  # margins of the plot
NEAR = 16  # between marks whose labels would overlap
COLOURS = 6  # in the page's style
FEW = 30  # points that are each shown; of more, a line of their mean is


@dataclass(frozen=True)
class Series:
    """A line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]
    errors: Sequence[float] = ()  # half the height of a band around each point, if there is one


@dataclass(frozen=True)
class Mark:
    """Something that happened, at a place of the horizontal axis."""

    x: float
    label: str  # the numbers by which the text refers to it


@dataclass(frozen=True)
class Chart:
    """What a figure shows."""

    title: str
    series: Sequence[Series]
    x_label: str = "epoch"
    marks: Sequence[Mark] = field(default=())

    def html(self) -> str:
        """A figure with its legend; empty where there is nothing to draw."""
        drawn = [series for series in self.series if series.points]
        if not drawn:
            return ""
        keys = "".join(
            f'<li><span class="key c{i % COLOURS}"></span>{escape(s.name)}: {number(s.points[-1][1])}</li>'
            for i, s in enumerate(drawn)
        )
        return (
            f'<figure><figcaption>{escape(self.title)}</figcaption>{self._svg(drawn)}<ul class="legend">{keys}</ul>'
            "</figure>"
        )

    def _svg(self, drawn: Sequence[Series]) -> str:
        xs, ys = self._ranges(drawn)
        across, up = Scale(*xs, LEFT, WIDTH - RIGHT), Scale(*ys, HEIGHT - BOTTOM, TOP)
        whole = all(x == int(x) for series in drawn for x, _ in series.points)
        parts = [*axis(across, up, 1.0 if whole else 0.0), *self._marks(across)]
        for i, series in enumerate(drawn):
            parts += shape(series, across, up, f"c{i % COLOURS}")
        label = (
            f'<text class="label" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(self.x_label)}</text>'
        )
        return (
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(self.in_words(drawn), quote=True)}">'
            f"{''.join(parts)}{label}</svg>"
        )

    def in_words(self, drawn: Sequence[Series]) -> str:
        """What the chart shows, for those who do not see it."""
        lines = [
            f"{s.name} from {number(s.points[0][1])} at {self.x_label} {number(s.points[0][0])} "
            f"to {number(s.points[-1][1])} at {number(s.points[-1][0])}"
            for s in drawn
        ]
        return f"{self.title}: {'; '.join(lines)}"

    def _ranges(self, drawn: Sequence[Series]) -> tuple[tuple[float, float], tuple[float, float]]:
        xs = [x for s in drawn for x, _ in s.points]
        ys = [y for s in drawn for _, y in s.points]
        for s in drawn:
            for (_, y), error in zip(s.points, s.errors, strict=False):
                ys += [y - error, y + error]
        return padded(min(xs), max(xs), 0.0), padded(min(ys), max(ys), 0.06)

    def _marks(self, across: Scale) -> list[str]:
        places = [(across(mark.x), mark.label) for mark in self.marks]
        lines = [f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>' for x, _ in places]
        return lines + [
            f'<text class="marked" x="{x + 3:.1f}" y="{TOP + 9}">{escape(", ".join(labels))}</text>'
            for x, labels in apart(places)
        ]


def apart(places: Iterable[tuple[float, str]]) -> list[tuple[float, list[str]]]:
    """Labels by their places, those that would be written over each other beside the last of them."""
    found: list[tuple[float, list[str]]] = []
    for x, label in sorted(places):
        near = found.pop()[1] if found and x - found[-1][0] < NEAR else []
        found.append((x, [*near, label]))
    return found


@dataclass(frozen=True)
class Scale:
    """A linear map from values to places of the drawing."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, least: float = 0.0, count: int = 5) -> list[float]:
        """Round values within the range, `count` of them or so, and no nearer to each other than `least`."""
        rough = max((self.high - self.low) / count, least)
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def padded(low: float, high: float, share: float) -> tuple[float, float]:
    """A range with some room at both ends, and never empty."""
    room = (high - low) * share or (0 if high > low else max(abs(high), 1.0) * 0.1)
    return low - room, high + room


def axis(across: Scale, up: Scale, least: float) -> list[str]:
    """Lines and numbers; those across are no nearer to each other than `least`."""
    found = []
    for y in up.ticks():
        place = up(y)
        found.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>')
        found.append(f'<text class="tick" x="{LEFT - 6}" y="{place + 4:.1f}" text-anchor="end">{number(y)}</text>')
    for x in across.ticks(least):
        found.append(
            f'<text class="tick" x="{across(x):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{number(x)}</text>'
        )
    return found


def shape(series: Series, across: Scale, up: Scale, colour: str) -> list[str]:
    """A band, a line and, where they are few, its points."""
    found = []
    if series.errors:
        ends = list(zip(series.points, series.errors, strict=True))
        upper = [(x, y + error) for (x, y), error in ends]
        lower = [(x, y - error) for (x, y), error in reversed(ends)]
        found.append(f'<polygon class="band {colour}" points="{path([*upper, *lower], across, up)}"/>')
    is_long = len(series.points) > FEW
    found.append(f'<polyline class="line {colour}{" faint" * is_long}" points="{path(series.points, across, up)}"/>')
    if is_long:
        found.append(f'<polyline class="line {colour}" points="{path(smoothed(series.points), across, up)}"/>')
    else:
        found += [
            f'<circle class="dot {colour}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="3"/>' for x, y in series.points
        ]
    return found


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Each value's mean with its neighbours', a tenth of the points or so; none near the ends, which have fewer."""
    half = len(points) // (2 * 10)
    values = [y for _, y in points]
    whole = range(half, len(points) - half)
    return [(points[i][0], math.fsum(values[i - half : i + half + 1]) / (2 * half + 1)) for i in whole]


def path(points: Iterable[tuple[float, float]], across: Scale, up: Scale) -> str:
    return " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)


def number(value: float) -> str:
    """A few digits, as a reader wants them."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        text = f"{value:.4g}"
        return f"{value:.0f}" if "e" in text else text
    return f"{value:.2e}"
