"""Charts of the report: where every line, point and label lies, in SVG units; templates only write them.

Every chart has a table beside it with the same numbers. Positions follow from the record alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bridges.drawing import as_text, finite, number, percent
from bridges.report_values import SERIES, at, listed

_LEFT, _TOP, _WIDTH, _HEIGHT = 46, 12, 300, 180
_MARKERS = (  # circle, square, triangle, diamond
    "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0z",
    "M-3-3h6v6h-6z",
    "M0-4l4 7h-8z",
    "M0-4.5l4 4.5l-4 4.5l-4-4.5z",
)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One series of a strength curve: unbroken runs, and points with their titles."""

    name: str
    marker: str
    runs: list[str]
    points: list[tuple[float, float, str]]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Where everything in the chart of an edit lies, in SVG units."""

    grid: list[tuple[float, str]]
    ticks: list[tuple[float, str]]
    lines: list[Line]


def strength_curve(edit: Any) -> Curve | None:
    """Answers flipped against strength: total, indirect, controls; None without strengths."""
    strengths = listed(at(edit, "strengths"))
    known = [x for x in map(finite, strengths) if x is not None]
    if not known:
        return None
    low, high = min(0.0, *known), max(0.0, *known)
    scale = _WIDTH / ((high - low) or 1.0)
    shifts = [None if (x := finite(s)) is None else (x - low) * scale for s in strengths]
    xs = [None if shift is None else round(_LEFT + shift, 1) for shift in shifts]
    ticks: list[tuple[float, str]] = []
    for x, strength in sorted((x, number(s)) for x, s in zip(xs, strengths, strict=True) if x):
        if not ticks or x - ticks[-1][0] >= 30:  # labels never touch
            ticks.append((x, strength))
    return Curve(
        grid=[(_height_of(share / 100), f"{share} %") for share in (0, 25, 50, 75, 100)],
        ticks=ticks,
        lines=[_curve_line(edit, i, strengths, xs) for i in range(len(SERIES))],
    )


def _height_of(share: float) -> float:
    return round(_TOP + _HEIGHT * (1 - min(1.0, max(0.0, share))), 1)


def _curve_line(edit: Any, series: int, strengths: Sequence[Any], xs: Sequence[float | None]) -> Line:
    """A line that breaks where a value is undefined."""
    key, name = SERIES[series]
    runs: list[list[str]] = [[]]
    points: list[tuple[float, float, str]] = []
    for i, x in enumerate(xs):
        value = at(edit, key, i)
        share = finite(value)
        if x is None or share is None:
            runs.append([])
            continue
        y = _height_of(share)
        runs[-1].append(f"{x} {y}")
        points.append((x, y, f"{name}, strength {number(strengths[i])}: {percent(value)}"))
    paths = [f"M{'L'.join(run)}" for run in runs if len(run) > 1]
    shown = name if points else f"{name}: {as_text(at(edit, key, 0))}"
    return Line(name=shown, marker=_MARKERS[series], runs=paths, points=points)


# --- intervals and scatters -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One row of a forest plot; no `low` and `high` where there is no interval."""

    y: float
    label: str
    x: float
    low: float | None
    high: float | None
    title: str


@dataclass(frozen=True, kw_only=True)
class Forest:
    height: int
    bars: list[Bar]
    ticks: list[tuple[float, str]]


