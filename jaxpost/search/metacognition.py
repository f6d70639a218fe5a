"""More compute where the model is unsure: a cheap method answers, and above a threshold of uncertainty a dear one."""

from __future__ import annotations

import math
from typing import Literal, get_args

from jaxpost.search.contract import Found, Method, Search
from jaxpost.search.difficulty import disagreement
from jaxpost.search.tree import Problem
from jaxpost.search.vote import confidence

Signal = Literal["entropy", "confidence", "disagreement", "score"]


def uncertainty(problem: Problem, found: Found, *, signal: Signal, window: int = 16) -> float:
    """How unsure what a method found leaves one; NaN where the signal is not there.

    entropy: mean of -log p over the chosen answer's tokens, an estimate of their mean entropy, nats. confidence: 1 -
    the lowest group confidence of them (`vote.confidence`, after DeepConf, 2508.15260). disagreement: of the
    candidates' answers, in [0, 1] (`difficulty.disagreement`). score: 1 - the chosen answer's score.

    Raises:
      ValueError: no such signal.
    """
    if signal not in get_args(Signal):
        raise ValueError(f"{signal!r} is no signal of uncertainty; there are {', '.join(get_args(Signal))}")
    if not found.candidates:
        return math.nan
    chosen = found.candidates[0]
    if signal == "disagreement":
        return disagreement([c.canonical or problem.canonical(c.text) for c in found.candidates])
    if signal == "score":
        return 1.0 - chosen.score
    drawn = [x for node in chosen.node.path for x in node.logprobs] if chosen.node is not None else []
    if signal == "confidence":
        return 1.0 - confidence(drawn, "lowest", window=window)
    return -math.fsum(drawn) / len(drawn) if drawn else math.nan


def metacognition(
    problem: Problem, *, cheap: Method, dear: Method, signal: Signal = "entropy", threshold: float = 0.5,
    window: int = 16,
) -> Search:  # fmt: skip
    """The cheap method's answer where its `uncertainty` is at most the threshold, else the dear method's.

    The dear method goes on in the same tree, with what the cheap one left of the budget. Where it finds nothing (the
    budget ended), the cheap answer stands. Uncertainty that is not known counts as too much. It is written to the
    root's facts.
    """
    first = yield from cheap(problem)
    unsure = uncertainty(problem, first, signal=signal, window=window)
    problem.root.facts |= {"uncertainty": unsure, "more_compute": not unsure <= threshold}
    if unsure <= threshold or problem.ledger.left < 1:
        return first
    second = yield from dear(problem)
    whole = [c for c in second.candidates if c.node is None or c.node.complete]
    if not whole:
        return Found(first.candidates + second.candidates, first.votes)
    return Found(second.candidates + first.candidates, second.votes)
