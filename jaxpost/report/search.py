"""A search's folder as one page: accuracy with intervals, tokens, every prompt's answer, and its trees."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from jaxpost.metrics.charts import Chart, Series
from jaxpost.report import page
from jaxpost.report.text import clean, html, number, percent
from jaxpost.report.tree import asides, tree_svg

MOST_ROWS = 400


def is_search(folder: Path) -> bool:
    """Whether a folder holds a search."""
    return (folder / "results.jsonl").is_file()


def write_search(folder: Path | str, out: Path | str = "report.html", *, trees: int | None = None) -> Path:
    """Writes a search as one self-contained HTML page.

    Args:
      folder: of a search that has ended, was killed, or is still going on.
      out: the file, relative to the folder.
      trees: most trees that are shown; None: as run.trees says.

    Raises:
      FileNotFoundError: no such search.
    """
    folder = Path(folder)
    if not is_search(folder):
        raise FileNotFoundError(f"{folder} holds no results.jsonl: give the folder of a search, such as runs/best_of_n")
    config = _config(folder)
    rows, notices = _lines(folder / "results.jsonl")
    if trees is None:
        trees = int(config.get("run", {}).get("trees", 20))
    found, more = _lines(folder / "trees.jsonl", most=trees)
    numbers = _json(folder / "summary.json")
    measured, _ = _lines(folder / "metrics.jsonl")
    charts, data = page.all_figures(_charts(measured))
    parts = {
        "prompts": ("Prompts", _table(rows)),
        "trees": ("Trees", _trees(found, rows)),
        "curves": ("As prompts ended", charts),
        "settings": ("Settings and machine", _settings(folder)),
    }
    kind = config.get("search", {}).get("kind", "search")
    head = (f"{folder.resolve().name}: {kind}", f"{config.get('model', {}).get('path', 'a model')}, {_budget(config)}")
    state = f"{len(rows)} prompts, {sum('error' in row for row in rows)} failed"
    body = page.framed(head, parts, state=state, tiles=page.tiles(_tiles(numbers)), notices=[*notices, *more])
    data = {"columns": [], "sources": [], "samples": [], "charts": data, "changes": [], "texts": []}
    return page.write(folder / out, page.page(f"{folder.resolve().name}: search", body, data))


def _budget(config: Mapping[str, Any]) -> str:
    found = config.get("budget")
    return "no limit of tokens" if found is None else f"at most {found} tokens a prompt"


def _tiles(numbers: Mapping[str, Any]) -> list[tuple[str, str]]:
    tiles = []
    for name, what in (("top1", "chosen answers right"), ("any", "some candidate right")):
        if name in numbers:
            value, low, high = numbers[name]
            tiles.append((percent(value), f"{what} [{100 * low:.1f}, {100 * high:.1f}]"))
    tiles += [
        (percent(value[0]), f"{name} [{100 * value[1]:.1f}, {100 * value[2]:.1f}]")
        for name, value in numbers.items()
        if name.startswith("pass@")
    ]
    if "spent" in numbers:
        tiles.append(
            (f"{numbers['spent']:,}", f"tokens: {numbers['generated']:,} generated, {numbers['verified']:,} verifier")
        )
        tiles.append((f"{numbers['spent_per_prompt'][0]:,.0f}", "tokens a prompt"))
    return tiles


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ("", "prompt", "answer", "canonical", "score", "gold", "tokens", "notes")
    cells = []
    for row in rows[:MOST_ROWS]:
        right = row.get("right")
        mark = {True: '<span class="good">right</span>', False: '<span class="bad">wrong</span>'}.get(right, "")
        notes = [*([row["error"]] if "error" in row else []), *row.get("warnings", ())]
        score = number(row.get("score"))
        spent = f"{row.get('generated', 0)} + {row.get('verified', 0)}"
        cells.append([
            f'<a href="#tree-{row["index"]}">{row["index"]}</a> {mark}',
            _folded(row.get("prompt")), _folded(row.get("answer")), html(row.get("canonical"), 60),
            "–" if score is None else f"{score:.3g}", html(row.get("gold"), 60), spent,
            "<br>".join(html(note, 300) for note in notes),
        ])  # fmt: skip
    more = f"<p>{len(rows) - MOST_ROWS} more are in results.jsonl.</p>" if len(rows) > MOST_ROWS else ""
    return page.table(head, cells, "answers") + more


def _folded(text: Any) -> str:
    """A text whose beginning is seen, and whose rest is shown on request."""
    whole = clean(text, 4000)
    line = " ".join(whole.split())
    return (
        html(line)
        if len(line) <= 70
        else page.folded(clean(line, 70).partition(" … (")[0] + "…", f"<pre>{html(whole, None)}</pre>")
    )


def _trees(found: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> str:
    by_index = {row["index"]: row for row in rows}
    parts = []
    for place, record in enumerate(found):
        row = by_index.get(record.get("index"), {})
        title = clean(row.get("prompt"), 200)
        inner = f'<div class="forest">{tree_svg(record, title=title, style="")}</div>'
        for prompt, answers in asides(record)[:40]:
            said = "\n\n".join(answers)
            inner += page.folded(
                f"asked besides: {' '.join(clean(prompt, 80).split())}", f"<pre>{html(prompt)}\n\n→ {html(said)}</pre>"
            )
        state = {True: " (right)", False: " (wrong)"}.get(row.get("right"), "")
        name = f"{record.get('index')}{state}: {' '.join(title.split())[:100]}"
        opened = " open" if place == 0 else ""
        parts.append(
            f'<details id="tree-{record.get("index")}"{opened}><summary>{html(name)}</summary>{inner}</details>'
        )
    key = (
        '<p class="dim">From left to right. Green: the way to the chosen answer. Pale: pruned. The bar is the score, '
        "the width of a line the share of visits; point at a node for its whole text.</p>"
    )
    return key + "\n".join(parts) if parts else ""


def _charts(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Chart]]:
    points = [r for r in records if isinstance(r.get("step"), int)]
    if len(points) < 2:
        return {}
    charts = [
        Chart(
            "tokens spent",
            [
                Series(name, [(float(r["step"]), float(r.get(name, 0))) for r in points])
                for name in ("generated", "verified")
            ],
            from_zero=True,
        )
    ]
    known = [(float(r["step"]), float(r["accuracy"])) for r in points if "accuracy" in r]
    if len(known) > 1:
        charts.append(Chart("accuracy so far", [Series("chosen answer", known)], from_zero=True, percent=True))
    return {"Over prompts": charts}


def _settings(folder: Path) -> str:
    parts = []
    for name in ("config.yaml", "environment.json", "summary.json"):
        if (folder / name).is_file():
            text = (folder / name).read_text(encoding="utf-8", errors="replace")
            parts.append(page.folded(name, f"<pre>{html(text, None)}</pre>"))
    return "\n".join(parts)


def _config(folder: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _lines(path: Path, most: int | None = None) -> tuple[list[dict[str, Any]], list[str]]:
    """Objects of a file's lines; what cannot be read is counted."""
    found, bad = [], 0
    if not path.is_file():
        return [], []
    for line in path.read_bytes().split(b"\n"):
        if most is not None and len(found) >= most:
            break
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            bad += 1
            continue
        if isinstance(row, dict):
            found.append(row)
    return found, [f"{path.name}: {bad} lines cannot be read and are left out."] if bad else []
