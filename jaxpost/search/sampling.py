"""Answers without a search: the most probable token each time, or independent samples."""

from __future__ import annotations

from jaxpost.search.contract import Candidate, Found, Search
from jaxpost.search.requests import Draw
from jaxpost.search.tree import Problem


def greedy(problem: Problem, *, max_tokens: int = 256) -> Search:
    """The most probable token at each place: y_t = argmax p(y | x, y_<t).

    Example:
      >>> from jaxpost.search.tree import Ledger, Node, Problem
      >>> request = next(greedy(Problem(0, "2+2=", Node(0, None, (1,), ""), Ledger(), str.strip)))
      >>> request.n, request.sampling
      (1, {'temperature': 0.0})
    """
    [answers] = yield Draw([problem.root], max_tokens=max_tokens, sampling={"temperature": 0.0})
    return Found(tuple(Candidate(node.answer, node.logprob, node) for node in answers))


def sample(problem: Problem, *, n: int = 1, max_tokens: int = 256) -> Search:
    """`n` independent samples, in the order in which they were drawn: the first is the answer, all make pass@k.

    Scores are log-probabilities, and choose nothing.

    Example:
      >>> from jaxpost.search.tree import Ledger, Node, Problem
      >>> next(sample(Problem(0, "2+2=", Node(0, None, (1,), ""), Ledger(), str.strip), n=4)).n
      4
    """
    [answers] = yield Draw([problem.root], n=n, max_tokens=max_tokens)
    return Found(tuple(Candidate(node.answer, node.logprob, node) for node in answers))
