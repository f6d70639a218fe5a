"""Best-of-N: independent answers, of which a verifier chooses one."""

from __future__ import annotations

from jaxpost.search.contract import Search
from jaxpost.search.requests import Draw, Score
from jaxpost.search.stepwise import Steps
from jaxpost.search.tree import Aggregate, Problem
from jaxpost.search.vote import Choice
from jaxpost.search.vote import choose as chosen


def best_of_n(
    problem: Problem, *, n: int = 16, max_tokens: int = 256, choose: Choice = "best", aggregate: Aggregate | None = None
) -> Search:
    """Draws `n` answers y_i and has each judged: v_i = V(x, y_i).

    choose "best" (naive, 2110.14168): argmax_i v_i. "weighted" (2206.02336, 2211.14275): an answer of
    argmax_a sum of v_i over i that answer a, as it is compared (`canonical`); v_i must not be negative. "majority":
    the same with v_i = 1.

    Args:
        aggregate: one number for a verifier's scores of steps; None: the one that the verifier gives.

    Example:
      >>> from jaxpost.search.tree import Ledger, Node, Problem
      >>> request = next(best_of_n(Problem(0, "2+2=", Node(0, None, (1,), ""), Ledger(), str.strip), n=8))
      >>> request.n, request.scored
      (8, True)
    """
    [answers] = yield Draw([problem.root], n=n, max_tokens=max_tokens, scored=True)
    yield Score(answers)
    return chosen(problem, answers, choose, Steps(aggregate=aggregate).score)
