"""Votes over canonical answers: by count, by score or by the policy's own confidence; and when one is settled.

Ties: of answers with equal weight the one that was given first wins. An answer whose weight is NaN does not vote.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from jaxpost.search.contract import Candidate, Found
from jaxpost.search.tree import Node, Problem

Confidence = Literal["mean", "bottom", "lowest", "tail"]
Weight = Callable[[Node], float]
Choice = Literal["best", "weighted", "majority"]
"""How one of the ended answers is chosen: by its own score, or by a vote of all of them."""


class Tally(NamedTuple):
    """A vote as it was counted."""

    votes: dict[str, float]
    """Weight of each canonical answer, in the order in which they were first given."""
    counts: dict[str, int]
    unscored: int = 0
    """Answers that did not vote because their weight is NaN."""
    silent: int = 0
    """Texts that give no answer."""

    @property
    def ranking(self) -> list[str]:
        """Answers by weight; equal ones in the order in which they were given."""
        return sorted(self.votes, key=lambda answer: -self.votes[answer])


def count(ballots: Iterable[tuple[str | None, float]]) -> Tally:
    """Adds up weights: votes[a] = sum of w_i over all i whose answer is a.

    With w = 1 this is self-consistency's majority (2203.11171), with w a verifier's score weighted best-of-N
    (2206.02336, 2211.14275).

    Args:
        ballots: (canonical answer or None, weight).

    >>> tally = count([("7", 0.5), ("9", 0.8), ("7", 0.4), (None, 1.0), ("9", float("nan"))])
    >>> tally.votes, tally.ranking, tally.unscored, tally.silent
    ({'7': 0.9, '9': 0.8}, ['7', '9'], 1, 1)
    """
    parts: dict[str, list[float]] = {}
    unscored = silent = 0
    for answer, weight in ballots:
        if answer is None:
            silent += 1
        elif math.isnan(weight):
            unscored += 1
        else:
            parts.setdefault(answer, []).append(float(weight))
    votes = {answer: math.fsum(weights) for answer, weights in parts.items()}
    return Tally(votes, {answer: len(weights) for answer, weights in parts.items()}, unscored, silent)


def settled(votes: Mapping[str, float], remaining: int, *, heaviest: float = 1.0) -> bool:
    """Whether `remaining` more ballots of at most `heaviest` each, none below 0, can no longer change the winner.

    The winner w and any other answer a: votes[w] - votes[a] >= remaining * heaviest where w was given before a (a tie
    is w's), > otherwise; an answer that nobody gave yet has 0 and comes later. The hard form of adaptive
    self-consistency (2305.11860): it never changes what is answered.

    >>> settled({"7": 4.0, "9": 1.0}, 3), settled({"9": 1.0, "7": 4.0}, 3), settled({"9": 1.0, "7": 5.0}, 3)
    (True, False, True)
    """
    if not votes:
        return remaining <= 0
    order = list(votes)
    best = max(order, key=lambda answer: votes[answer])
    most = remaining * heaviest
    before = order.index(best)
    rivals = [(votes[answer], place > before) for place, answer in enumerate(order) if answer != best] + [(0.0, True)]
    return all(votes[best] - other > most or (later and votes[best] - other >= most) for other, later in rivals)


def confidence(best: Sequence[Sequence[float]], how: Confidence = "mean", *, window: int = 64) -> float:
    """How sure the policy was of a text (DeepConf, 2508.15260), in nats, above 0; NaN for no tokens.

    A token's confidence is C_i = -1/k sum_j log p_i(j) over the k most probable tokens j at its place: great where one
    of them has nearly all probability, log k where all k are alike.
    mean: of all C_i. tail: of the last `window`. Groups are all runs of `window` tokens next to each other, a group's
    confidence is the mean of its C_i. lowest: the least sure group's; bottom: mean over the tenth of the groups (at
    least one) that are least sure. A text shorter than `window` is one group.

    Args:
        best: for each token the log-probabilities of the most probable tokens at its place (`Node.best`).

    Raises:
        ValueError: a window below 1.

    >>> told = [(-0.5, -1.5), (-0.1, -3.9), (-0.7, -0.7), (-0.6, -0.8)]   # C = 1, 2, 0.7, 0.7
    >>> [round(confidence(told, how, window=2), 3) for how in ("mean", "tail", "lowest")]
    [1.1, 0.7, 0.7]
    """
    if window < 1:
        raise ValueError(f"window is {window}; a group of tokens has at least 1")
    values = [-math.fsum(row) / len(row) for row in best if len(row)]
    if not values:
        return math.nan
    if how in ("mean", "tail"):
        part = values if how == "mean" else values[-window:]
        return math.fsum(part) / len(part)
    size = min(window, len(values))
    groups = sorted(math.fsum(values[i : i + size]) / size for i in range(len(values) - size + 1))
    least = groups[: 1 if how == "lowest" else max(1, len(groups) // 10)]
    return math.fsum(least) / len(least)


def entropy(best: Sequence[Sequence[float]]) -> float:
    """Mean over tokens of H_i = -sum_j p_i(j) log p_i(j) - r_i log r_i, nats; NaN for no tokens.

    j runs over the most probable tokens that are told, and r_i = 1 - sum_j p_i(j) is what is left, counted as one
    token: at most the entropy of all tokens, and equal to it where all are told.

    >>> round(entropy([(math.log(0.5), math.log(0.25))]), 4)   # 1/2, 1/4 and a rest of 1/4
    1.0397
    """
    values = []
    for row in (row for row in best if len(row)):
        p = [math.exp(x) for x in row]
        parts = [*p, max(0.0, 1.0 - math.fsum(p))]
        values.append(-math.fsum(x * math.log(x) for x in parts if x > 0))
    return math.fsum(values) / len(values) if values else math.nan


def most_confident(weights: Sequence[float], keep: float) -> list[int]:
    """Indices of the ceil(keep * n) greatest of n weights that are numbers, in their order (DeepConf's top-eta filter).

    >>> most_confident([0.2, 0.9, float("nan"), 0.5], 0.5)
    [1, 3]
    """
    known = [i for i, weight in enumerate(weights) if not math.isnan(weight)]
    best = sorted(known, key=lambda i: -weights[i])[: math.ceil(keep * len(known) - 1e-9)]
    return sorted(best)


def elect(problem: Problem, nodes: Sequence[Node], weight: Weight = lambda node: 1.0) -> Found:
    """Votes with ended answers; where none has ended, with the cut ones that say something.

    The candidates: the winner's answers by weight, then the next answer's, then those that did not vote.
    """
    voters = [node for node in nodes if node.complete] or list(nodes)
    said = [(node, problem.canonical(node.answer), weight(node)) for node in voters]
    tally = count((answer, w) for _, answer, w in said)
    if any(w < 0 for _, _, w in said):
        problem.warn(
            "a vote adds up scores, and some are negative: an answer given often then loses by it; use a verifier "
            "with scores in [0, 1]"
        )
    if tally.unscored:
        problem.warn(f"{tally.unscored} of {len(said)} answers had no score and did not vote")
    place = {answer: n for n, answer in enumerate(tally.ranking)}
    last = len(place)
    said += [(node, problem.canonical(node.answer), weight(node)) for node in nodes if node not in voters]
    voting = {id(node) for node in voters}

    def order(one: tuple[Node, str | None, float]) -> tuple[int, float]:
        node, answer, w = one
        if math.isnan(w) or id(node) not in voting:
            return last + (id(node) not in voting), 0.0
        return place.get(answer, last) if answer is not None else last, -w

    ranked = sorted(said, key=order)
    return Found(tuple(Candidate(node.answer, w, node, answer) for node, answer, w in ranked), tally.votes)


def choose(problem: Problem, nodes: Sequence[Node], how: Choice, score: Weight) -> Found:
    """best: the highest score (naive best-of-N); weighted: a vote by score; majority: a vote by count."""
    if how == "best":
        return Found.best(nodes, score)
    return elect(problem, nodes, score if how == "weighted" else lambda node: 1.0)
