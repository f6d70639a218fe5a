"""Line charts as SVG, with nothing but text: series over steps, bands around them, areas on top of one another.

Colours are classes (`c0` ... `c7` of a stroke, `f0` ... of a filling, `ink`, `grid`), so that a page can have a light
and a dark look; `STYLE` colours a chart that stands alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Points = list[tuple[float, float]]
WIDTH, HEIGHT = 460, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 34, 34
_LEGEND_LINE = 17
MAX_POINTS = 1500
LIGHT = ("#1f6feb", "#d1570a", "#1a7f45", "#b5307a", "#8250df", "#8a6d00", "#0b808c", "#6e7781")
DARK = ("#58a6ff", "#f0883e", "#56d364", "#f778ba", "#bc8cff", "#d4a72c", "#39c5cf", "#8b949e")
STYLE = (
    "text{fill:#24292f}.grid{stroke:#e4e8ec}"
    + "".join(f".c{i}{{stroke:{color}}}.f{i}{{fill:{color}}}" for i, color in enumerate(LIGHT))
    + ".line{fill:none;stroke-linejoin:round;stroke-width:1.6}.faint{stroke-opacity:.3;stroke-width:1}"
    ".band{fill-opacity:.16}.area{fill-opacity:.75}"
)


@dataclass(frozen=True)
class Series:
    """One thing over steps."""

    label: str
    points: Points
    bounds: Points | None = None
    """(low, high) of each point, drawn as a band."""
    dots: bool = False
    """Single measurements (evaluations), marked and joined, not a stream."""
    smooth: bool = False
    """Draw a smoothed line over a faint one, where there are more than 30 points."""


@dataclass(frozen=True)
class Chart:
    """A titled chart of at least one point."""

    title: str
    series: Sequence[Series]
    from_zero: bool = False
    percent: bool = False
    """Values are shares, labelled in per cent."""
    stacked: bool = False
    """Areas on top of one another; all series have the same steps."""


def thin(points: Sequence[tuple[float | int, float | int]], most: int = MAX_POINTS) -> Points:
    """At most so many points, evenly; those that are not finite are left out.

    >>> thin([(0, 1.0), (1, math.nan), (2, 3.0)])
    [(0.0, 1.0), (2.0, 3.0)]
    """
    found = [(float(x), float(y)) for x, y in points if math.isfinite(y)]
    return found[:: math.ceil(len(found) / most) or 1]


def ticks(low: float | int, high: float | int, count: int = 5) -> list[float]:
    """Round numbers that span [low, high].

    >>> ticks(0.0, 9.7), ticks(1.12, 1.31)
    ([0.0, 2.0, 4.0, 6.0, 8.0], [1.15, 1.2, 1.25, 1.3])
    """
    span = (high - low) or abs(high) or 1.0
    raw = span / count
    size = 10 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(float(i * step), 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class _Frame:
    """Where values lie on the drawing."""

    x: tuple[float, float]
    y: tuple[float, float]
    top: int

    @property
    def height(self) -> int:
        return HEIGHT - _TOP + self.top

    def at(self, x: float | int, y: float | int) -> tuple[float, float]:
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        bottom = self.height - _BOTTOM
        return _LEFT + across * (WIDTH - _LEFT - _RIGHT), bottom - up * (bottom - self.top)

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in (self.at(*p) for p in points))


def frame(chart: Chart) -> _Frame:
    """The drawing's scales. The first step is always 0, so that charts of one run can be compared."""
    xs = [x for s in chart.series for x, _ in s.points]
    ys = [y for s in _layers(chart) for points in (s.points, s.bounds or []) for y in _values(s, points)]
    low, high = min(ys + [0.0] * chart.from_zero), max(ys + [0.0] * chart.from_zero)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    # A curve that never goes below 0 gets no axis below 0, nor a share one above 1.
    bottom = max(low - margin, 0.0) if low >= 0 else low - margin
    top = min(high + margin, 1.0) if chart.percent and bottom < high <= 1 else high + margin
    lines = len(_legend_places(chart))
    above = _TOP + _LEGEND_LINE * lines if lines > 1 or (lines and _legend_is_long(chart)) else _TOP
    return _Frame((0.0, max([1.0, *xs])), (bottom, top), above)


def _values(series: Series, points: Points) -> list[float]:
    return [v for low, high in points for v in (low, high)] if points is series.bounds else [y for _, y in points]


def _layers(chart: Chart) -> list[Series]:
    """The series, those of a stacked chart each with all below it added."""
    if not chart.stacked:
        return list(chart.series)
    total: dict[float, float] = {}
    layers = []
    for s in chart.series:
        total = {x: total.get(x, 0.0) + y for x, y in s.points}
        layers.append(Series(s.label, list(total.items())))
    return layers


