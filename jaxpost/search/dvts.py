"""Diverse verifier tree search: a beam search in independent subtrees."""

from __future__ import annotations

from jaxpost.search.contract import Search
from jaxpost.search.stepwise import Steps, advance, check_separator, check_width, let_go, ranked
from jaxpost.search.tree import Aggregate, Node, Problem
from jaxpost.search.vote import Choice
from jaxpost.search.vote import choose as chosen


def dvts(
    problem: Problem,
    *,
    width: int = 16,
    factor: int = 4,
    max_steps: int = 40,
    max_tokens: int = 128,
    separator: str = "\n\n",
    lookahead: int = 0,
    aggregate: Aggregate | None = None,
    choose: Choice = "best",
) -> Search:
    """N/M subtrees (N = width, M = factor) that never compare with each other, so that one high score early on does
    not crowd out the rest (Beeching et al., "Scaling test-time compute with open models", 2024).

    In every round each subtree draws M next steps and goes on from the best by the verifier; a subtree ends where
    that one is an answer's end. Every answer that ended is a candidate. Arguments as `step_beam`.

    Raises:
        ValueError: a width that is no multiple of factor.

    Example:
      >>> from jaxpost.search.tree import Ledger, Node, Problem
      >>> next(dvts(Problem(0, "2+2=", Node(0, None, (1,), ""), Ledger(), str.strip), width=8)).n
      [4, 4]
    """
    steps = Steps(separator=separator, max_tokens=max_tokens, lookahead=lookahead, aggregate=aggregate)
    heads: list[Node] = [problem.root] * check_width(width, factor)
    done: list[Node] = []
    stuck: list[Node] = []
    for _ in range(max_steps):
        drawn = yield from advance(problem, heads, [factor] * len(heads), steps)
        best = [ranked(children, steps.score)[0] for children in drawn if children]
        stuck += [head for head, children in zip(heads, drawn, strict=True) if not children]
        done += [child for children in drawn for child in children if child.complete]
        following = [child for child in best if not child.complete]
        let_go(problem, heads, following)
        heads = following
        if not heads:
            break
    check_separator(problem, steps)
    cut = [node for node in [*heads, *stuck] if node is not problem.root]
    return chosen(problem, [*done, *cut], choose, steps.score)
