"""Line charts as SVG, in the page's own colours."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 440, 216  # little more than a phone shows, so that the numbers can be read there
LEFT, RIGHT, TOP, BOTTOM = 76, 12, 22, 40  # margins of the plot
LETTER = 9  # the width of a letter, at most
NEAR = 20  # between marks whose labels would overlap
COLOURS = 6  # in the page's style
DASHES = 4  # patterns there, for more series than colours
FEW = 30  # points that are each shown; of more, a line of their mean is
NAMED = 6  # points of a series that have their labels written beside them
UNIT = (0.0, 1.0)


@dataclass(frozen=True)
class Series:
    """A line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]
    errors: Sequence[float] = ()  # half the height of a band around each point, if there is one
    labels: Sequence[str] = ()  # of the points, which are then joined in their order, whatever their places

    def band(self, bounds: tuple[float, float]) -> list[tuple[float, float, float]]:
        """(x, low, high) around each point."""
        ends = zip(self.points, self.errors, strict=bool(self.errors))
        return [(x, max(y - error, bounds[0]), min(y + error, bounds[1])) for (x, y), error in ends]


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
    base: float | None = None  # what the base model has, for a line across
    span: tuple[float, float] | None = None  # of the horizontal axis; by default the points'
    of_differences: bool = False  # which may have either sign

    def html(self) -> str:
        """A figure with its legend; empty where there is nothing to draw."""
        drawn = {colour(i): series for i, series in enumerate(self.series) if series.points}
        if not drawn:
            return ""
        keys = [key(kind, f"{s.name}: {number(s.points[-1][1])}") for kind, s in drawn.items()]
        if self.base is not None:
            keys.append(key("base", f"base: {number(self.base)}"))
        return (
            f'<figure><figcaption>{escape(self.title)}</figcaption>{self._svg(drawn)}<ul class="legend">'
            f"{''.join(keys)}</ul></figure>"
        )

    def _svg(self, drawn: Mapping[str, Series]) -> str:
        every = list(drawn.values())
        (xs, ys), bounds = self._ranges(every), self._bounds(every)
        across, up = Scale(*xs, LEFT, WIDTH - RIGHT), Scale(*ys, HEIGHT - BOTTOM, TOP)
        whole = all(x == int(x) for series in every for x, _ in series.points)
        parts = [*axis(across, up, 1.0 if whole else 0.0), *self._marks(across)]
        if self.base is not None:
            parts.append(f'<polyline class="line base" points="{path([(x, self.base) for x in xs], across, up)}"/>')
        for kind, series in drawn.items():
            parts += shape(series, across, up, kind, bounds)
        parts += labels(drawn, across, up)
        parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 5}" text-anchor="end">{escape(self.x_label)}</text>')
        return (
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(self.in_words(every), quote=True)}">'
            f"{''.join(parts)}</svg>"
        )

    def in_words(self, drawn: Sequence[Series]) -> str:
        """What the chart shows, for those who do not see it."""
        lines = [
            f"{s.name} from {number(s.points[0][1])} at {self.x_label} {number(s.points[0][0])} "
            f"to {number(s.points[-1][1])} at {number(s.points[-1][0])}"
            for s in drawn
        ]
        base = [] if self.base is None else [f"base {number(self.base)}"]
        return f"{self.title}: {'; '.join([*lines, *base])}"

    def _values(self, drawn: Sequence[Series]) -> list[float]:
        return [y for s in drawn for _, y in s.points] + ([] if self.base is None else [self.base])

    def _bounds(self, drawn: Sequence[Series]) -> tuple[float, float]:
        """What bands stay within: [0, 1] where all values do, as shares."""
        are_shares = not self.of_differences and all(0 <= y <= 1 for y in self._values(drawn))
        return UNIT if are_shares else (-math.inf, math.inf)

    def _ranges(self, drawn: Sequence[Series]) -> tuple[tuple[float, float], tuple[float, float]]:
        xs = self.span or [x for s in drawn for x, _ in s.points]
        bands = [y for s in drawn for _, *ends in s.band(self._bounds(drawn)) for y in ends]
        ys = self._values(drawn) + bands
        return padded(min(xs), max(xs), 0.0), padded(min(ys), max(ys), 0.06)

    def _marks(self, across: Scale) -> list[str]:
        places = [(across(mark.x), mark.label) for mark in self.marks]
        lines = [f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>' for x, _ in places]
        return lines + [beside(x, TOP - 8, ", ".join(labels), "marked") for x, labels in apart(places)]


def colour(i: int) -> str:
    """The classes of the i-th series: a colour and, when they begin again, a pattern of dashes."""
    return f"c{i % COLOURS}" + (f" d{i // COLOURS % DASHES}" if i >= COLOURS else "")


def key(kind: str, text: str) -> str:
    """An entry of a legend, with a piece of its line."""
    line = f'<line class="line {kind}" x1="0" x2="28" y1="5" y2="5"/>'
    return f'<li><svg class="key" viewBox="0 0 28 10" aria-hidden="true">{line}</svg>{escape(text)}</li>'


def beside(x: float, y: float, text: str, kind: str) -> str:
    """A text to the right of a place, or to its left where it would be cut."""
    is_cut = x + 4 + LETTER * len(text) > WIDTH
    place, anchor = (x - 4, "end") if is_cut else (x + 4, "start")
    return f'<text class="{kind}" x="{place:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


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
        found.append(f'<text class="tick" x="{LEFT - 6}" y="{place + 5:.1f}" text-anchor="end">{number(y)}</text>')
    for x in across.ticks(least):
        found.append(
            f'<text class="tick" x="{across(x):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{number(x)}</text>'
        )
    return found


def shape(series: Series, across: Scale, up: Scale, kind: str, bounds: tuple[float, float]) -> list[str]:
    """A band, a line and, where they are few or have labels, its points."""
    found, points = [], series.points
    if band := series.band(bounds):
        outline = [*((x, high) for x, _, high in band), *((x, low) for x, low, _ in reversed(band))]
        found.append(f'<polygon class="band {kind}" points="{path(outline, across, up)}"/>')
    is_long = len(points) > FEW and not series.labels
    found.append(f'<polyline class="line {kind}{" faint" * is_long}" points="{path(points, across, up)}"/>')
    if is_long:
        found.append(f'<polyline class="line {kind}" points="{path(smoothed(points), across, up)}"/>')
    else:
        found += [f'<circle class="dot {kind}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="3"/>' for x, y in points]
    return found


def labels(drawn: Mapping[str, Series], across: Scale, up: Scale) -> list[str]:
    """The labels of some points of each series, but for those that would be written over others."""
    found, taken = [], list[tuple[float, float]]()
    for kind, series in drawn.items():
        for i in spaced(len(series.labels), NAMED):
            x, y = across(series.points[i][0]), up(series.points[i][1])
            if all(abs(x - other) > NEAR or abs(y - height) > NEAR for other, height in taken):
                taken.append((x, y))
                found.append(beside(x, y - 5, series.labels[i], f"at {kind}"))
    return found


def spaced(count: int, most: int) -> list[int]:
    """At most so many of the indices below `count`, the first and the last among them."""
    return list(range(count)) if count <= most else [i * (count - 1) // (most - 1) for i in range(most)]


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
