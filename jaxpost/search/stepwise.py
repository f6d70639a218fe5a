"""What searches over steps share: one round of steps drawn and judged, and what is let go afterwards.

A step is text up to a separator. A piece that was cut at its limit of tokens is gone on from as if it were a step.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from jaxpost.search.requests import Draw, Request, Score
from jaxpost.search.tree import Aggregate, Node, Problem
from jaxpost.search.tree import aggregate as aggregated

Lists = Generator[Request, Any, list[list[Node]]]


@dataclass(frozen=True, kw_only=True)
class Steps:
    """How a search takes and judges its steps.

    Attributes:
        separator: text that ends a step.
        max_tokens: most of a step.
        lookahead: steps that are rolled out greedily before a step is judged; the judgement of where they lead takes
            the place of the step's own (2408.03314).
        aggregate: one number for a verifier's scores of all steps; None: the one that the verifier gives.
    """

    separator: str = "\n\n"
    max_tokens: int = 128
    lookahead: int = 0
    aggregate: Aggregate | None = None

    def score(self, node: Node) -> float:
        """Of the text up to a node."""
        return aggregated(node.steps, self.aggregate) if self.aggregate and node.steps else node.score


def ranked(nodes: Sequence[Node], key: Any) -> list[Node]:
    """Highest first, those without a score last; equal ones in the order in which they were drawn."""
    return sorted(nodes, key=lambda node: math.inf if math.isnan(score := key(node)) else -score)


def check_width(width: int, factor: int) -> int:
    """width / factor. Raises: ValueError where that is no whole number above 0."""
    if factor < 1 or width < 1 or width % factor:
        raise ValueError(f"width is {width} and factor is {factor}; width must be a multiple of factor")
    return width // factor


def advance(problem: Problem, nodes: Sequence[Node], counts: Sequence[int], steps: Steps) -> Lists:
    """Draws `counts` next steps of nodes and has them judged; their lists are shorter where the budget ended."""
    draw = Draw(nodes, n=counts, max_tokens=steps.max_tokens, stop=(steps.separator,), scored=True)
    drawn: list[list[Node]] = yield draw
    yield from _judge(problem, [child for children in drawn for child in children], steps)
    return drawn


def _judge(problem: Problem, children: Sequence[Node], steps: Steps) -> Generator[Request, Any, None]:
    reached = list(children)
    for _ in range(steps.lookahead):
        open_ = [i for i, node in enumerate(reached) if not node.complete]
        if not open_:
            break
        rolled: list[list[Node]] = yield Draw(
            [reached[i] for i in open_], max_tokens=steps.max_tokens, stop=(steps.separator,), scored=True,
            sampling={"temperature": 0.0}, note="lookahead",
        )  # fmt: skip
        for i, more in zip(open_, rolled, strict=True):
            reached[i] = more[0] if more else reached[i]
    yield Score(reached)
    for child, end in zip(children, reached, strict=True):
        if end is not child:
            child.score, child.steps = end.score, end.steps
            child.facts["lookahead"] = end.answer[len(child.answer) :]
            problem.prune(child.children)


def let_go(problem: Problem, before: Sequence[Node], after: Sequence[Node]) -> None:
    """Prunes what no node of `after` stands on: nodes of `before` and their children, and what led to them alone."""
    needed = {id(node) for top in after for node in top.lineage()}
    tops: dict[int, Node] = {}
    for node in [*before, *(child for parent in before for child in parent.children)]:
        top = node
        while top.parent is not None and top.parent.parent is not None and id(top.parent) not in needed:
            top = top.parent
        if top.parent is not None and id(top) not in needed:
            tops[id(top)] = top
    problem.prune(list(tops.values()))


def check_separator(problem: Problem, steps: Steps) -> None:
    """Says so where no text that had room for it ever held the separator."""
    drawn = [node for node in problem.root.walk() if node.end is not None]
    room = [node for node in drawn if node.complete or len(node.tokens) >= steps.max_tokens]
    if room and not any(node.end == "step" for node in drawn):
        problem.warn(
            f"the separator {steps.separator!r} never appeared, so that whole answers or pieces of {steps.max_tokens} "
            "tokens were judged as steps: set `separator` to what the model writes between its steps"
        )
