"""How hard a prompt looks: features in [0, 1], each with its scale, and their weighted mean.

| feature | value | scale |
|---|---|---|
| length | min(1, prompt tokens / `long_prompt`) | tokens |
| domain | min(1, domain words in the prompt / `many_domain`) | words |
| ambiguity | min(1, ambiguous words in the prompt / `many_ambiguous`) | words |
| past | 1 - accuracy on such prompts before | given |
| agreement | (1 - share of the most frequent answer) / (1 - 1/k) of k probes; no answer agrees with none | probes |
| surprise | min(1, mean -log p of the probes' tokens / `surprising`) | nats |
| verifier | 1 - mean score of the probes, cut to [0, 1] | scores |

A feature that is not known (NaN) has no part in the mean.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxpost.search.contract import Found
from jaxpost.search.requests import Draw, Request, Score
from jaxpost.search.tree import Node, Problem
from jaxpost.search.verifiers import prompt_text

FEATURES = ("length", "domain", "ambiguity", "past", "agreement", "surprise", "verifier")
DOMAIN = ("prove", "integral", "derivative", "probability", "polynomial", "matrix", "theorem", "triangle", "modulo")
AMBIGUOUS = ("or", "about", "roughly", "maybe", "some", "several", "might", "could", "approximately", "either")


@dataclass(frozen=True)
class Measuring:
    """How features are had.

    Attributes:
      weights: of features by name, 0 or more; a feature that is not named weighs 1. (A weight of 0 leaves it out.)
      probes: k, samples that are drawn to look at; they cost tokens.
      greedy: the first probe is drawn at temperature 0.
      max_tokens: of a probe.
      sampling: of the probes.
      past: accuracy in [0, 1] on prompts such as this one before; NaN where there were none.
      score: have the search's verifier judge the probes.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    probes: int = 4
    greedy: bool = False
    max_tokens: int = 256
    sampling: Mapping[str, Any] = field(default_factory=dict)
    long_prompt: int = 200
    domain_words: Sequence[str] = DOMAIN
    many_domain: int = 3
    ambiguous_words: Sequence[str] = AMBIGUOUS
    many_ambiguous: int = 4
    surprising: float = 1.0
    past: Callable[[Problem], float] | None = None
    score: bool = False

    def __post_init__(self) -> None:
        unknown = set(self.weights) - set(FEATURES)
        if unknown:
            raise ValueError(f"{', '.join(sorted(unknown))} is no feature; there are {', '.join(FEATURES)}")
        if min(self.long_prompt, self.many_domain, self.many_ambiguous, self.max_tokens, self.surprising) <= 0:
            raise ValueError(f"scales are above 0: {self}")
        if any(w < 0 for w in self.weights.values()):
            raise ValueError(f"weights are 0 or more, not {dict(self.weights)}")


MEASURING = Measuring()


class Measured(NamedTuple):
    """What was measured of one prompt."""

    difficulty: float
    features: Mapping[str, float]
    probes: Sequence[Node]
    votes: Mapping[str, float]


def difficulty(features: Mapping[str, float], weights: Mapping[str, float] | None = None) -> float:
    """sum_i w_i f_i / sum_i w_i over the features that are known; 1/2 where none is.

    Example:
      >>> difficulty({"length": 0.25, "agreement": 0.75, "past": math.nan}, {"agreement": 3.0})
      0.625

    Raises:
      ValueError: a feature outside of [0, 1].
    """
    known = {name: value for name, value in features.items() if not math.isnan(value)}
    for name, value in known.items():
        if not 0 <= value <= 1:
            raise ValueError(f"the feature {name!r} is {value:g}, and features are in [0, 1]")
    weigh = {name: (weights or {}).get(name, 1.0) for name in known}
    total = math.fsum(weigh.values())
    return math.fsum(weigh[name] * known[name] for name in known) / total if total else 0.5


def share_of_words(text: str, listed: Sequence[str], many: int) -> float:
    """min(1, words of the text that are listed / many).

    >>> share_of_words("Prove it, or prove this.", ["prove"], 4)
    0.5
    """
    wanted = {word.casefold() for word in listed}
    return min(1.0, sum(word in wanted for word in re.findall(r"\w+", text.casefold())) / many)


def disagreement(answers: Sequence[str | None]) -> float:
    """(1 - share of the most frequent answer) / (1 - 1/k); NaN for less than two. None agrees with nothing.

    >>> disagreement(["7", "7", "7", "8"]), disagreement(["7", "8", None])
    (0.3333333333333333, 1.0)
    """
    k = len(answers)
    if k < 2:
        return math.nan
    counts = Counter(answer for answer in answers if answer is not None)
    most = max(counts.values(), default=1)
    return (1 - most / k) / (1 - 1 / k)


def surprise(nodes: Sequence[Node], *, surprising: float) -> float:
    """min(1, mean of -log p over all tokens that were drawn / surprising); NaN without any."""
    drawn = [x for node in nodes for x in node.logprobs]
    return min(1.0, max(0.0, -math.fsum(drawn) / len(drawn) / surprising)) if drawn else math.nan


def measure(problem: Problem, how: Measuring) -> Generator[Request, Any, Measured]:
    """Features and difficulty of a prompt, drawing and judging its probes; written to the root's facts, too."""
    features = dict.fromkeys(FEATURES, math.nan)
    text = prompt_text(problem.prompt)
    features["length"] = min(1.0, len(problem.root.tokens) / how.long_prompt)
    features["domain"] = share_of_words(text, how.domain_words, how.many_domain)
    features["ambiguity"] = share_of_words(text, how.ambiguous_words, how.many_ambiguous)
    if how.past is not None:
        features["past"] = 1.0 - how.past(problem)
    probes: list[Node] = []
    if how.probes:
        first = int(how.greedy)
        for n, sampling in ((first, {**how.sampling, "temperature": 0.0}), (how.probes - first, how.sampling)):
            if n:
                [drawn] = yield Draw(
                    [problem.root], n, how.max_tokens, scored=how.score, sampling=sampling, note="probe"
                )
                probes += drawn
        features["agreement"] = disagreement([problem.canonical(node.answer) for node in probes])
        features["surprise"] = surprise(probes, surprising=how.surprising)
        if how.score and probes:
            scores = [x for x in (yield Score(probes)) if not math.isnan(x)]
            if scores:
                features["verifier"] = 1.0 - min(1.0, max(0.0, math.fsum(scores) / len(scores)))
    value = difficulty(features, how.weights)
    problem.root.facts["difficulty"] = value
    problem.root.facts["features"] = {name: x for name, x in features.items() if not math.isnan(x)}
    votes = Counter(c for c in (problem.canonical(node.answer) for node in probes) if c is not None)
    return Measured(value, features, probes, {answer: float(count) for answer, count in votes.items()})


def probe_only(problem: Problem, how: Measuring) -> Generator[Request, Any, Found]:
    """A method that measures, and answers with the vote of its probes."""
    found = yield from measure(problem, how)
    return vote_of(problem, found)


def vote_of(problem: Problem, found: Measured) -> Found:
    """The probes' answers, those of the most frequent answer first."""
    weight = {id(n): found.votes.get(problem.canonical(n.answer) or "", 0.0) for n in found.probes}
    return Found(Found.best(list(found.probes), key=lambda node: weight[id(node)]).candidates, found.votes)
