"""Self-consistency: independent answers vote."""

from __future__ import annotations

from typing import Literal

from jaxpost.search.contract import Candidate, Found, Search
from jaxpost.search.requests import Draw, Score
from jaxpost.search.tree import Node, Problem
from jaxpost.search.vote import Confidence, Weight, confidence, count, elect, most_confident, settled

Weights = Literal["count", "score", "confidence"]


def self_consistency(
    problem: Problem,
    *,
    n: int = 16,
    max_tokens: int = 256,
    weights: Weights = "count",
    measure: Confidence = "mean",
    window: int = 64,
    top_logprobs: int = 20,
    keep: float = 1.0,
    early_stop: bool = False,
    wave: int = 4,
) -> Search:
    """Draws up to `n` answers y_i; the one given most often, argmax_a sum_i w_i [canonical(y_i) = a], is the answer.

    weights: "count", w = 1 (2203.11171); "score", the verifier's, which must not be negative (2206.02336);
    "confidence", the policy's own (DeepConf, 2508.15260; see `vote.confidence`). Ties go to the answer given first.

    Args:
        measure, window: of the confidence.
        top_logprobs: the k most probable tokens that a token's confidence is made of.
        keep: only this share of the answers, those of highest confidence, votes; 1: all.
        early_stop: draw `wave` answers at a time, and stop once those to come cannot change the winner.
        wave: answers drawn at a time with `early_stop`.

    Raises:
        ValueError: keep outside (0, 1], a wave, window or top_logprobs below 1, or an early stop where later answers
            can take votes away (keep < 1) or where a vote has no upper bound (scores, confidence).

    Example:
      >>> from jaxpost.search.tree import Ledger, Node, Problem
      >>> problem = Problem(0, "2+2=", Node(0, None, (1,), ""), Ledger(), str.strip)
      >>> next(self_consistency(problem, n=16, early_stop=True)).n
      4
    """
    _check(weights, keep, early_stop, wave, window, top_logprobs)
    root, scored = problem.root, weights == "score"
    told = top_logprobs if weights == "confidence" or keep < 1 else 0
    answers: list[Node] = []

    def weight(node: Node) -> float:
        return node.score if scored else node.facts["confidence"] if weights == "confidence" else 1.0

    while len(answers) < n:
        wanted = min(wave, n - len(answers)) if early_stop else n
        [drawn] = yield Draw([root], n=wanted, max_tokens=max_tokens, scored=scored, top_logprobs=told)
        answers += drawn
        if not early_stop or len(drawn) < wanted:
            break
        votes = count((problem.canonical(node.answer), 1.0) for node in answers if node.complete).votes
        if votes and settled(votes, n - len(answers)):
            break
    for node in answers if told else ():
        node.facts["confidence"] = confidence(node.best, measure, window=window)
    if scored:
        yield Score(answers)
    return _confident(problem, answers, keep, weight) if keep < 1 else elect(problem, answers, weight)


def _confident(problem: Problem, answers: list[Node], keep: float, weight: Weight) -> Found:
    """A vote of the surest answers; the others stand behind it."""
    ended = [node for node in answers if node.complete] or answers
    voters = [ended[i] for i in most_confident([node.facts["confidence"] for node in ended], keep)]
    found = elect(problem, voters, weight)
    rest = tuple(Candidate(node.answer, weight(node), node) for node in answers if node not in voters)
    return Found(found.candidates + rest, found.votes)


def _check(weights: Weights, keep: float, early_stop: bool, wave: int, window: int, top_logprobs: int) -> None:
    if not 0 < keep <= 1:
        raise ValueError(f"keep is {keep}; it is the share of answers that vote, above 0 and at most 1")
    if wave < 1:
        raise ValueError(f"wave is {wave}; at least 1 answer is drawn at a time")
    if window < 1 or top_logprobs < 1:
        raise ValueError(f"window is {window} and top_logprobs is {top_logprobs}; both must be at least 1")
    if early_stop and (keep < 1 or weights != "count"):
        raise ValueError(
            f"early_stop with weights {weights!r} and keep {keep} cannot know that the vote is settled: it needs "
            'keep 1 and weights "count"'
        )
