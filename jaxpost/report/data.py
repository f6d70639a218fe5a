"""What the page's script reads: samples, changed items and the charts' points, as JSON inside the page."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxpost.metrics.charts import WIDTH, Chart, frame
from jaxpost.report.read import Sample
from jaxpost.report.results import Evaluation


class Texts:
    """A table of texts, each kept once: prompts and gold answers come again and again."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}

    def place(self, text: str) -> int:
        """The text's number."""
        return self._places.setdefault(text, len(self._places))

    @property
    def all(self) -> list[str]:
        return list(self._places)


_ROW = 80
"""Characters that a sample's numbers take."""


def chosen(samples: Sequence[Sample], evaluations: Sequence[Evaluation], budget: int) -> list[Sample]:
    """As many samples as the budget allows: the first and last of every evaluation and of the rollouts come first,
    then steps evenly between. Whole steps are kept, unless the first and last alone are too many.

    Args:
      budget: characters.
    """
    steps: dict[str, list[int]] = {}
    for s in samples:
        known = steps.setdefault(s.source, [])
        if not known or known[-1] != s.step:
            known.append(s.step)
    needed = {(e.name, step) for e in evaluations for step in e.steps}
    needed |= {(source, step) for source, found in steps.items() for step in (found[0], found[-1])}
    stride = 1
    while True:
        kept = needed | {(source, step) for source, found in steps.items() for step in found[::stride]}
        found = [s for s in samples if (s.source, s.step) in kept]
        if sum(map(_size, found)) <= budget:
            return found
        if kept == needed:
            break
        stride *= 2
    left = budget
    fitting = []
    for s in found:
        left -= _size(s)
        if left < 0:
            break
        fitting.append(s)
    return fitting


def _size(sample: Sample) -> int:
    return _ROW + len(sample.prompt) + len(sample.text) + len(sample.answer)


def sample_table(samples: Sequence[Sample], texts: Texts) -> dict[str, Any]:
    """Rows in the order that page.js takes them apart."""
    columns = list(dict.fromkeys(name for s in samples for name in s.rewards))
    sources = list(dict.fromkeys(s.source for s in samples))
    rows = [
        [
            s.step,
            sources.index(s.source),
            texts.place(s.example),
            s.sample,
            texts.place(s.prompt),
            texts.place(s.text),
            texts.place(s.answer),
            [_rounded(s.rewards.get(name)) for name in columns],
            _rounded(s.reward),
            _rounded(s.advantage),
            texts.place(s.finish),
            s.tokens,
        ]
        for s in samples
    ]
    return {"columns": columns, "sources": sources, "samples": rows}


def chart_table(charts: Iterable[Chart]) -> list[dict[str, Any]]:
    """Where each chart's values lie, for the line under the pointer."""
    found = []
    for chart in charts:
        f = frame(chart)
        (left, bottom), (right, top) = f.at(f.x[0], f.y[0]), f.at(f.x[1], f.y[1])
        found.append(
            {
                **{"left": left, "right": right, "top": top, "bottom": bottom, "width": WIDTH, "last": f.x[1]},
                "percent": chart.percent,
                "series": [[s.label, [[_rounded(x), _rounded(y)] for x, y in s.points]] for s in chart.series],
            }
        )
    return found


def _rounded(value: float | int | None) -> float | int | None:
    """Six digits; None where JSON has no such number."""
    if value is None or not math.isfinite(value):
        return None
    short = float(f"{value:.6g}")
    return int(short) if short == int(short) and abs(short) < 1e15 else short


def embed(data: Mapping[str, Any]) -> str:
    """JSON that no text in it can break out of a script element with: ASCII alone, and no <, > or &.

    >>> embed({"a": "</script>"})
    '{"a":"\\\\u003c/script\\\\u003e"}'
    """
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
