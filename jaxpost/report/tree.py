"""A search's tree as a picture: SVG from left to right, with scores, visits, the chosen path and what was pruned.

The texts are a model's: they are shortened, cleaned and escaped; the whole text stands in each node's tooltip.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxpost.report.text import html

WIDTH, HEIGHT, ACROSS, DOWN, MARGIN = 208, 46, 252, 58, 10
LETTERS = 28
"""Of a node's text that are shown."""
FACTS = 42
"""Of its numbers."""
MOST_NODES = 160
"""That one picture shows; the chosen path and the best of the others come first."""
STYLE = (
    "text{font:11px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;fill:#1f2328}"
    ".facts{font:10px system-ui,Helvetica,Arial,sans-serif;fill:#59636e}"
    ".node{fill:#f6f8fa;stroke:#b8c0c8}.edge{fill:none;stroke:#b8c0c8;stroke-width:1.2}"
    ".bar{fill:#1f6feb;fill-opacity:.75}.chosen .node{stroke:#1a7f45;stroke-width:2.4;fill:#e9f6ee}"
    ".edge.chosen{stroke:#1a7f45;stroke-width:3}.done .node{stroke-dasharray:none}"
    ".pruned{opacity:.42}.pruned .node{stroke-dasharray:4 3}.edge.pruned{opacity:.42;stroke-dasharray:4 3}"
)
"""Of a picture that stands alone; a page has its own (page.css), light and dark."""


@dataclass
class _Box:
    """A node as it is drawn: one node, or a run of single tokens without a fork."""

    number: int
    text: str
    tokens: int
    facts: Mapping[str, Any]
    chosen: bool
    pruned: bool
    children: list[_Box] = field(default_factory=list)
    hidden: int = 0
    """Nodes below it that are not shown."""
    row: float = 0.0
    column: int = 0


def tree_svg(record: Mapping[str, Any], *, title: str = "", style: str = STYLE) -> str:
    """The tree of one prompt as an SVG document.

    Args:
      record: {"nodes": [{"number", "parent", "text", "tokens", "score", "visits", ...}], "chosen": [numbers]}, as a
        line of trees.jsonl.
      title: what the root shows.

    Example:
      >>> nodes = [{"number": 0, "parent": None, "text": ""}, {"number": 1, "parent": 0, "text": "<b>", "score": 0.5}]
      >>> "&lt;b&gt;" in tree_svg({"nodes": nodes, "chosen": [0, 1]})
      True
    """
    boxes = _boxes(record, title)
    if not boxes:
        return _document(260, 40, '<text x="10" y="24">the tree is empty</text>', style)
    rows = _place(boxes[0])
    scores = [score for box in boxes if (score := _number(box.facts.get("score"))) is not None]
    visits = max((int(box.facts.get("visits", 0)) for box in boxes), default=0)
    parts = [_edge(box, child, visits) for box in boxes for child in box.children]
    parts += [_drawn(box, scores) for box in boxes]
    width = MARGIN * 2 + ACROSS * max(box.column for box in boxes) + WIDTH + 60
    return _document(width, MARGIN * 2 + DOWN * rows, "".join(parts), style)


def _document(width: float | int, height: float | int, body: str, style: str) -> str:
    inside = f"<style>{style}</style>" if style else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="tree" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img">{inside}{body}</svg>'
    )


def _boxes(record: Mapping[str, Any], title: str) -> list[_Box]:
    """Boxes of the searched tree, parents first; asides are not part of it."""
    nodes = [node for node in record.get("nodes", ()) if "prompt" not in node]
    below: dict[Any, list[Mapping[str, Any]]] = {}
    for node in nodes:
        below.setdefault(node.get("parent"), []).append(node)
    if not below.get(None):
        return []
    root, chosen = below[None][0], frozenset(record.get("chosen", ()))
    kept = _kept(root, below, chosen)
    out: list[_Box] = []
    stack: list[tuple[Mapping[str, Any], _Box | None]] = [(root, None)]
    while stack:
        node, parent = stack.pop()
        run = [node]
        while _joins(run[-1], below, parent is None):
            run.append(below[run[-1]["number"]][0])
        last = run[-1]
        text = title or "prompt" if parent is None else "".join(str(n.get("text", "")) for n in run)
        box = _Box(
            last["number"], text, sum(int(n.get("tokens", 0)) for n in run), last, last["number"] in chosen,
            bool(last.get("pruned")) and last["number"] not in chosen and last.get("end") != "stop",
        )  # fmt: skip
        out.append(box)
        if parent is not None:
            parent.children.append(box)
        children = below.get(last["number"], [])
        shown = [child for child in children if child["number"] in kept]
        box.hidden = len(children) - len(shown)
        stack += [(child, box) for child in reversed(shown)]
    return out


def _joins(node: Mapping[str, Any], below: Mapping[Any, list[Mapping[str, Any]]], is_root: bool) -> bool:
    """Whether a node is drawn in one box with its child: both single tokens without a score, and no fork between."""
    children = below.get(node["number"], [])
    if is_root or len(children) != 1:
        return False
    pair = (node, children[0])
    return all(int(n.get("tokens", 0)) <= 1 and "score" not in n and "visits" not in n for n in pair)