def draw(chart: Chart) -> str:
    """The elements of one chart, WIDTH wide and `frame(chart).height` high.

    Example:
      >>> "<polyline" in draw(Chart("loss", [Series("train", [(0.0, 2.0), (1.0, 1.0)])]))
      True
    """
    f = frame(chart)
    parts = [f'<text x="{_LEFT}" y="22" font-weight="600">{escape(chart.title)}</text>']
    for tick in ticks(*f.y):
        _, y = f.at(0.0, tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_label(tick, chart.percent)}</text>')
    for tick in (t for t in ticks(*f.x) if t == int(t)):
        x, _ = f.at(tick, f.y[0])
        parts.append(f'<text x="{x:.1f}" y="{f.height - _BOTTOM + 16:.0f}" text-anchor="middle">{tick:.0f}</text>')
    layers = _layers(chart)
    if chart.stacked:
        parts += _areas(f, layers)
    else:
        for number, s in enumerate(layers):
            parts += _line(f, s, number % len(LIGHT))
    return "".join([*parts, *_legend(chart)])


def _label(value: float | int, percent: bool) -> str:
    if percent:
        return f"{round(100 * value, 6):g}%"
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.10g}"


def _line(f: _Frame, s: Series, color: int) -> list[str]:
    parts = []
    if s.bounds:
        around = [(x, low) for (x, _), (low, _) in zip(s.points, s.bounds, strict=True)]
        around += [(x, high) for (x, _), (_, high) in zip(s.points[::-1], s.bounds[::-1], strict=True)]
        parts.append(f'<polygon class="band f{color}" points="{f.path(around)}"/>')
    faint = s.smooth and len(s.points) > 30
    if len(s.points) > 1:
        parts.append(f'<polyline class="line c{color}{" faint" * faint}" points="{f.path(s.points)}"/>')
    if faint:
        parts.append(f'<polyline class="line c{color}" points="{f.path(_smoothed(s.points))}"/>')
    if s.dots or len(s.points) == 1:
        parts += [
            f'<circle class="f{color}" cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>' for x, y in (f.at(*p) for p in s.points)
        ]
    return parts


def _areas(f: _Frame, layers: Sequence[Series]) -> list[str]:
    below = [(x, 0.0) for x, _ in layers[0].points]
    parts = []
    for number, s in enumerate(layers):
        points = f.path([*s.points, *below[::-1]])
        parts.append(f'<polygon class="area f{number % len(LIGHT)}" points="{points}"/>')
        below = s.points
    return parts


def _smoothed(points: Points) -> Points:
    # An exponential mean over about a fifteenth of the run, from both sides so that it does not lag.
    there = _exponential_mean([y for _, y in points])
    back = _exponential_mean([y for _, y in reversed(points)])[::-1]
    return [(x, (a + b) / 2) for (x, _), a, b in zip(points, there, back, strict=True)]


def _exponential_mean(values: list[float]) -> list[float]:
    keep = 1 - 1 / max(len(values) / 15, 1)
    total = weight = 0.0
    out: list[float] = []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(total / weight)
    return out


def _legend_width(label: str) -> float:
    return 32 + 6.0 * len(label)


def _legend_places(chart: Chart) -> list[list[int]]:
    """The numbers of the series on each line of the legend."""
    if len(chart.series) < 2 and not any(s.dots for s in chart.series):
        return []
    lines: list[list[int]] = [[]]
    width = 0.0
    for number, s in enumerate(chart.series):
        wide = _legend_width(s.label)
        if lines[-1] and width + wide > WIDTH - _LEFT - _RIGHT:
            lines.append([])
            width = 0.0
        lines[-1].append(number)
        width += wide
    return lines


def _legend_is_long(chart: Chart) -> bool:
    """Whether it finds no room beside the title."""
    return sum(_legend_width(s.label) for s in chart.series) + 7.5 * len(chart.title) > WIDTH - _LEFT - _RIGHT


def _legend(chart: Chart) -> list[str]:
    lines = _legend_places(chart)
    beside = len(lines) == 1 and not _legend_is_long(chart)
    parts = []
    for row, numbers in enumerate(lines):
        width = sum(_legend_width(chart.series[n].label) for n in numbers)
        x = WIDTH - _RIGHT - width + 10 if beside else float(_LEFT)
        y = 18 if beside else 22 + _LEGEND_LINE * (row + 1) - 4
        for n in numbers:
            s, color = chart.series[n], n % len(LIGHT)
            if chart.stacked:
                parts.append(f'<rect class="area f{color}" x="{x:.1f}" y="{y - 5}" width="14" height="10"/>')
            elif s.dots:
                parts.append(f'<circle class="f{color}" cx="{x + 8:.1f}" cy="{y}" r="3.2"/>')
            else:
                parts.append(f'<line class="line c{color}" x1="{x:.1f}" x2="{x + 15:.1f}" y1="{y}" y2="{y}"/>')
            parts.append(f'<text x="{x + 19:.1f}" y="{y + 4}">{escape(s.label)}</text>')
            x += _legend_width(s.label)
    return parts
