"""The budget curve of several searches as a page and an SVG file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxpost.report import page
from jaxpost.report.budget_chart import budget_chart
from jaxpost.report.text import html, percent


def write_curve(folder: Path | str) -> Path:
    """Writes curve.svg and report.html of a folder of `jaxpost search-curve`; returns the page.

    Raises:
      FileNotFoundError: no curve.jsonl there.
    """
    folder = Path(folder)
    path = folder / "curve.jsonl"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no curve.jsonl: `jaxpost search-curve PRESET... --out {folder}` writes it"
        )
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    page.write(folder / "curve.svg", budget_chart(lines))
    parts = {
        "curves": ("Accuracy against tokens", f'<figure class="wide">{budget_chart(lines, style="")}</figure>{_NOTE}'),
        "numbers": ("Numbers", _table(lines)),
        "chosen": ("What the allocators chose", _chosen(lines)),
    }
    methods = list(dict.fromkeys(line["method"] for line in lines if line["kind"] == "method"))
    prompts = next((f"{line['prompts']} prompts, {line['seeds']} seeds" for line in lines if "prompts" in line), "")
    body = page.framed(("Budget curve", ", ".join(methods)), parts, state=prompts)
    data = {"columns": [], "sources": [], "samples": [], "charts": [], "changes": [], "texts": []}
    return page.write(folder / "report.html", page.page("Budget curve", body, data))


_NOTE = (
    '<p class="dim">Each point: the share of prompts whose chosen answer is right (mean over seeds), with a 95% '
    "interval over prompts (a bootstrap; Wilson's where each is right or wrong in all seeds), at the mean tokens that "
    "were spent. compute-optimal: the best method within the budget by difficulty, chosen on one half of the prompts "
    "and reported on the other. fitted allocator: a total is spent where the marginal gain is greatest, fitted on one "
    "half and replayed on the other.</p>"
)


def _table(lines: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for line in lines:
        known = [_share(line["accuracy"]), _share(line["any"]) if "any" in line else "–"]
        tokens = f"{line['tokens'][0]:,.0f}"
        rows.append([html(line["method"]), f"{line['budget']:,}", tokens, *known, str(line.get("failed", "–"))])
    return page.table(
        ("method", "budget", "tokens spent", "chosen answer right", "any candidate right", "failed"), rows
    )


def _share(value: Sequence[float]) -> str:
    return f'{percent(value[0])} <span class="dim">[{100 * value[1]:.1f}, {100 * value[2]:.1f}]</span>'


def _chosen(lines: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for line in lines:
        chosen = line.get("chosen")
        if isinstance(chosen, dict):
            said = ", ".join(f"{name} × {count}" for name, count in sorted(chosen.items(), key=lambda item: -item[1]))
        elif chosen:
            said = "; ".join(", ".join(names) for names in chosen)
        else:
            continue
        rows.append([html(line["method"]), f"{line['budget']:,}", html(said)])
    return page.table(("", "budget", "method@budget"), rows) if rows else ""
