"""A language model of a few letters whose whole tree can be enumerated, as a policy for searches.

Each token is a letter; "$" ends an answer. `table(text) -> {letter: probability}` of what follows a text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxpost.search.contract import Case, Drawn, Job, Verdict
from jaxpost.search.tree import Node

LETTERS = "$ab;0123456789+-*/=()\n <>?cdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ:.,`'{}"
END = 0
Table = Callable[[str], Mapping[str, float]]


def ids(text: str) -> tuple[int, ...]:
    return tuple(LETTERS.index(letter) for letter in text)


def letters(tokens: Sequence[int]) -> str:
    return "".join(LETTERS[t] for t in tokens)


class ToyPolicy:
    """Draws from a table; counts its calls, so that tests see what went in one batch."""

    def __init__(self, table: Table, *, seed: int = 0):
        self.table, self.seed = table, seed
        self.calls: list[tuple[str, int]] = []
        self.forgotten: list[Node] = []

    def read(self, prompts: Sequence[Any]) -> list[tuple[int, ...] | str]:
        return ["the prompt is empty" if not p else ids(str(p)) for p in prompts]

    def encode(self, text: str) -> tuple[int, ...]:
        return ids(text)

    def draw(self, jobs: Sequence[Job]) -> list[Drawn | str]:
        self.calls.append(("draw", len(jobs)))
        return [self._draw(job) for job in jobs]

    def _draw(self, job: Job) -> Drawn:
        text = letters(job.node.all_tokens)
        start = len(text)
        heat = float(job.sampling.get("temperature", 1.0))
        logprobs: list[float] = []
        best: list[tuple[float, ...]] = []
        while len(logprobs) < job.max_tokens:
            names, p = zip(*self.table(text).items(), strict=True)
            p = np.array(p, np.float64)
            if job.top_logprobs:
                row = [math.log(x) for x in sorted(p, reverse=True) if x > 0]
                best.append((*row, *[math.log(1e-30)] * job.top_logprobs)[: job.top_logprobs])
            if heat == 0:
                at = int(np.argmax(p))
            else:
                p = p ** (1 / heat)
                p /= p.sum()
                noise = np.random.default_rng([self.seed, job.example, job.sample, len(text)])
                at = min(int(np.searchsorted(np.cumsum(p), noise.random(), side="right")), len(p) - 1)
            logprobs.append(math.log(p[at]) if heat else 0.0)
            text += names[at]
            if names[at] == "$":
                return Drawn(ids(text[start:]), text[start:-1], tuple(logprobs), "stop", tuple(best))
            if any(stop in text[start:] for stop in job.stop):
                return Drawn(ids(text[start:]), text[start:], tuple(logprobs), "step", tuple(best))
        return Drawn(ids(text[start:]), text[start:], tuple(logprobs), "length", tuple(best))

    def rank(self, nodes: Sequence[Node], best: int) -> list[tuple[Sequence[int], Sequence[float]] | str]:
        self.calls.append(("rank", len(nodes)))
        out: list[Any] = []
        for node in nodes:
            found = sorted(self.table(letters(node.all_tokens)).items(), key=lambda pair: -pair[1])[:best]
            found = [(letter, p) for letter, p in found if p > 0]
            out.append(([ids(letter)[0] for letter, _ in found], [math.log(p) for _, p in found]))
        return out

    def piece(self, node: Node, token: int) -> tuple[str, bool]:
        return ("", True) if token == END else (LETTERS[token], False)

    def likelihood(self, nodes: Sequence[Node], texts: Sequence[Sequence[int]]) -> list[Sequence[float] | str]:
        self.calls.append(("likelihood", len(nodes)))
        out: list[Any] = []
        for node, tokens in zip(nodes, texts, strict=True):
            before = letters(node.all_tokens)
            out.append([
                math.log(self.table(before + letters(tokens[:i])).get(LETTERS[t], 0.0) or 1e-300)
                for i, t in enumerate(tokens)
            ])  # fmt: skip
        return out

    def forget(self, nodes: Sequence[Node]) -> None:
        self.forgotten += nodes


def says(text: str, marker: str, reply: str) -> dict[str, float] | None:
    """What a table gives that answers `reply` to what ends with the marker; None where the text has no marker."""
    if marker not in text:
        return None
    done = len(text.rpartition(marker)[2])
    return {reply[done] if done < len(reply) else "$": 1.0}


class ToyVerifier:
    """A function of the answer so far, at a price of one token a token that it reads."""

    def __init__(self, judge: Callable[[str], float], *, price: int = 0):
        self.judge, self._price, self.calls = judge, price, 0

    def __call__(self, cases: Sequence[Case]) -> Sequence[Verdict | str]:
        self.calls += 1
        return [Verdict(self.judge(c.node.answer), self.price(c, 0)) for c in cases]

    def price(self, case: Case, new_tokens: int) -> int:
        return self._price * (case.node.answer_tokens + new_tokens)

    def forget(self, nodes: Sequence[Node]) -> None:
        """It keeps nothing."""


def texts(table: Table, prompt: str, longest: int) -> dict[str, float]:
    """Every whole answer of at most `longest` letters with its probability."""
    out: dict[str, float] = {}
    open_ = {prompt: 1.0}
    for _ in range(longest):
        grown: dict[str, float] = {}
        for text, p in open_.items():
            for letter, q in table(text).items():
                if q <= 0:
                    continue
                if letter == "$":
                    out[text[len(prompt) :]] = out.get(text[len(prompt) :], 0.0) + p * q
                else:
                    grown[text + letter] = p * q
        open_ = grown
    return out
