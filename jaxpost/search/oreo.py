"""Beam search guided by a value function, over steps or over tokens."""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Any, Literal

from jaxpost.search.contract import Search
from jaxpost.search.requests import Push, Rank, Request, Score
from jaxpost.search.step_beam import beam
from jaxpost.search.stepwise import Steps, let_go, ranked
from jaxpost.search.tree import Aggregate, Node, Problem
from jaxpost.search.vote import Choice, Weight
from jaxpost.search.vote import choose as chosen


def oreo(
    problem: Problem,
    *,
    unit: Literal["step", "token"] = "step",
    beams: int = 4,
    expand: int = 4,
    likelihood: float = 0.0,
    max_steps: int = 40,
    max_tokens: int = 128,
    separator: str = "\n\n",
    aggregate: Aggregate | None = None,
    choose: Choice = "best",
) -> Search:
    """Value-guided beam search (OREO, 2412.16145): texts s are ranked by V(s) + lambda log p(s | x).

    Every beam is continued in `expand` ways, by drawing steps or by the most probable tokens; the `beams` best open
    texts go on, and answers that end are set aside, until there are beams * expand of them. V is the search's
    verifier: the value head that the policy was trained with, or any other that judges unfinished texts. The source
    has lambda = 0; above it V corrects the policy and does not replace it.

    Args:
        unit: what is added at a time. Tokens are judged expand times a beam and token: dear unless V is cheap.
        likelihood: lambda.
        max_steps: rounds of steps; max_tokens: of a step, or of the answer where the unit is a token.
        separator, aggregate, choose: as `step_beam`; the separator ends steps.

    Raises:
        ValueError: beams or expand below 1.

    Example:
      >>> from jaxpost.search.tree import Ledger, Node, Problem
      >>> next(oreo(Problem(0, "2+2=", Node(0, None, (1,), ""), Ledger(), str.strip), beams=2, expand=3)).n
      [6]
    """
    if beams < 1 or expand < 1:
        raise ValueError(f"beams is {beams} and expand is {expand}; both must be at least 1")
    steps = Steps(separator=separator, max_tokens=max_tokens, aggregate=aggregate)

    def key(node: Node) -> float:
        return steps.score(node) + (likelihood * node.logprob if likelihood else 0.0)

    if unit == "step":
        return (yield from beam(problem, beams * expand, beams, max_steps, steps, key, choose))
    found = yield from _by_tokens(problem, beams, expand, max_tokens, key)
    return chosen(problem, found, choose, key)


def _by_tokens(
    problem: Problem, beams: int, expand: int, max_tokens: int, key: Weight
) -> Generator[Request, Any, list[Node]]:
    """What ended, and the beams that were still open."""
    open_, done = [problem.root], list[Node]()
    for _ in range(max_tokens):
        best = yield Rank(open_, expand)
        pushes = [
            (node, int(token), float(logprob))
            for node, row in zip(open_, best, strict=True)
            for token, logprob in zip(*row, strict=True)
        ]
        if not pushes:
            break
        nodes, tokens, logprobs = zip(*pushes, strict=True)
        children: list[Node] = yield Push(nodes, tokens, logprobs)
        yield Score(children)
        done += [child for child in children if child.complete]
        # What no budget was left to judge is ranked by its probability, below all that was judged.
        alive = sorted((child for child in children if not child.complete), key=lambda child: -child.logprob)
        kept = ranked(alive, key)[:beams]
        let_go(problem, open_, kept)
        open_ = kept
        if not open_ or len(done) >= beams * expand or all(math.isnan(child.score) for child in children):
            break
    cut = [node for node in open_ if node is not problem.root]
    for node in cut:
        node.end = "length"
    return [*done, *cut]