def forest(rows: Sequence[tuple[str, Any]]) -> Forest | None:
    """Values with their intervals (`{"value", "low", "high"}`) under one another, on one axis.

    Values beyond -0.5 and 1.5 are drawn at the rim; their titles and the table have the numbers.
    """
    known = [(label, mark) for label, mark in rows if finite(at(mark, "value")) is not None]
    if not known:
        return None

    def place(value: Any) -> float | None:
        share = finite(value)
        return None if share is None else round(150 + 95 * (min(1.5, max(-0.5, share)) + 0.5), 1)

    bars = []
    for i, (label, mark) in enumerate(known):
        value, low, high = (at(mark, key) for key in ("value", "low", "high"))
        title = f"{label}: {number(value)} ({number(low)} to {number(high)})"
        x = place(value) or 0.0
        bars.append(Bar(y=18 + 16 * i, label=label, x=x, low=place(low), high=place(high), title=title))
    ticks = [(place(share) or 0.0, f"{share:g}") for share in (-0.5, 0, 0.5, 1, 1.5)]
    return Forest(height=18 + 16 * len(bars) + 22, bars=bars, ticks=ticks)


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """Points with their titles in a square of 300 units, and the line where both are equal."""

    points: list[tuple[float, float, str]]
    zero: float
    ends: tuple[str, str]


def scatter(
    points: Sequence[Any], x_key: str | int, y_key: str | int, names: Sequence[str] = ()
) -> Scatter | None:
    """Two measurements of the same things, on equal axes.

    `names`: where a point is a list, its third entry is the place of its name there.
    """
    pairs = [(finite(at(point, x_key)), finite(at(point, y_key)), point) for point in points]
    known = [(x, y, point) for x, y, point in pairs if x is not None and y is not None]
    if not known:
        return None
    low = min(0.0, *(min(x, y) for x, y, _ in known))
    high = max(0.0, *(max(x, y) for x, y, _ in known))
    scale = _WIDTH / ((high - low) or 1.0)
    placed = [
        (
            round(_LEFT + (x - low) * scale, 1),
            round(_TOP + _WIDTH - (y - low) * scale, 1),
            f"{_point_name(point, names)}: {number(x)}, {number(y)}",
        )
        for x, y, point in known
    ]
    return Scatter(points=placed, zero=round((0 - low) * scale, 1), ends=(number(low), number(high)))


def _point_name(point: Any, names: Sequence[str]) -> str:
    if isinstance(point, dict):
        return f"{as_text(at(point, 'nodes'))}, strength {number(at(point, 'strength'))}"
    place = at(point, 2)
    return as_text(names[place]) if isinstance(place, int) and 0 <= place < len(names) else "a point"


@dataclass(frozen=True, kw_only=True)
class SizeChart:
    """Edges against task loss, both on log axes, one path."""

    path: str
    points: list[tuple[float, float, str]]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


def size_chart(cuts: Sequence[Any]) -> SizeChart | None:
    """Circuit size against held-out loss, from the cuts of one mask order (paper, Figure 2)."""
    sizes = [(finite(at(cut, "edges")), finite(at(cut, "loss"))) for cut in cuts]
    known = sorted((e, max(loss, 1e-4)) for e, loss in sizes if e and loss is not None and e > 0)
    known = [cut for i, cut in enumerate(known) if all(cut[1] < loss for _, loss in known[:i])]
    if len(known) < 2:
        return None
    edges = [math.log10(e) for e, _ in known]
    losses = [math.log10(loss) for _, loss in known]
    right, bottom, top = max(math.ceil(edges[-1]), 1), math.floor(min(losses)), math.ceil(max(losses))
    spans = right or 1, (top - bottom) or 1

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            round(_LEFT + _WIDTH * x / spans[0], 1),
            round(_TOP + _HEIGHT * (top - y) / spans[1], 1),
        )

    spots = [place(x, y) for x, y in zip(edges, losses, strict=True)]
    titles = [f"{e:.0f} edges: loss {number(loss)}" for e, loss in known]
    return SizeChart(
        path="M" + "L".join(f"{x} {y}" for x, y in spots),
        points=[(x, y, title) for (x, y), title in zip(spots, titles, strict=True)],
        x_ticks=[(place(p, 0)[0], f"{10**p:,}") for p in range(right + 1)],
        y_ticks=[(place(0, p)[1], f"{10.0**p:g}") for p in range(bottom, top + 1)],
    )
