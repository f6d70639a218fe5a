"""What searches are written in: generators that yield requests and return what they found; who answers them.

A search of one prompt never calls a model: it yields requests (`requests.py`: draw continuations, rank next tokens,
score nodes ...), is sent what they gave, and returns `Found`. `drive.search` runs many of them side by side, answers
the requests of all prompts in one batch each, and keeps every prompt within its budget. So a method is a plain
function of keyword hyper-parameters, tested on any model that answers requests.

    def best_of_n(problem, *, n=16, max_tokens=256):
        [answers] = yield Draw([problem.root], n=n, max_tokens=max_tokens, scored=True)
        yield Score(answers)
        return Found.best(answers)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxpost.search.requests import Request
from jaxpost.search.tree import End, Node, Problem


class SearchError(ValueError):
    """The search of one prompt cannot go on; the other prompts do."""


class Candidate(NamedTuple):
    """An answer that a search offers."""

    text: str
    score: float
    node: Node | None = None
    canonical: str | None = None


@dataclass(frozen=True)
class Found:
    """What a search found: candidates, the chosen one first. `votes`: weight of each canonical answer, if it voted."""

    candidates: tuple[Candidate, ...]
    votes: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def best(cls, nodes: Sequence[Node], key: Callable[[Node], float] | None = None) -> Found:
        """Nodes by score (or key), highest first; complete answers before cut ones, unscored ones last."""

        def place(pair: tuple[Node, float]) -> tuple[bool, bool, float]:
            node, score = pair
            return (not node.complete, math.isnan(score), -score if not math.isnan(score) else 0.0)

        scored = [(node, node.score if key is None else key(node)) for node in nodes]
        return cls(tuple(Candidate(n.answer, score, n) for n, score in sorted(scored, key=place)))


Search = Generator[Request, Any, Found]
Method = Callable[[Problem], Search]
"""Hyper-parameters bound with `functools.partial`."""


@dataclass(frozen=True)
class SearchOutput:
    """One prompt's result: candidates, the chosen one first; `tree` is the root."""

    problem: Problem
    answers: tuple[Candidate, ...]
    votes: Mapping[str, float]
    error: str | None = None

    @property
    def tree(self) -> Node:
        return self.problem.root

    @property
    def tokens_spent(self) -> int:
        return self.problem.ledger.spent


class Verdict(NamedTuple):
    """A verifier's word on one text."""

    score: float
    tokens: int = 0
    """That it read or drew for this."""
    steps: tuple[float, ...] = ()
    parts: Mapping[str, float] = {}
    """By name, where several were composed."""


class Case(NamedTuple):
    """What a verifier judges: the text from the problem's root to the node."""

    problem: Problem
    node: Node


@runtime_checkable
class Verifier(Protocol):
    """judge(cases) -> a Verdict for each, or a sentence where it cannot say (the node's score is then NaN); may keep
    state of nodes until `forget`."""

    def __call__(self, cases: Sequence[Case]) -> Sequence[Verdict | str]: ...

    def price(self, case: Case, new_tokens: int) -> int:
        """Most tokens that judging `new_tokens` more tokens after this node will cost; 0 of a rule."""
        ...

    def forget(self, nodes: Sequence[Node]) -> None:
        """Gives back what is held for these nodes."""
        ...


@runtime_checkable
class Opening(Protocol):
    """A verifier whose first judgement of a problem costs more than the prices of its texts."""

    def opening(self, problem: Problem) -> int:
        """Most tokens that it costs besides, once; 0 after it."""
        ...


def opening(verifier: Verifier, problem: Problem) -> int:
    """What a verifier's first judgement of a problem costs besides, if anything."""
    return verifier.opening(problem) if isinstance(verifier, Opening) else 0


class Job(NamedTuple):
    """One continuation to draw."""

    node: Node
    max_tokens: int
    stop: tuple[str, ...]
    sampling: Mapping[str, Any]
    example: int
    sample: int
    """(example, sample) names it in the noise."""
    top_logprobs: int = 0
    """How many of the most probable tokens' log-probabilities are told at every place, under softmax(logits)."""
    begin: int | None = None
    """Tokens before the answer, for penalties; None: the root's."""


class Drawn(NamedTuple):
    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...]
    end: End
    best: tuple[tuple[float, ...], ...] = ()
    """At each token's place those of the most probable tokens, if they were asked for."""


@runtime_checkable
class Policy(Protocol):
    """The model that is searched. Each call answers for nodes of many prompts; a sentence in place of a result is why
    that one cannot be had."""

    def read(self, prompts: Sequence[Any]) -> list[tuple[int, ...] | str]:
        """Tokens of prompts, by the chat template."""
        ...

    def encode(self, text: str) -> tuple[int, ...]: ...

    def draw(self, jobs: Sequence[Job]) -> list[Drawn | str]: ...

    def rank(self, nodes: Sequence[Node], best: int) -> list[tuple[Sequence[int], Sequence[float]] | str]: ...

    def piece(self, node: Node, token: int) -> tuple[str, bool]:
        """What a token adds to a node's text, and whether it ends the answer."""
        ...

    def likelihood(self, nodes: Sequence[Node], texts: Sequence[Sequence[int]]) -> list[Sequence[float] | str]: ...

    def forget(self, nodes: Sequence[Node]) -> None:
        """Gives back what is held for these nodes."""
        ...
