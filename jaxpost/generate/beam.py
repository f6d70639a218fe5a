"""Beam search: the most probable texts, as far as a number of beams kept side by side finds them.

The engine ranks the next tokens of all beams of all prompts in one pass; beams that part share their pages, so
choosing among them moves indices only. What is kept and when a search ends is as in transformers.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import jax
import numpy as np

from jaxpost.generate.batching import told_width
from jaxpost.generate.engine import Engine, Weights
from jaxpost.generate.layout import Text, bucket
from jaxpost.generate.pages import OutOfPages
from jaxpost.generate.params import SamplingParams
from jaxpost.generate.rows import RowParams, candidates
from jaxpost.generate.sampler import Sampler
from jaxpost.types import Params

EarlyStopping = bool | Literal["never"]


class Beam(NamedTuple):
    """One text that a search found."""

    tokens: tuple[int, ...]
    """An end token is kept as the last."""
    score: float
    """Sum of `logprobs` / length ** length_penalty."""
    logprobs: tuple[float, ...]
    """Of each token: log softmax(logits), after the penalties and bans asked for."""
    finish: Literal["stop", "length"]
    """Also "length" where every next token was banned."""
    text: str = ""
    """As a completion's; "" where the sampler has no `decode`."""


class Rules(NamedTuple):
    """How a search scores and when it ends.

    Attributes:
        beams: texts kept side by side.
        length_penalty: a text of n tokens scores log p / n ** length_penalty; above 0 favours longer ones.
        early_stopping: a prompt's search ends once `beams` texts have ended (True); once the best open beam, at its
            present length, no longer beats the worst of those (False); or once it would not at any length ("never").
    """

    beams: int
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False


@dataclass(frozen=True)
class _Open:
    """A beam that goes on."""

    sum: float
    text: Text
    logprobs: tuple[float, ...] = ()


class _Candidate(NamedTuple):
    sum: float
    parent: _Open
    token: int
    logprob: float


@dataclass
class _Search:
    """One prompt: its open beams, best first, and the best texts that have ended."""

    number: int
    prompt: list[int]
    rules: Rules
    max_tokens: int
    end_ids: frozenset[int]
    candidates: int
    open: list[_Open] = field(default_factory=list)
    ended: list[Beam] = field(default_factory=list)
    stuck: list[Beam] = field(default_factory=list)
    """Texts that nothing may follow."""

    def step(self, engine: Engine, logprobs: np.ndarray, tokens: np.ndarray) -> bool:
        """Takes the best next tokens of each open beam [b, N]; whether the search goes on."""
        found = [
            _Candidate(parent.sum + float(logprob), parent, int(token), float(logprob))
            for parent, *row in zip(self.open, logprobs, tokens, strict=True)
            for logprob, token in zip(*row, strict=True)
            if np.isfinite(logprob)
        ]
        self._keep_stuck({id(c.parent) for c in found})
        best = heapq.nsmallest(self.candidates, found, key=lambda c: -c.sum)
        length = len(self.open[0].logprobs) + 1
        over = length == self.max_tokens
        ends = [over or c.token in self.end_ids for c in best]
        chosen = [c for c, end in zip(best, ends, strict=True) if not end][: self.rules.beams]
        # Of texts that end, only those among the best `beams` candidates count.
        self._keep([c for c, end in zip(best[: self.rules.beams], ends, strict=False) if end], length)
        parents, self.open = self.open, [self._grow(engine, c) for c in chosen]
        engine.release([parent.text for parent in parents])
        return bool(self.open) and not self._settled(length)

    def _grow(self, engine: Engine, c: _Candidate) -> _Open:
        text = engine.fork(c.parent.text)
        engine.push(text, c.token)
        return _Open(c.sum, text, (*c.parent.logprobs, c.logprob))

    def _keep(self, ended: list[_Candidate], length: int) -> None:
        for c in ended:
            tokens = (*c.parent.text.tokens[len(self.prompt) :], c.token)
            finish: Literal["stop", "length"] = "stop" if c.token in self.end_ids else "length"
            score = c.sum / length**self.rules.length_penalty
            self.ended.append(Beam(tokens, score, (*c.parent.logprobs, c.logprob), finish))
        self.ended.sort(key=lambda beam: -beam.score)
        del self.ended[self.rules.beams :]

    def _keep_stuck(self, going: set[int]) -> None:
        """Keeps the open beams that have no candidate; one without a token is no text."""
        for beam in self.open:
            if id(beam) not in going and (length := len(beam.logprobs)):
                tokens = tuple(beam.text.tokens[len(self.prompt) :])
                score = beam.sum / length**self.rules.length_penalty
                self.stuck.append(Beam(tokens, score, beam.logprobs, "length"))

    def best(self, count: int) -> list[Beam]:
        """The best texts that have ended, best first; texts that nothing may follow where those are too few."""
        spare = sorted(self.stuck, key=lambda beam: -beam.score)
        return sorted([*self.ended, *spare][:count], key=lambda beam: -beam.score)

    def _settled(self, length: int) -> bool:
        """Whether no open beam is expected to beat what has ended."""
        rules = self.rules
        if len(self.ended) < rules.beams:
            return False
        if rules.early_stopping is True:
            return True
        longest = self.max_tokens if rules.early_stopping == "never" and rules.length_penalty > 0 else length
        return self.open[0].sum / longest**rules.length_penalty <= self.ended[-1].score


