"""More compute where the model is unsure: a cheap method answers, and above a threshold of uncertainty a dear one."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal, get_args

from jaxpost.search.contract import Found, Method, Search, SearchError
from jaxpost.search.difficulty import disagreement
from jaxpost.search.requests import Draw
from jaxpost.search.tree import Problem
from jaxpost.search.vote import confidence, entropy

Signal = Literal["entropy", "confidence", "disagreement", "score"]


def uncertainty(problem: Problem, found: Found, *, signal: Signal, window: int = 16) -> float:
    """How unsure what a method found leaves one; NaN where the signal is not there.

    entropy: mean entropy of the distributions that the chosen answer's tokens were drawn from, nats (`vote.entropy`).
    confidence: k exp(-C), in [0, 1], of the lowest group confidence C of DeepConf (`vote.confidence`, 2508.15260): 1
    where the k most probable tokens are alike, towards 0 where one has all probability; DeepConf's own threshold s is
    k exp(-s) here. disagreement: of the candidates' answers, in [0, 1] (`difficulty.disagreement`). score: 1 - the
    chosen answer's score.

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
    told = [row for node in chosen.node.path for row in node.best] if chosen.node is not None else []
    if signal == "entropy" or not told:
        return entropy(told)
    return len(told[0]) * math.exp(-confidence(told, "lowest", window=window))


def metacognition(
    problem: Problem, *, cheap: Method, dear: Method, signal: Signal = "entropy", threshold: float = 0.5,
    window: int = 16, top_logprobs: int = 20,
) -> Search:  # fmt: skip
    """The cheap method's answer where its `uncertainty` is at most the threshold, else the dear method's.

    The dear method goes on in the same tree, with what the cheap one left of the budget. Where it finds nothing (the
    budget ended), the cheap answer stands. Uncertainty that is not known counts as too much. It is written to the
    root's facts.

    Args:
        window: tokens of a group (`confidence`).
        top_logprobs: the most probable tokens that `entropy` and `confidence` look at, at every place.

    Raises:
        ValueError: a window or top_logprobs below 1.
    """
    if window < 1 or top_logprobs < 1:
        raise ValueError(f"window is {window} and top_logprobs is {top_logprobs}; both must be at least 1")
    first = yield from _told(cheap(problem), top_logprobs if signal in ("entropy", "confidence") else 0)
    unsure = uncertainty(problem, first, signal=signal, window=window)
    problem.root.facts |= {"uncertainty": unsure, "more_compute": not unsure <= threshold}
    if unsure <= threshold or problem.ledger.left < 1:
        return first
    second = yield from dear(problem)
    whole = [c for c in second.candidates if c.node is None or c.node.complete]
    if not whole:
        return Found(first.candidates + second.candidates, first.votes)
    return Found(second.candidates + first.candidates, second.votes)


def _told(search: Search, top_logprobs: int) -> Search:
    """The same search, whose draws tell the most probable tokens."""
    value: Any = None
    fault: SearchError | None = None
    try:
        while True:
            request = search.send(value) if fault is None else search.throw(fault)
            if isinstance(request, Draw):
                request = replace(request, top_logprobs=max(top_logprobs, request.top_logprobs))
            value, fault = None, None
            try:
                value = yield request
            except SearchError as error:
                fault = error
    except StopIteration as stop:
        return stop.value
    finally:
        search.close()
