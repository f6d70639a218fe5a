"""What a call of the sampler is made of: samples that wait or decode, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import jax
import numpy as np

from jaxpost.generate.layout import Text, bucket
from jaxpost.generate.matcher import Matcher
from jaxpost.generate.params import SamplingParams
from jaxpost.generate.rows import RowParams
from jaxpost.generate.thinking import ThinkingMatcher

Finish = Literal["stop", "length", "error"]


class Completion(NamedTuple):
    """One sample on the host."""

    tokens: tuple[int, ...]
    """An end token, or the token that completed a stop string, is kept as the last."""
    logprobs: tuple[float, ...]
    finish: Finish
    text: str = ""
    """Without special tokens, and without the stop string or end token unless it is to be kept; "" if no `decode` was
    given."""
    example: int = 0
    sample: int = 0
    stop: str | int | None = None
    """The stop string or end token that ended the sample."""
    best: tuple[tuple[tuple[int, float], ...], ...] = ()
    """(token, log-probability) of the most probable tokens at each place, if asked for."""
    prompt_logprobs: tuple[float, ...] = ()
    """Of the prompt's tokens from the second on, under softmax(logits), if asked for."""
    prompt_best: tuple[tuple[tuple[int, float], ...], ...] = ()
    """(token, log-probability) of the most probable tokens at each of these places, if asked for."""
    error: str | None = None
    policy_version: int = 0
    guessed: int = 0
    """Tokens that speculation guessed."""
    right: int = 0
    """Those of them that were drawn."""
    score: float | None = None
    """Of a beam."""


@dataclass
class Sample:
    """One sample, waiting or decoding."""

    number: int
    example: int
    sample: int
    prompt: list[int]
    params: SamplingParams
    matcher: Matcher | None = None
    begin: int | None = None
    """Where the answer begins, for penalties; None: where the prompt ends."""
    start: Callable[[], Text | None] | None = None
    """A text that holds the prompt, if there is one when the sample's turn comes."""
    keep: Callable[[Text], None] | None = None
    """Takes the text when the sample has ended, in place of giving its pages back."""
    text: Text | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    best: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    guessed: int = 0
    right: int = 0

    @property
    def held(self) -> Text:
        """The text of a sample that is not waiting."""
        if self.text is None:
            raise RuntimeError(f"sample {self.number} waits, so it holds no pages")
        return self.text

    def takes(self, token: int) -> bool:
        """Whether its automaton takes a token; one that asks for nothing more is dropped: free rows go faster."""
        matcher = self.matcher
        if matcher is None:
            return True
        taken = matcher.advance(token)
        if isinstance(matcher, ThinkingMatcher) and matcher.over and matcher.leaf() is matcher:
            self.matcher = None
        return taken

    @property
    def limit(self) -> int:
        return len(self.prompt) + self.params.max_tokens


def why_stuck(params: SamplingParams, *, constrained: bool) -> str:
    """Why nothing can be drawn: what a row's wishes, and its automaton if it has one, ban together, or the model."""
    names = ("allowed_token_ids", "bad_words", "no_repeat_ngram_size", "min_tokens")
    bans = [f"{name}={value}" for name in names if (value := getattr(params, name))]
    bans += ["a grammar or a thinking budget"] * constrained
    if not bans:
        return "the model's logits are NaN or infinite here, so nothing can be drawn: look at its weights"
    told = ", ".join(ban if len(ban) <= 100 else f"{ban[:100]} ..." for ban in bans)
    return f"every token is banned here ({told}), so nothing can be drawn: ask for less"


@dataclass
class Table:
    """Parameters and noise keys of all samples of one call."""

    numbers: list[int]
    rows: RowParams | None
    keys: np.ndarray

    def __post_init__(self) -> None:
        self._at = {number: i for i, number in enumerate(self.numbers)}

    def of(self, samples: Sequence[Sample]) -> tuple[RowParams, np.ndarray]:
        """One row a sample, padded to a bucket with the first."""
        at = [self._at[s.number] for s in samples]
        at += at[:1] * (bucket(len(at)) - len(at))
        return jax.tree.map(lambda x: x[at], self.rows), self.keys[at]

    def ends(self, sample: Sample) -> set[int]:
        """A sample's end tokens."""
        return set() if self.rows is None else set(self.rows.end_ids[self._at[sample.number]].tolist())