def _kept(root: Mapping[str, Any], below: Mapping[Any, list[Mapping[str, Any]]], chosen: frozenset[int]) -> set[int]:
    """Numbers of the nodes that are shown: level by level, those not pruned, much visited or well scored first."""
    kept, level = {root["number"]}, [root]
    while level:
        found = [child for node in level for child in below.get(node["number"], [])]
        found.sort(key=lambda n: (n["number"] not in chosen, bool(n.get("pruned")), -int(n.get("visits", 0)),
                                  -(_number(n.get("score")) or 0.0)))  # fmt: skip
        level = [n for i, n in enumerate(found) if n["number"] in chosen or len(kept) + i < MOST_NODES]
        kept |= {node["number"] for node in level}
    return kept


def _place(root: _Box) -> int:
    """Rows of leaves from top to bottom, parents in the middle of their children; how many rows there are."""
    rows = 0
    order: list[_Box] = []
    stack = [root]
    while stack:
        box = stack.pop()
        order.append(box)
        for child in reversed(box.children):
            child.column = box.column + 1
            stack.append(child)
    for box in order:
        if not box.children:
            box.row, rows = float(rows), rows + 1
    for box in reversed(order):
        if box.children:
            box.row = (box.children[0].row + box.children[-1].row) / 2
    return rows


def _edge(parent: _Box, child: _Box, visits: int) -> str:
    x, y = MARGIN + ACROSS * parent.column + WIDTH, MARGIN + DOWN * parent.row + HEIGHT / 2
    to_x, to_y = MARGIN + ACROSS * child.column, MARGIN + DOWN * child.row + HEIGHT / 2
    middle = (x + to_x) / 2
    kind = " chosen" * (parent.chosen and child.chosen) + " pruned" * child.pruned
    seen = int(child.facts.get("visits", 0))
    wide = f' style="stroke-width:{1.2 + 3 * seen / visits:.1f}"' if visits and seen else ""
    curve = f"M{x:.0f} {y:.1f} C{middle:.0f} {y:.1f} {middle:.0f} {to_y:.1f} {to_x:.0f} {to_y:.1f}"
    return f'<path class="edge{kind}"{wide} d="{curve}"/>'


def _drawn(box: _Box, scores: Sequence[float]) -> str:
    x, y = MARGIN + ACROSS * box.column, MARGIN + DOWN * box.row
    kind = "box" + " chosen" * box.chosen + " pruned" * box.pruned + " done" * (box.facts.get("end") == "stop")
    parts = [f'<g class="{kind}"><title>{_whole(box)}</title>']
    parts.append(f'<rect class="node" x="{x}" y="{y:.1f}" width="{WIDTH}" height="{HEIGHT}" rx="6"/>')
    score = _number(box.facts.get("score"))
    if score is not None and scores:
        low, high = min(0.0, *scores), max(1.0, *scores)
        share = (score - low) / (high - low) if high > low else 1.0
        parts.append(f'<rect class="bar" x="{x + 4}" y="{y + HEIGHT - 6:.1f}" width="{(WIDTH - 8) * share:.1f}" '
                     'height="3" rx="1.5"/>')  # fmt: skip
    parts.append(f'<text x="{x + 8}" y="{y + 18:.1f}">{html(_short(box.text))}</text>')
    parts.append(f'<text class="facts" x="{x + 8}" y="{y + 34:.1f}">{html(_facts(box))}</text>')
    if box.hidden:
        more = f"+{box.hidden} more"
        parts.append(f'<text class="facts" x="{x + WIDTH + 6}" y="{y + 14:.1f}">{more}</text>')
    return "".join([*parts, "</g>"])


def _facts(box: _Box) -> str:
    """Score, value, visits, end, length, what it is for: as many as the box has room for."""
    facts, parts = box.facts, []
    score, value = _number(facts.get("score")), _number(facts.get("value"))
    if score is not None:
        parts.append(f"score {score:.3g}")
    if value is not None and (score is None or abs(value - score) > 5e-4):
        parts.append(f"value {value:.3g}")
    if facts.get("visits"):
        parts.append(f"{facts['visits']} visits")
    ends = {"stop": "ends", "length": "cut"}
    parts += [ends[facts["end"]]] if facts.get("end") in ends else []
    if box.tokens:
        parts.append(f"{box.tokens} tok")
    if (prior := _number(facts.get("prior"))) is not None and score is None:
        parts.append(f"p {prior:.2g}")
    parts += [str(facts["note"])] if facts.get("note") else []
    kept, room = [], FACTS
    for part in parts:
        room -= len(part) + 3
        kept += [part] if room >= 0 else []
    return " · ".join(kept)


def _whole(box: _Box) -> str:
    """The tooltip: all of the text, then everything known."""
    known = {k: v for k, v in box.facts.items() if k not in ("text", "parent", "facts")}
    known |= {f"fact {key}": value for key, value in dict(box.facts.get("facts") or {}).items()}
    lines = [box.text, "", *(f"{key}: {value}" for key, value in known.items())]
    return html("\n".join(lines))


def _short(text: str) -> str:
    """One line; its beginning and end where it is too long."""
    line = " ".join(text.replace("\n", " ⏎ ").split()) or ("␣" if text else "(nothing)")
    return line if len(line) <= LETTERS else f"{line[: LETTERS - 10]}…{line[-9:]}"


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def asides(record: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Other prompts that the search asked: (prompt, what was answered)."""
    nodes = record.get("nodes", ())
    roots = [node for node in nodes if "prompt" in node]
    answers: dict[Any, list[str]] = {}
    for node in nodes:
        answers.setdefault(node.get("parent"), []).append(str(node.get("text", "")))
    return [(_prompt(root["prompt"]), answers.get(root["number"], [])) for root in roots]


def _prompt(prompt: Any) -> str:
    if isinstance(prompt, list):
        return "\n".join(
            f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in prompt if isinstance(turn, dict)
        )
    return str(prompt)
