"""Verifiers made of verifiers: product, weighted mean, min, and a gate that asks a dear one only where a cheap one
passes. Their parts' prices add up; their parts' scores stand in `Verdict.parts`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from jaxpost.search.contract import Case, Verdict, Verifier, opening
from jaxpost.search.tree import Node, Problem

Squash = Literal["none", "sigmoid"]


def squashed(score: float, how: Squash) -> float:
    """The score itself, or s(score) = 1 / (1 + exp(-score)).

    >>> squashed(0.0, "sigmoid"), squashed(-1e9, "sigmoid")
    (0.5, 0.0)
    """
    if how == "none":
        return score
    return 1.0 / (1.0 + math.exp(-score)) if score >= 0 else 1.0 - 1.0 / (1.0 + math.exp(max(score, -700.0)))


@dataclass(frozen=True)
class Composed:
    """One number of several verdicts on the same text.

    product: prod_i V_i, each V_i in [0, 1]. mean: sum_i w_i V_i / sum_i w_i. min: min_i V_i. Steps are those of the
    first part that judges steps. A part that fails, says NaN or, of a product, leaves [0, 1] fails the whole, with its
    name.

    Attributes:
      parts: by name.
      weights: of the mean, by part; () all equal.
      squash: "sigmoid" maps the scores of the parts named in `squashed_parts` (all, if none is named) into [0, 1].

    Raises:
      ValueError: no parts; weights for other parts, below 0 or all 0.
    """

    parts: Mapping[str, Verifier]
    how: Literal["product", "mean", "min"] = "product"
    weights: Mapping[str, float] = field(default_factory=dict)
    squash: Squash = "none"
    squashed_parts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("a composed verifier needs parts")
        unknown = (set(self.weights) | set(self.squashed_parts)) - set(self.parts)
        if unknown:
            raise ValueError(f"there is no part {', '.join(sorted(unknown))} among {', '.join(self.parts)}")
        if self.weights and (set(self.weights) != set(self.parts) or self.how != "mean"):
            raise ValueError(f"weights are of a mean and name every part: {', '.join(self.parts)}")
        if any(w < 0 for w in self.weights.values()) or (self.weights and not any(self.weights.values())):
            raise ValueError(f"weights are 0 or more and not all 0, not {dict(self.weights)}")

    def __call__(self, cases: Sequence[Case]) -> Sequence[Verdict | str]:
        said = {name: ask(name, part, cases) for name, part in self.parts.items()}
        return [self._one({name: found[i] for name, found in said.items()}) for i in range(len(cases))]

    def _one(self, found: Mapping[str, Verdict | str]) -> Verdict | str:
        scores: dict[str, float] = {}
        inner: dict[str, float] = {}
        tokens, steps = 0, ()
        for name, verdict in found.items():
            if isinstance(verdict, str):
                return verdict
            scores[name] = squashed(verdict.score, self._squash_of(name))
            inner |= {f"{name}/{key}": value for key, value in verdict.parts.items()}
            tokens += verdict.tokens
            steps = steps or verdict.steps
            if self.how == "product" and not 0.0 <= scores[name] <= 1.0:
                return (
                    f"its part {name!r} said {scores[name]:g}, and a product needs scores in [0, 1]: "
                    "give it squash: sigmoid"
                )
        return Verdict(self._formula(scores), tokens, steps, scores | inner)

    def _squash_of(self, name: str) -> Squash:
        return self.squash if not self.squashed_parts or name in self.squashed_parts else "none"

    def _formula(self, scores: Mapping[str, float]) -> float:
        if self.how == "product":
            return math.prod(scores.values())
        if self.how == "min":
            return min(scores.values())
        weights = {name: self.weights.get(name, 1.0) for name in scores}
        return math.fsum(weights[name] * x for name, x in scores.items()) / math.fsum(weights.values())

    def price(self, case: Case, new_tokens: int) -> int:
        return sum(part.price(case, new_tokens) for part in self.parts.values())

    def opening(self, problem: Problem) -> int:
        return sum(opening(part, problem) for part in self.parts.values())

    def forget(self, nodes: Sequence[Node]) -> None:
        for part in self.parts.values():
            part.forget(nodes)


@dataclass(frozen=True)
class Gate:
    """V = then(text) where condition(text) >= threshold, else `otherwise`, and `then` is not asked.

    The price is what both may cost; what is charged is what was asked.
    """

    condition: Verifier
    then: Verifier
    threshold: float = 0.5
    otherwise: float = 0.0
    names: tuple[str, str] = ("gate", "then")

    def __call__(self, cases: Sequence[Case]) -> Sequence[Verdict | str]:
        first = ask(self.names[0], self.condition, cases)
        passed = [
            i for i, verdict in enumerate(first) if not isinstance(verdict, str) and verdict.score >= self.threshold
        ]
        second = dict(zip(passed, ask(self.names[1], self.then, [cases[i] for i in passed]), strict=True))
        return [self._one(first[i], second.get(i)) for i in range(len(cases))]

    def _one(self, gate: Verdict | str, then: Verdict | str | None) -> Verdict | str:
        if isinstance(gate, str) or isinstance(then, str):
            return gate if isinstance(gate, str) else str(then)
        if then is None:
            return Verdict(self.otherwise, gate.tokens, (), {self.names[0]: gate.score})
        inner = {f"{self.names[1]}/{key}": value for key, value in then.parts.items()}
        parts = {self.names[0]: gate.score, self.names[1]: then.score} | inner
        return Verdict(then.score, gate.tokens + then.tokens, then.steps, parts)

    def price(self, case: Case, new_tokens: int) -> int:
        return self.condition.price(case, new_tokens) + self.then.price(case, new_tokens)

    def opening(self, problem: Problem) -> int:
        return opening(self.condition, problem) + opening(self.then, problem)

    def forget(self, nodes: Sequence[Node]) -> None:
        self.condition.forget(nodes)
        self.then.forget(nodes)


@dataclass(frozen=True)
class Squashed:
    """s(V / temperature) of another verifier's V, its steps too: an unbounded score in [0, 1]."""

    verifier: Verifier
    temperature: float = 1.0

    def __call__(self, cases: Sequence[Case]) -> Sequence[Verdict | str]:
        return [
            v
            if isinstance(v, str)
            else v._replace(score=self._map(v.score), steps=tuple(self._map(step) for step in v.steps))
            for v in self.verifier(cases)
        ]

    def _map(self, score: float) -> float:
        return squashed(score / self.temperature, "sigmoid")

    def price(self, case: Case, new_tokens: int) -> int:
        return self.verifier.price(case, new_tokens)

    def opening(self, problem: Problem) -> int:
        return opening(self.verifier, problem)

    def forget(self, nodes: Sequence[Node]) -> None:
        self.verifier.forget(nodes)


def ask(name: str, part: Verifier, cases: Sequence[Case]) -> list[Verdict | str]:
    """A part's verdicts; its failures, NaN and wrong numbers of verdicts as sentences with its name."""
    if not cases:
        return []
    found = list(part(cases))
    if len(found) != len(cases):
        return [f"its part {name!r} gave {len(found)} verdicts on {len(cases)} texts"] * len(cases)
    return [
        f"its part {name!r}: {v}" if isinstance(v, str) else f"its part {name!r} said NaN" if math.isnan(v.score) else v
        for v in found
    ]
