"""Accuracy against tokens as SVG: a line for each method over a logarithmic axis, with intervals as bars."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpost.metrics.charts import LIGHT, ticks
from jaxpost.report.text import html, percent

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 460, 62, 210, 40, 52
STYLE = (
    "text{font:12px system-ui,Helvetica,Arial,sans-serif;fill:#24292f}.grid{stroke:#e4e8ec}"
    + "".join(f".c{i}{{stroke:{color}}}.f{i}{{fill:{color}}}" for i, color in enumerate(LIGHT))
    + ".line{fill:none;stroke-width:1.7;stroke-linejoin:round}.whisker{stroke-width:1;stroke-opacity:.55}"
)
DASHES = ("", "6 3", "2 3")
"""After the colours: the ninth line has the first one's colour and another pattern."""


def budget_chart(
    lines: Sequence[Mapping[str, Any]], *, title: str = "Accuracy against tokens", style: str = STYLE
) -> str:
    """An SVG document of the lines of curve.jsonl.

    Args:
      lines: {"method", "budget", "accuracy": [value, low, high], "tokens": [value, low, high]}.

    Raises:
      ValueError: there are none.

    Example:
      >>> line = {"method": "greedy", "budget": 64, "accuracy": [0.5, 0.4, 0.6], "tokens": [20.0, 18.0, 22.0]}
      >>> budget_chart([line]).count("<circle")
      2
    """
    if not lines:
        raise ValueError("there is nothing to draw: curve.jsonl is empty")
    methods = list(dict.fromkeys(line["method"] for line in lines))
    spent = [max(float(line["tokens"][0]), 1.0) for line in lines]
    shares = [float(x) for line in lines for x in line["accuracy"] if math.isfinite(x)]
    frame = _Frame((min(spent) * 0.85, max(spent) * 1.18), (max(min(shares) - 0.03, 0.0), min(max(shares) + 0.03, 1.0)))
    parts = [f'<text x="{LEFT}" y="22" font-weight="600">{html(title)}</text>', *frame.axes()]
    for number, method in enumerate(methods):
        own = sorted((line for line in lines if line["method"] == method), key=lambda line: line["tokens"][0])
        parts += _line(frame, own, number)
        parts += _key(method, number)
    height = max(HEIGHT, TOP + 18 * len(methods) + BOTTOM)
    inside = f"<style>{style}</style>" if style else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="budget" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{html(title)}">{inside}{"".join(parts)}</svg>\n'
    )


class _Frame:
    """Where values lie: tokens by their logarithm, accuracy upwards."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]):
        self.x = (math.log(x[0]), math.log(x[1]))
        self.y = y if y[1] > y[0] else (0.0, 1.0)

    def at(self, tokens: float | int, accuracy: float | int) -> tuple[float, float]:
        across = (math.log(max(tokens, 1.0)) - self.x[0]) / (self.x[1] - self.x[0])
        up = (accuracy - self.y[0]) / (self.y[1] - self.y[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - BOTTOM - TOP)

    def axes(self) -> list[str]:
        parts = []
        for tick in ticks(*self.y):
            _, y = self.at(1.0, tick)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{percent(tick, 0)}</text>')
        for tick in self._tokens():
            x, _ = self.at(tick, self.y[0])
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:,.0f}</text>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(
            f'<text x="{middle:.0f}" y="{HEIGHT - 12}" text-anchor="middle">tokens a prompt, verifier included</text>'
        )
        return parts

    def _tokens(self) -> list[float]:
        """Round numbers within the axis: powers of two where it spans little, else of ten."""
        low, high = math.exp(self.x[0]), math.exp(self.x[1])
        base = 2.0 if high / low < 200 else 10.0
        first, last = math.ceil(math.log(low, base) - 1e-9), math.floor(math.log(high, base) + 1e-9)
        return [base**power for power in range(first, last + 1)]


def _line(frame: _Frame, own: Sequence[Mapping[str, Any]], number: int) -> list[str]:
    color, dash = number % len(LIGHT), DASHES[number // len(LIGHT) % len(DASHES)]
    points = [frame.at(line["tokens"][0], line["accuracy"][0]) for line in own]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    pattern = f' stroke-dasharray="{dash}"' if dash else ""
    parts = [f'<polyline class="line c{color}"{pattern} points="{path}"/>'] if len(points) > 1 else []
    for line, (x, y) in zip(own, points, strict=True):
        value, low, high = (float(v) for v in line["accuracy"])
        (_, top), (_, bottom) = frame.at(1.0, min(high, frame.y[1])), frame.at(1.0, max(low, frame.y[0]))
        said = f"{line['method']}, budget {line['budget']}: {percent(value)} [{100 * low:.1f}, {100 * high:.1f}], "
        said += f"{line['tokens'][0]:.0f} tokens"
        parts.append(f'<line class="whisker c{color}" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>')
        parts.append(f'<circle class="f{color}" cx="{x:.1f}" cy="{y:.1f}" r="3.6"><title>{html(said)}</title></circle>')
    return parts


def _key(method: str, number: int) -> list[str]:
    color, dash = number % len(LIGHT), DASHES[number // len(LIGHT) % len(DASHES)]
    x, y = WIDTH - RIGHT + 14, TOP + 10 + 18 * number
    pattern = f' stroke-dasharray="{dash}"' if dash else ""
    return [
        f'<line class="line c{color}"{pattern} x1="{x}" x2="{x + 22}" y1="{y}" y2="{y}"/>',
        f'<circle class="f{color}" cx="{x + 11}" cy="{y}" r="3"/>',
        f'<text x="{x + 28}" y="{y + 4}">{html(method, 28)}</text>',
    ]
