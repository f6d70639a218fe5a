"""REBASE: every open text has as many next steps as its share of the scores."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxpost.search.contract import Search
from jaxpost.search.stepwise import Steps, advance, check_separator, let_go
from jaxpost.search.tree import Aggregate, Node, Problem
from jaxpost.search.vote import Choice
from jaxpost.search.vote import choose as chosen


def rebase(
    problem: Problem,
    *,
    width: int = 16,
    temperature: float = 0.2,
    max_steps: int = 40,
    max_tokens: int = 128,
    separator: str = "\n\n",
    lookahead: int = 0,
    aggregate: Aggregate | None = None,
    choose: Choice = "weighted",
) -> Search:
    """Reward-balanced search (2408.00724): of B_i next steps the open text j gets B_i softmax(v / T)_j (`shares`).

    B_0 = width, and every answer that ends takes one away: B_{i+1} = B_i - (answers ended in round i). It ends with
    `width` ended answers, with no open text, after max_steps, or with the budget.

    Args:
        temperature: T; towards 0 all steps go to the best text, towards infinity each gets as many.
        choose: as in `best_of_n`; the source votes by score.
        The others as `step_beam`.

    Raises:
        ValueError: a width below 1 or a temperature that is not above 0.

    Example:
      >>> from jaxpost.search.tree import Ledger, Node, Problem
      >>> next(rebase(Problem(0, "2+2=", Node(0, None, (1,), ""), Ledger(), str.strip), width=8)).n
      [8]
    """
    if width < 1 or not temperature > 0:
        raise ValueError(f"width is {width} and temperature is {temperature}; both must be above 0")
    steps = Steps(separator=separator, max_tokens=max_tokens, lookahead=lookahead, aggregate=aggregate)
    open_, counts, done = [problem.root], [width], list[Node]()
    for _ in range(max_steps):
        drawn = yield from advance(problem, open_, counts, steps)
        children = [child for some in drawn for child in some]
        if not children:
            break
        done += [child for child in children if child.complete]
        alive = [child for child in children if not child.complete]
        numbers = shares([steps.score(node) for node in alive], max(0, width - len(done)), temperature=temperature)
        kept = [(node, number) for node, number in zip(alive, numbers, strict=True) if number]
        let_go(problem, open_, [node for node, _ in kept])
        open_, counts = [node for node, _ in kept], [number for _, number in kept]
        if not open_:
            break
    check_separator(problem, steps)
    return chosen(problem, [*done, *(node for node in open_ if node is not problem.root)], choose, steps.score)


def shares(scores: Sequence[float], total: int, *, temperature: float) -> list[int]:
    """`total` in whole parts by softmax(scores / temperature).

    Every part is rounded down; what is left over goes one by one to the greatest remainders, the first of equal ones
    first, so that the parts sum to `total` (the source rounds each by itself, and may miss it). A score of NaN gets
    nothing; without any number all get the same.

    By hand: softmax of (2, 1, 1) ln 2 is (1/2, 1/4, 1/4); of 6 that is 3, 1.5, 1.5.

    >>> shares([2 * math.log(2), math.log(2), math.log(2)], 6, temperature=1.0)
    [3, 2, 1]
    """
    known = [score for score in scores if not math.isnan(score)]
    top = max(known, default=0.0)
    weights = [
        1.0 if not known else 0.0 if math.isnan(score) else math.exp((score - top) / temperature) for score in scores
    ]
    whole = math.fsum(weights)
    parts = [total * weight / whole for weight in weights]
    counts = [math.floor(part + 1e-9) for part in parts]
    order = sorted(range(len(parts)), key=lambda i: -round(parts[i] - counts[i], 9))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts
