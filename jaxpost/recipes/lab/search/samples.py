"""The lab model's own answers to training problems, labelled: what its outcome and process reward models learn from.

Each problem's answers are a tree of steps. An answer is right if its last number is the problem's answer; a step's
label is the share of the tree's answers below it that are right (`search.export`, after Math-Shepherd, 2312.08935).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxpost.recipes.lab.model import LONGEST
from jaxpost.search.contract import Found, Policy, Search
from jaxpost.search.drive import search
from jaxpost.search.export import Grown, grown, step_rows
from jaxpost.search.requests import Draw
from jaxpost.search.tree import Problem

SEPARATOR = ";"
BRANCHES = (4, 2, 2)
"""Children of the root, of first steps and of second steps; further steps have one."""


def last_number(text: str) -> str | None:
    """What an answer states: its last whole number, as votes and labels compare it.

    >>> last_number("40+30=70;70+15=085"), last_number("none")
    ('85', None)
    """
    digits = ""
    for at in range(len(text) - 1, -1, -1):
        if text[at].isdigit():
            digits = text[at] + digits
        elif digits:
            negative = text[at] == "-" and (at == 0 or text[at - 1] in "=;")
            return str(-int(digits) if negative else int(digits))
    return str(int(digits)) if digits else None


def grow(problem: Problem, *, branches: Sequence[int] = BRANCHES, separator: str = SEPARATOR) -> Search:
    """A tree of steps: so many children a level, then one until every answer has ended."""
    level, open_ = 0, [problem.root]
    while open_ and level < LONGEST:
        n = branches[level] if level < len(branches) else 1
        drawn = yield Draw(open_, n, LONGEST, stop=(separator,))
        open_ = [node for children in drawn for node in children if node.end == "step"]
        level += 1
    return Found.best([node for node in problem.root.walk() if node.complete])


def outcome_rows(tree: Grown) -> list[dict[str, Any]]:
    """Every different answer of a tree, right or wrong."""
    found = {leaf.answer: tree.right(leaf) >= 0.5 for leaf in tree.leaves if leaf.answer.strip(SEPARATOR + " ")}
    return [{"prompt": tree.prompt, "completion": text, "label": label} for text, label in found.items()]


FILES = ("outcomes.jsonl", "outcomes_held.jsonl", "steps.jsonl", "steps_held.jsonl")


def write_samples(
    folder: Path, problems: Sequence[Mapping[str, Any]], policy: Policy, *, held: float = 0.2, together: int = 32,
    say: Callable[[str], None] = print,
) -> dict[str, Path]:  # fmt: skip
    """Draws trees for problems and writes outcome and step rows, those of the last problems held out."""
    paths = {Path(name).stem: folder / name for name in FILES}
    if all(path.is_file() for path in paths.values()):
        return paths
    say(f"drawing labelled answers to {len(problems)} training problems")
    outputs = search([row["prompt"] for row in problems], grow, policy, canonical=last_number, together=together)
    cut = round(len(problems) * (1 - held))
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in paths}
    for number, (row, output) in enumerate(zip(problems, outputs, strict=True)):
        tree = grown(output, lambda text, answer=row["answer"]: float(last_number(text) == answer))
        part = "" if number < cut else "_held"
        rows[f"outcomes{part}"] += outcome_rows(tree)
        rows[f"steps{part}"] += step_rows([tree], separator=SEPARATOR)
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in paths.items():
        write_lines(path, rows[name])
    return paths


def write_lines(path: Path, rows: Sequence[Any]) -> None:
    """A whole file or none."""
    new = path.with_name(path.name + ".new")
    new.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    new.replace(path)
