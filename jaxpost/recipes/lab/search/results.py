"""The lab's comparison of searches as a table, a curve and numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxpost.eval.search import Point, Runs, compute_optimal, markdown, pass_at, point, share
from jaxpost.eval.statistics import Interval
from jaxpost.metrics.charts import STYLE, WIDTH, Chart, Series, draw, frame

OPTIMAL = "compute-optimal"
DRAWN = ("greedy", "best of N", "weighted by score", "majority", "REBASE", "plain policy", "fitted allocation")
"""What the chart shows; the table has all."""


def write(folder: Path, runs: Sequence[Runs], *, title: str, verifiers: str) -> str:
    """table.md, points.json and curve.svg; returns the table."""
    best = compute_optimal(runs)
    lines = [title, "", markdown(runs, against="greedy" if any(r.method == "greedy" for r in runs) else None), ""]
    lines += [
        f"The compute-optimal curve ({OPTIMAL}): at each budget the method that was best on one half of the problems, "
        "reported on the other half, both ways round.",
        "",
        "| budget | tokens spent | top-1 | chosen |",
        "|---|---|---|---|",
    ]
    for each in best:
        chosen = ", ".join(dict.fromkeys(name for half in each.chosen for name in half))
        lines.append(f"| {each.budget} | {each.tokens.value:.0f} | {share(each.accuracy)} | {chosen} |")
    lines += ["", *_passes(runs), "Verifiers on held-out answers of the lab model:", "", verifiers]
    text = "\n".join(lines)
    points = [point(each) for each in runs]
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    kept = {"points": [_plain(p) for p in points], OPTIMAL: [_plain(each) for each in best]}
    (folder / "points.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    (folder / "curve.svg").write_text(svg(chart(points, best)), encoding="utf-8")
    return text


def _passes(runs: Sequence[Runs]) -> list[str]:
    """pass@k of independent samples, from the majority vote's draws at the largest budget."""
    drawn = [each for each in runs if each.method == "majority"]
    if not drawn:
        return []
    outcomes = max(drawn, key=lambda each: each.budget).seeds[0]
    fewest = min(len(o.offered) for o in outcomes)
    ks = [k for k in (1, 2, 4, 8, 16) if k <= fewest]
    told = ", ".join(f"pass@{k} {share(pass_at(outcomes, k))}" for k in ks)
    return [f"Independent samples (seed 0, unbiased, every problem has at least {fewest}): {told}.", ""] if ks else []


def _plain(found: Any) -> dict[str, Any]:
    values = found._asdict()
    return {k: v._asdict() if isinstance(v, Interval) else v for k, v in values.items()}


def chart(points: Sequence[Point], best: Sequence[Any]) -> Chart:
    """Accuracy against tokens spent: a line a method, with its interval."""
    names = [name for name in DRAWN if any(p.method == name for p in points)]
    named = names or list(dict.fromkeys(p.method for p in points))[:6]
    lines = [_line(name, [p for p in points if p.method == name]) for name in named]
    return Chart("Top-1 against tokens spent by problem", [*lines, _line(OPTIMAL, best)], percent=True)


def _line(name: str, points: Sequence[Any]) -> Series:
    ordered = sorted(points, key=lambda p: p.tokens.value)
    return Series(
        name,
        [(p.tokens.value, p.accuracy.value) for p in ordered],
        [(p.accuracy.low, p.accuracy.high) for p in ordered],
        dots=True,
    )


def svg(found: Chart) -> str:
    """A chart as a file of its own."""
    high = frame(found).height
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {high}" font-family="sans-serif" font-size="11">'
    )
    return f'{head}<style>{STYLE}</style><rect width="100%" height="100%" fill="white"/>{draw(found)}</svg>\n'
