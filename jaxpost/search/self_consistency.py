"""Self-consistency: independent answers vote."""

from __future__ import annotations

from typing import Literal

from jaxpost.search.contract import Candidate, Found, Search
from jaxpost.search.requests import Draw, Score
from jaxpost.search.tree import Node, Problem
from jaxpost.search.vote import Confidence, confidence, count, elect, most_confident, settled

Weights = Literal["count", "score", "confidence"]


def self_consistency(
    problem: Problem,
    *,
    n: int = 16,
    max_tokens: int = 256,
    weights: Weights = "count",
    measure: Confidence = "mean",
    window: int = 64,
    keep: float = 1.0,
    early_stop: bool = False,
    wave: int = 4,
) -> Search:
    """Draws up to `n` answers y_i; the one given most often, argmax_a sum_i w_i [canonical(y_i) = a], is the answer.

    weights: "count", w = 1 (2203.11171); "score", the verifier's, which must not be negative (2206.02336);
    "confidence", the policy's own (DeepConf, 2508.15260; see `vote.confidence`). Ties go to the answer given first.

    Args:
        measure, window: of the confidence.
        keep: only this share of the answers, those of highest confidence, votes; 1: all.
        early_stop: draw `wave` answers at a time, and stop once those to come cannot change the winner.
        wave: answers drawn at a time with `early_stop`.

    Raises:
        ValueError: keep outside (0, 1], a wave below 1, or an early stop where later answers can take votes away
            (keep < 1) or where a vote has no upper bound (scores).

    Example:
      >>> from jaxpost.search.tree import Ledger, Node, Problem
      >>> problem = Problem(0, "2+2=", Node(0, None, (1,), ""), Ledger(), str.strip)
      >>> next(self_consistency(problem, n=16, early_stop=True)).n
      4
    """
    _check(weights, keep, early_stop, wave)
    root, scored = problem.root, weights == "score"
    answers: list[Node] = []

    def sure(node: Node) -> float:
        return confidence(node.logprobs, measure, window=window)

    def weight(node: Node) -> float:
        return node.score if scored else sure(node) if weights == "confidence" else 1.0

    while len(answers) < n:
        wanted = min(wave, n - len(answers)) if early_stop else n
        [drawn] = yield Draw([root], n=wanted, max_tokens=max_tokens, scored=scored)
        answers += drawn
        if not early_stop or len(drawn) < wanted:
            break
        votes = count((problem.canonical(node.answer), weight(node)) for node in answers if node.complete).votes
        if votes and settled(votes, n - len(answers)):
            break
    if scored:
        yield Score(answers)
    if keep == 1.0:
        return elect(problem, answers, weight)
    ended = [node for node in answers if node.complete] or answers
    voters = [ended[i] for i in most_confident([sure(node) for node in ended], keep)]
    found = elect(problem, voters, weight)
    rest = tuple(Candidate(node.answer, weight(node), node) for node in answers if node not in voters)
    return Found(found.candidates + rest, found.votes)


def _check(weights: Weights, keep: float, early_stop: bool, wave: int) -> None:
    if not 0 < keep <= 1:
        raise ValueError(f"keep is {keep}; it is the share of answers that vote, above 0 and at most 1")
    if wave < 1:
        raise ValueError(f"wave is {wave}; at least 1 answer is drawn at a time")
    if early_stop and (keep < 1 or weights == "score"):
        raise ValueError(
            f"early_stop with weights {weights!r} and keep {keep} cannot know that the vote is settled: it needs "
            'keep 1 and weights "count" or "confidence"'
        )
