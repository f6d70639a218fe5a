"""Beam search over tokens: the most probable texts, as far as a number of beams finds them."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, Literal, NamedTuple

from jaxpost.search.contract import Candidate, Found, Search
from jaxpost.search.requests import Push, Rank, Request
from jaxpost.search.stepwise import let_go
from jaxpost.search.tree import Node, Problem

END_TOKENS = 8
"""Most tokens that may end an answer: so many more next tokens are looked at than beams go on."""


class _Open(NamedTuple):
    sum: float
    node: Node


class _Next(NamedTuple):
    sum: float
    node: Node
    token: int
    logprob: float


def token_beam(
    problem: Problem,
    *,
    beams: int = 4,
    max_tokens: int = 256,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
) -> Search:
    """The texts y with the highest log p(y | x) / |y| ** length_penalty that `beams` beams find.

    As transformers' `generate(num_beams=beams, do_sample=False)` and `generate.beam.beam_search`: in every round all
    next tokens of all open beams compete by the sum of their log-probabilities; of those that end a text only the
    ones among the best `beams` count; the best `beams` others go on. With beams >= the number of texts of every
    length it is exact.

    Args:
        beams: texts side by side, and most texts that are found.
        max_tokens: of an answer; what is still open there counts as found, cut.
        length_penalty: above 0 favours longer texts.
        early_stopping: it ends once `beams` texts have ended (True), once the best open beam at its present length no
            longer beats the worst of them (False), or once it would not at any length ("never").

    Raises:
        ValueError: fewer than 1 beam.

    Example:
      >>> from jaxpost.search.tree import Ledger, Node, Problem
      >>> next(token_beam(Problem(0, "2+2=", Node(0, None, (1,), ""), Ledger(), str.strip), beams=2)).best
      10
    """
    if beams < 1:
        raise ValueError(f"beams is {beams}; a search has at least 1")
    open_, ended = [_Open(0.0, problem.root)], list[Candidate]()
    for length in range(1, max_tokens + 1):
        ranked = yield Rank([beam.node for beam in open_], beams + END_TOKENS)
        found = [
            _Next(beam.sum + logprob, beam.node, int(token), float(logprob))
            for beam, row in zip(open_, ranked, strict=True)
            for token, logprob in zip(*row, strict=True)
        ]
        if not all(len(row[0]) for row in ranked):
            break
        found.sort(key=lambda one: -one.sum)
        grown, over = (yield from _grow(found, beams)), length == max_tokens
        for place, beam in enumerate(grown):
            if beam.node.complete or over:
                beam.node.end = beam.node.end if beam.node.complete else "length"
                if place < beams:
                    ended.append(_candidate(beam, length_penalty))
        ended = sorted(ended, key=lambda text: -text.score)[:beams]
        before, open_ = open_, [] if over else [beam for beam in grown if not beam.node.complete]
        let_go(problem, [beam.node for beam in before], [beam.node for beam in open_])
        if not open_ or _settled(open_[0].sum, ended, length, beams, max_tokens, length_penalty, early_stopping):
            break
    cut = [_candidate(beam, length_penalty) for beam in open_ if beam.node is not problem.root]
    return Found(tuple(ended) or tuple(sorted(cut, key=lambda text: -text.score)))


def _grow(found: Sequence[_Next], beams: int) -> Generator[Request, Any, list[_Open]]:
    """Writes the best next tokens until `beams` of them go on; best first. A token that is known to end a text and
    comes after the best `beams` does not count, so it is not written."""
    grown: list[_Open] = []
    ends: set[int] = set()
    alive = 0
    for place, one in enumerate(found):
        if alive == beams:
            break
        if place >= beams and one.token in ends:
            continue
        [node] = yield Push([one.node], [one.token], [one.logprob])
        if node.complete:
            ends.add(one.token)
        alive += not node.complete
        if place < beams or not node.complete:
            grown.append(_Open(one.sum, node))
    return grown


def _candidate(beam: _Open, length_penalty: float) -> Candidate:
    beam.node.score = beam.sum / beam.node.answer_tokens**length_penalty
    return Candidate(beam.node.answer, beam.node.score, beam.node)


def _settled(
    best: float, ended: Sequence[Candidate], length: int, beams: int, max_tokens: int, length_penalty: float,
    early_stopping: bool | str,
) -> bool:  # fmt: skip
    """Whether no open beam is expected to beat what has ended."""
    if len(ended) < beams:
        return False
    if early_stopping is True:
        return True
    longest = max_tokens if early_stopping == "never" and length_penalty > 0 else length
    return best / longest**length_penalty <= ended[-1].score
