"""A run's metrics drawn as one SVG: small charts, one for each thing worth watching."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from jaxpost.metrics.charts import HEIGHT, STYLE, WIDTH, Chart, Points, Series, draw, frame, thin


def draw_curves(records: Sequence[Mapping[str, Any]], *, title: str = "run") -> str:
    """An SVG of a run's metrics.jsonl: loss and reward with evaluations, gradient norm, learning rate, speed.

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
    held_out = {k.removesuffix("/accuracy"): k for r in evals for k in r if k.endswith("/accuracy")}
    charts = [
        Chart("loss", _series(train, {"train": "loss"}) + _series(evals, {"held out": eval_key}, dots=True)),
        Chart("reward", _series(train, {"train": "reward"})),
        Chart("accuracy", _series(evals, held_out, dots=True)),
        Chart("rewards of both sides", _series(train, {"chosen": "rewards/chosen", "rejected": "rewards/rejected"})),
        Chart("pairs in the right order", _series(train, {"train": "rewards/accuracy"})),
        Chart("gradient norm", _series(train, {"train": "grad_norm"})),
        Chart("learning rate", _series(train, {"train": "lr"}, smooth=False), from_zero=True),
        Chart("tokens per second", _series(speed, {"train": "v"}), from_zero=True),
    ]
    charts = [chart for chart in charts if chart.series]
    columns = min(2, max(len(charts), 1))
    tall = max((frame(chart).height for chart in charts), default=HEIGHT)
    width, height = columns * WIDTH, (math.ceil(len(charts) / columns) or 1) * tall + 30
    body = [
        f'<g transform="translate({i % columns * WIDTH},{i // columns * tall + 30})">{draw(chart)}</g>'
        for i, chart in enumerate(charts)
    ]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui,Helvetica,Arial,sans-serif" font-size="11"><style>{STYLE}</style>'
        f'<rect width="{width}" height="{height}" fill="white"/>'
        f'<text x="14" y="21" font-size="14" font-weight="600">{escape(title)}</text>'
    )
    return head + "".join(body) + "</svg>\n"


def points(records: Sequence[Mapping[str, Any]], key: str) -> Points:
    """(step, value) of the records that have a finite number under this key, thinned."""
    return thin([(r["step"], r[key]) for r in records if isinstance(r.get(key), int | float)])


def _series(
    records: Sequence[Mapping[str, Any]], keys: Mapping[str, str], *, dots: bool = False, smooth: bool = True
) -> list[Series]:
    return [
        Series(label, found, dots=dots, smooth=smooth and not dots)
        for label, key in keys.items()
        if (found := points(records, key))
    ]
