"""A run's metrics drawn as one SVG, with nothing but text: small panels, one for each thing worth watching."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

Points = list[tuple[float, float]]
_WIDTH, _HEIGHT = 460, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 34, 34
_INK, _GRID, _LINE, _PALE, _DOT = "#24292f", "#e4e8ec", "#1f6feb", "#b6d0f7", "#d1570a"
_MAX_POINTS = 1500


@dataclass(frozen=True)
class Panel:
    """One plot: a line over steps, optionally smoothed, and dots (evaluations)."""

    title: str
    line: Points
    dots: Points
    smooth: bool = False
    from_zero: bool = False


def draw_curves(records: Sequence[Mapping[str, Any]], *, title: str = "run") -> str:
    """An SVG of a run's metrics.jsonl: loss with evaluations, gradient norm, learning rate, speed.

    Args:
        records: as read from metrics.jsonl; values that are not finite are left out.

    Example:
        >>> svg = draw_curves([{"step": s, "kind": "train", "loss": 1 / s} for s in (1, 2, 3)])
        >>> svg.startswith("<svg"), "loss" in svg
        (True, True)
    """
    train = [r for r in records if r.get("kind") == "train"]
    evals = [r for r in records if r.get("kind") == "eval"]
    eval_key = next((k for r in evals for k in r if k == "loss" or (k.endswith("/loss") and "best" not in k)), "loss")
    speed = [{"step": r["step"], "v": r.get("time", {}).get("tokens_per_second", math.nan)} for r in train]
    panels = [
        Panel("loss", _points(train, "loss"), _points(evals, eval_key), smooth=True),
        Panel("gradient norm", _points(train, "grad_norm"), [], smooth=True),
        Panel("learning rate", _points(train, "lr"), [], from_zero=True),
        Panel("tokens per second", _points(speed, "v"), [], smooth=True, from_zero=True),
    ]
    panels = [p for p in panels if p.line or p.dots]
    columns = min(2, max(len(panels), 1))
    rows = math.ceil(len(panels) / columns) or 1
    width, height = columns * _WIDTH, rows * _HEIGHT + 30
    body = [
        f'<g transform="translate({i % columns * _WIDTH},{i // columns * _HEIGHT + 30})">{_panel(p)}</g>'
        for i, p in enumerate(panels)
    ]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui,Helvetica,Arial,sans-serif" font-size="11">'
        f'<rect width="{width}" height="{height}" fill="white"/>'
        f'<text x="14" y="21" font-size="14" font-weight="600" fill="{_INK}">{escape(title)}</text>'
    )
    return head + "".join(body) + "</svg>\n"


def _points(records: Sequence[Mapping[str, Any]], key: str) -> Points:
    found = [(float(r["step"]), float(r[key])) for r in records if isinstance(r.get(key), int | float)]
    found = [(x, y) for x, y in found if math.isfinite(y)]
    stride = math.ceil(len(found) / _MAX_POINTS) or 1
    return found[::stride]


def _smoothed(points: Points) -> Points:
    # An exponential mean over about a thirtieth of the run, from both sides so that it does not lag.
    there = _exponential_mean([y for _, y in points])
    back = _exponential_mean([y for _, y in reversed(points)])[::-1]
    return [(x, (a + b) / 2) for (x, _), a, b in zip(points, there, back, strict=True)]


def _exponential_mean(values: list[float]) -> list[float]:
    keep = 1 - 1 / max(len(values) / 30, 1)
    total = weight = 0.0
    out: list[float] = []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(total / weight)
    return out


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


def _range(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    # A curve that never goes below 0 gets no axis below 0.
    return (max(low - margin, 0.0) if low >= 0 else low - margin), high + margin


def _label(value: float | int) -> str:
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.10g}"


def _panel(panel: Panel) -> str:
    every = panel.line + panel.dots
    x0, x1 = 0.0, max(1.0, *(x for x, _ in every))
    y0, y1 = _range([y for _, y in every] + [0.0] * panel.from_zero)
    inner_w, inner_h = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        return _LEFT + (x - x0) / (x1 - x0) * inner_w, _TOP + (1 - (y - y0) / (y1 - y0)) * inner_h

    parts = [f'<text x="{_LEFT}" y="22" font-weight="600" fill="{_INK}">{panel.title}</text>']
    for tick in ticks(y0, y1):
        _, y = at(x0, tick)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{_GRID}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end" fill="{_INK}">{_label(tick)}</text>')
    for tick in (t for t in ticks(x0, x1) if t == int(t)):
        x, _ = at(tick, y0)
        parts.append(
            f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle" fill="{_INK}">{tick:.0f}</text>'
        )
    faint = panel.smooth and len(panel.line) > 30
    parts.append(_polyline([at(*p) for p in panel.line], _PALE if faint else _LINE, 1.0 if faint else 1.6))
    if faint:
        parts.append(_polyline([at(*p) for p in _smoothed(panel.line)], _LINE, 1.8))
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{_DOT}"/>' for x, y in (at(*p) for p in panel.dots)]
    if panel.dots:
        parts.append(_legend())
    return "".join(parts)


def _polyline(points: Points, color: str, width: float) -> str:
    if len(points) < 2:
        return "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{color}"/>' for x, y in points)
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}" stroke-linejoin="round"/>'


def _legend() -> str:
    x = _WIDTH - _RIGHT - 118
    return (
        f'<line x1="{x}" x2="{x + 16}" y1="18" y2="18" stroke="{_LINE}" stroke-width="1.8"/>'
        f'<text x="{x + 21}" y="22" fill="{_INK}">train</text>'
        f'<circle cx="{x + 64}" cy="18" r="3.2" fill="{_DOT}"/><text x="{x + 72}" y="22" fill="{_INK}">held out</text>'
    )
