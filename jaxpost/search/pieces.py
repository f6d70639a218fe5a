"""What methods that grow trees share: steps within the budget, prompts of their own, answers to other prompts."""

from __future__ import annotations

import re
import sys
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from jaxpost.search.contract import Candidate, Found
from jaxpost.search.requests import Draw, Request
from jaxpost.search.tree import Node, Problem

Grow = Generator[Request, Any, list[list[Node]]]
"""Yields requests and returns new children for each of some nodes."""


def fill(template: str, **values: str) -> str:
    """A prompt with {name} replaced, in one pass: braces in what is filled in, and unknown names, stay as they are.

    >>> fill("{problem} {x}: {steps}", problem="{steps}?", steps="a")
    '{steps}? {x}: a'
    """
    return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), template)


def question(prompt: Any) -> str:
    """The text of a prompt: itself, or what the last user's turn of messages says."""
    if isinstance(prompt, str):
        return prompt
    for message in reversed(list(prompt)):
        if isinstance(message, Mapping) and message.get("role") == "user":
            return str(message.get("content", ""))
    return ""


def last_line(text: str) -> str:
    """The last line with text, without marks of emphasis and full stops around it.

    >>> last_line("It can.\\n**Sure.**\\n")
    'Sure'
    """
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip().strip("*`. ") if lines else ""


def count(problem: Problem, name: str, by: int = 1) -> None:
    """Adds to a number that is shown with the tree."""
    problem.root.facts[name] = problem.root.facts.get(name, 0) + by


def room(problem: Problem, tokens: int, reserve: int = 0) -> int:
    """How many texts of so many tokens the budget pays while `reserve` tokens stay for the answer."""
    left = problem.ledger.left
    return sys.maxsize if left == float("inf") else max(0, int(left - reserve) // max(1, tokens))


def draw_steps(
    problem: Problem, nodes: Sequence[Node], *, branch: int, separator: str, step_tokens: int, reserve: int = 0,
    scored: bool = False, note: str = "",
) -> Grow:  # fmt: skip
    """Draws `branch` next steps of each node: -> for each the different ones, fewer where the budget ended.

    Steps without text, and repeats of a sibling's, are pruned.
    """
    pays = room(problem, step_tokens, reserve)
    counts = [max(0, min(branch, pays - branch * i)) for i in range(len(nodes))]
    if not any(counts):
        problem.ledger.refused += len(nodes)
        return [[] for _ in nodes]
    drawn = yield Draw(nodes, n=counts, max_tokens=step_tokens, stop=(separator,), scored=scored, note=note)
    return [different(problem, children) for children in drawn]


def different(problem: Problem, children: Sequence[Node]) -> list[Node]:
    """One child of every text; those without text (unless the answer ends with them) and repeats are pruned."""
    kept: dict[tuple[str, bool], Node] = {}
    for child in children:
        if child.text.strip() or child.complete:
            kept.setdefault((child.text, child.complete), child)
    chosen = list(kept.values())
    repeats = [child for child in children if child not in chosen]
    count(problem, "repeats", len(repeats))
    problem.prune(repeats)
    return chosen


def adopt(problem: Problem, node: Node) -> Node:
    """An answer to another prompt as an answer to the problem's own, so that verifiers judge it as such."""
    path, end = node.path, node.end
    tokens = [token for piece in path for token in piece.tokens]
    return problem.child(problem.root, tokens, node.answer, end=end, note=node.note, facts={"from": node.number})


def ended(problem: Problem) -> list[Node]:
    """All answers in the problem's own tree that ended by themselves."""
    return [node for node in problem.root.walk() if node.complete]


def chosen_first(chosen: Node | None, others: Sequence[Node], score: float | None = None) -> Found:
    """The chosen answer, then the others by score."""
    if chosen is None:
        return Found.best(others)
    first = Candidate(chosen.answer, chosen.score if score is None else score, chosen)
    rest = Found.best([node for node in others if node is not chosen])
    return Found((first, *rest.candidates))
