"""Cells of the lab's comparison of searches: a method, a budget and a seed each, in a file that is kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxpost.eval.search import Outcome, Runs
from jaxpost.search.contract import SearchOutput

Draws = Callable[[str, int, int], list[Outcome]]
"""(method, budget, seed) -> an outcome for every problem."""


def judged(outputs: Sequence[SearchOutput], answers: Sequence[str]) -> list[Outcome]:
    """Outcomes of searches whose canonical answers are compared with the right ones."""
    out = []
    for output, answer in zip(outputs, answers, strict=True):
        offered = tuple(candidate.canonical == answer for candidate in output.answers)
        out.append(Outcome(bool(offered and offered[0]), offered, output.tokens_spent, output.error is not None))
    return out


def slug(method: str) -> str:
    """A method's name as a file's.

    >>> slug("best of N, weighted")
    'best-of-n-weighted'
    """
    return "-".join("".join(c if c.isalnum() else " " for c in method.lower()).split())


def place(folder: Path, method: str, budget: int, seed: int) -> Path:
    return folder / "cells" / f"{slug(method)}-{budget}-seed{seed}.json"


def read_cell(path: Path, identity: Mapping[str, Any]) -> list[Outcome] | None:
    """None: there is none yet.

    Raises:
      ValueError: it is another comparison's.
    """
    if not path.is_file():
        return None
    kept = json.loads(path.read_text(encoding="utf-8"))
    wanted = json.loads(json.dumps(dict(identity)))
    if kept["identity"] != wanted:
        names = sorted(k for k in kept["identity"].keys() | wanted if kept["identity"].get(k) != wanted.get(k))
        raise ValueError(
            f"{path} is of another comparison ({', '.join(names)} differ); give another --out, or delete it"
        )
    return [Outcome(bool(r), tuple(map(bool, o)), int(t), bool(f)) for r, o, t, f in kept["outcomes"]]


def write_cell(path: Path, outcomes: Sequence[Outcome], identity: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    rows = [[int(o.right), [int(x) for x in o.offered], o.tokens, int(o.failed)] for o in outcomes]
    new.write_text(json.dumps({"identity": dict(identity), "outcomes": rows}) + "\n", encoding="utf-8")
    new.replace(path)


def run_cells(
    methods: Sequence[str], budgets: Sequence[int], seeds: Sequence[int], draw: Draws, folder: Path, *,
    identity: Mapping[str, Any], say: Callable[[str], None] = print,
) -> list[Runs]:  # fmt: skip
    """Every method at every budget with every seed, seed by seed, so that what is there after an interruption is whole.

    Args:
      identity: what decides the outcomes; kept with them.
    """
    todo = [(seed, method, budget) for seed in seeds for method in methods for budget in budgets]
    found: dict[tuple[int, str, int], list[Outcome]] = {}
    for number, (seed, method, budget) in enumerate(todo, 1):
        path = place(folder, method, budget, seed)
        outcomes = read_cell(path, identity)
        if outcomes is None:
            outcomes = draw(method, budget, seed)
            write_cell(path, outcomes, identity)
            right = sum(o.right for o in outcomes) / len(outcomes)
            say(f"[{number}/{len(todo)}] {method}, {budget} tokens, seed {seed}: {right:.1%}")
        found[seed, method, budget] = outcomes
    return [Runs(m, b, [found[seed, m, b] for seed in seeds]) for m in methods for b in budgets]
