"""Beam search over steps, judged by a process reward model."""

from __future__ import annotations

from jaxpost.search.contract import Search
from jaxpost.search.stepwise import Steps, advance, check_separator, check_width, let_go, ranked
from jaxpost.search.tree import Aggregate, Node, Problem
from jaxpost.search.vote import Choice, Weight
from jaxpost.search.vote import choose as chosen


def step_beam(
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
    """Beam search against a process reward model (2408.03314, "BFS-V"; with `lookahead` its lookahead search).

    1. N = width first steps are drawn. 2. The verifier scores every text. 3. Answers that ended are set aside; of the
    open texts the N/M best stay (M = factor). 4. N next steps are drawn after them, M after each, or as evenly as can
    be where fewer stayed (the better ones get the odd ones). Then 2. It ends with N ended answers, with no open text,
    after max_steps, or with the budget. Of what ended the best is chosen, or a vote is held.

    Args:
        max_steps: rounds.
        max_tokens, separator: of a step.
        lookahead: k steps are rolled out greedily from every open text, and their score takes the place of its own.
        aggregate: one number for a verifier's scores of steps; None: the one that the verifier gives.
        choose: as in `best_of_n`.

    Raises:
        ValueError: a width that is no multiple of factor.

    Example:
      >>> from jaxpost.search.tree import Ledger, Node, Problem
      >>> next(step_beam(Problem(0, "2+2=", Node(0, None, (1,), ""), Ledger(), str.strip), width=8)).n
      [8]
    """
    steps = Steps(separator=separator, max_tokens=max_tokens, lookahead=lookahead, aggregate=aggregate)
    keep = check_width(width, factor)
    return (yield from beam(problem, width, keep, max_steps, steps, steps.score, choose))


def beam(problem: Problem, width: int, keep: int, max_steps: int, steps: Steps, key: Weight, choose: Choice) -> Search:
    """The search itself, with any key that ranks texts."""
    open_, done = [problem.root], list[Node]()
    for _ in range(max_steps):
        drawn = yield from advance(problem, open_, spread(width, len(open_)), steps)
        children = [child for some in drawn for child in some]
        if not children:
            break
        done += [child for child in children if child.complete]
        kept = ranked([child for child in children if not child.complete], key)[:keep]
        let_go(problem, open_, kept)
        open_ = kept
        if not open_ or len(done) >= width:
            break
    check_separator(problem, steps)
    return chosen(problem, [*done, *(node for node in open_ if node is not problem.root)], choose, key)


def spread(total: int, parts: int) -> list[int]:
    """A number as equal whole parts, the first ones greater.

    >>> spread(16, 3)
    [6, 5, 5]
    """
    each, more = divmod(total, parts)
    return [each + (i < more) for i in range(parts)]
