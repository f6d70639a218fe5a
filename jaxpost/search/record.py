"""A finished search as plain data, for files and pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxpost.search.contract import SearchOutput
from jaxpost.search.tree import Node


def tree_record(output: SearchOutput) -> dict[str, Any]:
    """The tree of one prompt: {"nodes": parents before children, "chosen": numbers on the path to the chosen answer}.

    A node is {"number", "parent", "text", "tokens", ...}; what it does not have (a score that is NaN, no visits) is
    left out. Asides are nodes without a parent that have a "prompt".
    """
    best = output.answers[0].node if output.answers else None
    roots = (output.problem.root, *output.problem.asides)
    return {
        "nodes": [node_record(node) for root in roots for node in root.walk()],
        "chosen": [] if best is None else [node.number for node in best.lineage()][::-1],
    }


def node_record(node: Node) -> dict[str, Any]:
    """One node."""
    out: dict[str, Any] = {"number": node.number, "parent": None if node.parent is None else node.parent.number}
    out |= {"text": node.text, "tokens": len(node.tokens)}
    numbers = {"score": node.score, "prior": node.prior, "value": node.value if node.visits else math.nan}
    if node.logprobs:
        numbers["logprob"] = math.fsum(node.logprobs)
    out |= {name: _short(x) for name, x in numbers.items() if not math.isnan(x)}
    if node.steps:
        out["steps"] = [_short(x) for x in node.steps]
    kept = {"visits": node.visits, "end": node.end, "note": node.note, "pruned": node.pruned}
    out |= {name: value for name, value in kept.items() if value}
    facts = {name: plain(value) for name, value in node.facts.items()}
    if "prompt" in facts:
        out["prompt"] = facts.pop("prompt")
    return out | ({"facts": facts} if facts else {})


def plain(value: Any) -> Any:
    """A value as JSON has it; what it has no form for, as text.

    >>> plain({"a": (1, float("nan"), {2})})
    {'a': [1, 'nan', '{2}']}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    return _short(number) if math.isfinite(number) else str(number)


def _short(x: float) -> float:
    return float(f"{float(x):.6g}") if math.isfinite(x) else math.copysign(1e300, x)