def beam_search(
    sampler: Sampler,
    params: Params,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    *,
    beams: int,
    length_penalty: float = 1.0,
    early_stopping: EarlyStopping = False,
) -> list[list[Beam]]:
    """The `sampling.n` best texts of every prompt that a search with `beams` beams finds, best first.

    Fewer where bans leave no more texts.

    As transformers' `generate(num_beams=..., do_sample=False)`, of many prompts together.

    Args:
        prompts: token ids.
        sampling: max_tokens, min_tokens, n, end tokens, penalties and bans; temperature must be 0 or 1, and nothing
            else that only drawing has may be set.
        beams, length_penalty, early_stopping: as `Rules`.

    Raises:
        ValueError: fewer beams than texts wanted, a parameter that a search has no use for, a prompt that does not
            fit; named.
        OutOfPages: the beams of one prompt do not fit the cache.
    """
    rules = Rules(beams, length_penalty, early_stopping)
    _check(sampling, rules)
    for number, prompt in enumerate(prompts):
        if problem := sampler.problem(number, prompt, sampling):
            raise ValueError(problem)
    if not prompts:
        return []
    rows = max(sampler.rows, beams)
    longest = max(map(len, prompts)) + sampling.max_tokens
    engine, weights = sampler.ready(params, longest, rows=rows, together=beams)
    wishes = sampler.pack([sampling])
    most = candidates(beams, wishes.end_ids[0])
    ends = frozenset(int(i) for i in wishes.end_ids[0] if i >= 0)
    queue = deque(_Search(i, list(p), rules, sampling.max_tokens, ends, most) for i, p in enumerate(prompts))
    found: dict[int, list[Beam]] = {}
    for search in _run(engine, weights, queue, wishes, together=rows // beams, longest=longest):
        found[search.number] = search.best(sampling.n)
    decode = sampler.decode or (lambda ids: "")

    def told(beam: Beam) -> Beam:
        cut = beam.finish == "stop" and not sampling.include_stop_str_in_output
        return beam._replace(text=decode(beam.tokens[: len(beam.tokens) - cut]))

    return [[told(beam) for beam in found[i]] for i in range(len(prompts))]


def _check(sampling: SamplingParams, rules: Rules) -> None:
    if rules.beams < 1 or sampling.n > rules.beams:
        raise ValueError(f"{rules.beams} beams cannot give n={sampling.n} texts: raise beams or lower n")
    if rules.early_stopping not in (True, False, "never"):
        raise ValueError(f"early_stopping is {rules.early_stopping!r}; write true, false or never")
    if sampling.temperature not in (0, 1):
        raise ValueError(
            f"beam search draws nothing, so temperature={sampling.temperature} has no meaning: leave it out"
        )
    for name in ("top_k", "top_p", "min_p", "stop", "logprobs", "prompt_logprobs", "seed"):
        if getattr(sampling, name) != getattr(SamplingParams(), name):
            raise ValueError(f"beam search has no use for {name}={getattr(sampling, name)!r}: leave it out")


def _run(
    engine: Engine, weights: Weights, queue: deque[_Search], wishes: RowParams, *, together: int, longest: int
) -> Iterator[_Search]:
    """Gives each search as it ends; prompts that wait take the place of those."""
    live: list[_Search] = []
    try:
        while queue or live:
            while queue and len(live) < together and _start(engine, weights, queue[0], alone=not live):
                live.append(queue.popleft())
            texts = [beam.text for search in live for beam in search.open]
            rows = _repeat(wishes, bucket(len(texts)))
            best = told_width(live[0].candidates, engine.model.config.vocab_size)
            try:
                ranked = engine.rank(weights, texts, rows, [longest] * len(texts), best=best)
            except OutOfPages:
                if len(live) == 1:
                    raise OutOfPages("the beams of one prompt do not fit the cache: raise cache_tokens") from None
                # The last prompt begins anew when there is room.
                last = live.pop()
                engine.release([beam.text for beam in last.open])
                last.open, last.ended, last.stuck = [], [], []
                queue.appendleft(last)
                together = len(live)
                continue
            at = 0
            for search in list(live):
                part = slice(at, at := at + len(search.open))
                if not search.step(engine, *(np.asarray(x[part]) for x in ranked)):
                    engine.release([beam.text for beam in search.open])
                    live.remove(search)
                    yield search
    finally:
        engine.release([beam.text for search in live for beam in search.open])


def _repeat(wishes: RowParams, rows: int) -> RowParams:
    return jax.tree.map(lambda x: np.repeat(x, rows, axis=0), wishes)


def _start(engine: Engine, weights: Weights, search: _Search, *, alone: bool) -> bool:
    """Reads a prompt; False if there is no room for it now."""
    try:
        [text] = engine.admit(weights, [search.prompt])
    except OutOfPages:
        if alone:
            raise
        return False
    search.open = [_Open(0.0, text)]
    return True
