"""Plots as SVG: geometry is computed here, drawn by templates/plots.html.j2 with the classes of the stylesheet.

No plot carries its meaning by colour alone: series have their own markers and names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

N_SERIES = 6
"""Series that have a colour and marker of their own; further ones start again."""


class Tick(NamedTuple):
    """A place on an axis with its label."""

    at: float
    label: str


class Mark(NamedTuple):
    """A data point with its whisker's ends (equal to y without an error)."""

    x: float
    y: float
    low: float
    high: float
    title: str


@dataclass(frozen=True)
class Series:
    """A line of marks."""

    name: str
    number: int
    """1 … `N_SERIES`: its colour and marker."""
    marks: list[Mark]

    @property
    def path(self) -> str:
        return "M" + "L".join(f"{m.x:.1f} {m.y:.1f}" for m in self.marks)


@dataclass(frozen=True)
class LinePlot:
    """Lines over a numeric axis. Coordinates are those of the viewBox, (0, 0) at the upper left."""

    width: float
    height: float
    left: float
    bottom: float
    x_label: str
    y_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    series: list[Series]


class Column(NamedTuple):
    """A column of a histogram."""

    x: float
    y: float
    width: float
    height: float
    title: str
    sign: str
    """"n" below zero, "p" above."""


@dataclass(frozen=True)
class HistogramPlot:
    """Columns that stand on ``bottom``."""

    width: float
    height: float
    bottom: float
    columns: list[Column]
    ticks: list[Tick]


def line_plot(
    series: Mapping[str, Sequence[tuple[float, float, float | None]]], x_label: str, y_label: str
) -> LinePlot | None:
    """Lines of (x, y, error or None) by name, the y axis from 0 (or the smallest value); None without points."""
    points = [(x, y, e or 0.0) for line in series.values() for x, y, e in line if math.isfinite(y)]
    if not points:
        return None
    width, height, left, right, top, bottom = 640.0, 280.0, 52.0, 14.0, 12.0, 236.0
    xs = sorted({x for x, _, _ in points})
    low_x, high_x = (xs[0] - 0.5, xs[0] + 0.5) if len(xs) == 1 else (xs[0], xs[-1])
    ticks = nice_ticks(min(0.0, *(y - e for _, y, e in points)), max(y + e for _, y, e in points))
    low_y, high_y = ticks[0], ticks[-1]

    def at_x(x: float) -> float:
        return left + 12 + (width - left - right - 24) * (x - low_x) / (high_x - low_x)

    def at_y(y: float) -> float:
        return bottom - (bottom - top) * (y - low_y) / (high_y - low_y)

    drawn = []
    for i, (name, line) in enumerate(series.items()):
        marks = [
            Mark(at_x(x), at_y(y), at_y(y - (e or 0.0)), at_y(y + (e or 0.0)), f"{name}, {x_label} {x:g}: {y:.3f}")
            for x, y, e in sorted(line, key=lambda p: p[0])
            if math.isfinite(y)
        ]
        if marks:
            drawn.append(Series(name, i % N_SERIES + 1, marks))
    step = max(1, math.ceil(len(xs) / 14))
    return LinePlot(
        width,
        height,
        left,
        bottom,
        x_label,
        y_label,
        [Tick(at_x(x), _label(x)) for x in xs[::step]],
        [Tick(at_y(y), _label(y)) for y in ticks],
        drawn,
    )


def histogram(edges: Sequence[float], counts: Sequence[int]) -> HistogramPlot | None:
    """Columns of a histogram on a square-root scale, which leaves the tails visible; None where it is empty."""
    if len(edges) != len(counts) + 1 or not any(counts):
        return None
    width, height, bottom, top = 460.0, 150.0, 122.0, 8.0
    low, high = edges[0], edges[-1]
    scale, most = width / ((high - low) or 1.0), math.sqrt(max(counts))
    columns = []
    for i, count in enumerate(counts):
        tall = (bottom - top) * math.sqrt(count) / most
        x, right = (edges[i] - low) * scale, (edges[i + 1] - low) * scale
        title = f"{edges[i]:.3g} to {edges[i + 1]:.3g}: {count:,}"
        sign = "n" if edges[i] + edges[i + 1] < 0 else "p"
        columns.append(Column(x, bottom - tall, max(0.5, right - x - 0.5), tall, title, sign))
    inner = [t for t in nice_ticks(low, high) if low <= t <= high]
    return HistogramPlot(width, height, bottom, columns, [Tick((t - low) * scale, _label(t)) for t in inner])


def _label(value: float) -> str:
    return f"{value:g}".replace("-", "\u2212")


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from at most ``low`` to at least ``high``, some ``about`` steps."""
    if not high > low:
        high = low + 1.0
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]
