"""The page itself: one HTML file that asks for nothing from outside, in any light and on any screen."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxpost import disk
from jaxpost.eval.statistics import Interval, PairedTest
from jaxpost.metrics.charts import WIDTH, Chart, draw, frame
from jaxpost.report.data import chart_table, embed
from jaxpost.report.results import Row
from jaxpost.report.text import html, p_value, percent

RESULT_HEAD = ("evaluation", "items", "before", "after", "difference, points", "became right / wrong", "paired test")
_HERE = Path(__file__).parent


def page(title: str, body: str, data: Mapping[str, Any]) -> str:
    """A whole document. Only the one script whose hash the page names may run, and nothing is loaded."""
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    style = (_HERE / "page.css").read_text(encoding="utf-8")
    seal = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{seal}'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n{body}\n"
        f'<script type="application/json" id="data">{embed(data)}</script>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def write(path: Path, text: str) -> Path:
    """Write a file as a whole, so that a reader never sees half of it; returns it."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with disk.writing(path):
            temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return path


def framed(
    head: tuple[str, str],
    parts: Mapping[str, tuple[str, str]],
    *,
    state: str = "",
    tiles: str = "",
    notices: Sequence[str] = (),
) -> str:
    """A page's body: head-line, numbers, notices, links, and the parts (name -> title, content) that have content."""
    shown = {name: part for name, part in parts.items() if part[1]}
    links = "".join(f'<a href="#{name}-section">{html(title)}</a>' for name, (title, _) in shown.items())
    top = f'<header><h1>{html(head[0])}</h1><p>{html(head[1])}</p><p class="dim">{html(state)}</p></header>'
    told = "".join(f'<p class="notice">{html(notice)}</p>' for notice in dict.fromkeys(notices))
    blocks = [section(name, title, content) for name, (title, content) in shown.items()]
    return "\n".join([top, tiles, told, f"<nav>{links}</nav>", *blocks])


def section(name: str, title: str, content: str) -> str:
    """A heading that can be linked to, and what stands under it; nothing without content."""
    return f'<section id="{name}-section">\n<h2>{html(title)}</h2>\n{content}\n</section>' if content else ""


def tiles(found: Iterable[tuple[str, str]]) -> str:
    """Numbers to see first: (number, what it is)."""
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{html(n)}</b><span>{html(what)}</span></div>' for n, what in found)
        + "</div>"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], name: str = "numbers") -> str:
    """Rows of cells that are markup already."""
    titles = "".join(f"<th>{html(title)}</th>" for title in head)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in rows)
    inner = f"<thead><tr>{titles}</tr></thead><tbody>{lines}</tbody>"
    return f'<div class="scroll"><table class="{name}">{inner}</table></div>'


def share(found: Interval | None) -> str:
    """A share with its interval, in per cent.

    >>> share(Interval(0.5, 0.4, 0.6))
    '50.0% <span class="dim">[40.0, 60.0]</span>'
    """
    if found is None:
        return '<span class="dim">–</span>'
    if found.low == found.high:
        return percent(found.value)
    return f'{percent(found.value)} <span class="dim">[{100 * found.low:.1f}, {100 * found.high:.1f}]</span>'


def points_of(found: Interval | None) -> str:
    """A difference of shares in percentage points, green or red where its interval leaves out 0.

    >>> points_of(Interval(0.401, 0.3, 0.5))
    '<span class="good">+40.1</span> <span class="dim">[+30.0, +50.0]</span>'
    """
    if found is None:
        return '<span class="dim">–</span>'
    kind = "good" if found.low > 0 else "bad" if found.high < 0 else "dim"
    interval = f"[{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    return f'<span class="{kind}">{100 * found.value:+.1f}</span> <span class="dim">{interval}</span>'


def tested(test: PairedTest | None) -> tuple[str, str]:
    """(became right / wrong, p) of a paired test."""
    if test is None:
        return '<span class="dim">–</span>', '<span class="dim">–</span>'
    return f"{test.gained} / {test.lost}", p_value(test.p)


def result_row(row: Row, *, items: int | None, name: str) -> list[str]:
    """One line of the table of results."""
    return [
        html(name),
        "–" if items is None else str(items),
        share(row.before),
        share(row.after),
        points_of(row.difference),
        *tested(row.test),
    ]


def figures(charts: Sequence[Chart], first: int) -> str:
    """Charts side by side, numbered from `first` for the script."""
    return (
        '<div class="charts">\n'
        + "".join(
            f'<figure><svg viewBox="0 0 {WIDTH} {frame(chart).height}" role="img" aria-label="{html(chart.title)}" '
            f'data-chart="{first + i}">{draw(chart)}</svg><figcaption></figcaption></figure>\n'
            for i, chart in enumerate(charts)
        )
        + "</div>"
    )


def all_figures(charts: Mapping[str, Sequence[Chart]]) -> tuple[str, list[dict[str, Any]]]:
    """Every heading with its charts, and what the script reads of them."""
    parts, shown = [], 0
    for heading, group in charts.items():
        parts.append(f"<h3>{html(heading)}</h3>\n{figures(group, shown)}")
        shown += len(group)
    return "\n".join(parts), chart_table(chart for group in charts.values() for chart in group)


def bar(parts: Sequence[tuple[int, str]]) -> str:
    """Counts as one bar, with what each part is."""
    total = sum(count for count, _ in parts) or 1
    blocks = "".join(
        f'<i class="b{i % 4}" style="width:{100 * count / total:.2f}%"></i>'
        for i, (count, _) in enumerate(parts)
        if count
    )
    keys = "".join(
        f'<p><i class="key b{i % 4}"></i><b>{count}</b> {html(what)}</p>' for i, (count, what) in enumerate(parts)
    )
    return f'<div class="bar">{blocks}</div>{keys}'


def folded(title: str, content: str) -> str:
    """What is shown on request."""
    return f"<details><summary>{html(title)}</summary>\n{content}\n</details>"
