"""Compiles beforehand what calls up to a given size can need, so that a strict engine meets no new program."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpost.generate.engine import Engine, Weights
from jaxpost.generate.layout import Pass, Text, bucket, buckets, power, smaller
from jaxpost.generate.matcher import masks
from jaxpost.generate.pages import Copies, PagedRow
from jaxpost.generate.programs import Part
from jaxpost.generate.rows import RowParams
from jaxpost.generate.speculative import Lookup
from jaxpost.models.pages import Tables


class WarmUp(NamedTuple):
    """What a warm-up did."""

    programs: int
    """Compiled now; those that were ready are not counted."""
    seconds: float


class Sizes(NamedTuple):
    """The largest calls to be ready for.

    Attributes:
        rows: most rows that decode together.
        read: most tokens that are read before a row decodes: a prompt's, or a whole text's where rows may start again.
        longest: most tokens of a row, prompt included.
        best: numbers of most probable tokens told beside the drawn one (0: none).
        prompt_best: the same for a prompt's tokens; None: prompts are not scored.
        constrained: rows may have a grammar or a thinking budget.
        ranked: numbers of candidates that beam searches look at (none: there are no such searches).
    """

    rows: int
    read: int
    longest: int
    best: Sequence[int] = (0,)
    prompt_best: int | None = None
    constrained: bool = False
    ranked: Sequence[int] = ()


def warm_up(engine: Engine, weights: Weights, wishes: RowParams, sizes: Sizes, *, lookup: Lookup | None) -> WarmUp:
    """Runs every program once, on rows that do nothing; `wishes` is one row of the widths that calls will have."""
    start, before, strict = time.perf_counter(), len(engine.compiled), engine.strict
    engine.least_pages = max(engine.least_pages, power(engine.book.pages_for(sizes.longest)))
    engine.strict = False
    try:
        quota = bucket(-(-sizes.rows // engine.shards))
        for size in buckets(quota):
            _copies(engine, size)
            _decode(engine, weights, wishes, sizes, size, lookup)
        # All beams of a prompt lie in one part, and so may several prompts.
        for size in buckets(sizes.rows) if sizes.ranked else ():
            _copies(engine, size)
            _rank(engine, weights, wishes, sizes, size)
        _read(engine, weights, sizes, quota)
    finally:
        engine.strict = strict
    return WarmUp(len(engine.compiled) - before, time.perf_counter() - start)


def _copies(engine: Engine, size: int) -> None:
    engine._copy([Copies(full=((0, 0),) * size)] + [Copies()] * (engine.shards - 1))


def _rank(engine: Engine, weights: Weights, wishes: RowParams, sizes: Sizes, size: int) -> None:
    # They write to page 0, which is nobody's.
    texts = [Text([0], 1, PagedRow(full=[0], window=[0])) for _ in range(size)]
    rows = jax.tree.map(lambda x: np.repeat(x, size, axis=0), wishes)
    for best in sizes.ranked:
        engine.rank(weights, texts, rows, [sizes.longest] * size, best=best)


def _decode(
    engine: Engine, weights: Weights, wishes: RowParams, sizes: Sizes, size: int, lookup: Lookup | None
) -> None:
    texts = [Text([0], 1, PagedRow(shard=i % engine.shards)) for i in range(size * engine.shards)]
    rows = jax.tree.map(lambda x: np.repeat(x, len(texts), axis=0), wishes)
    keys = np.zeros((len(texts), 2), np.uint32)
    every = masks([None] * len(texts), engine.model.config.vocab_size)
    for mask in (None, every) if sizes.constrained else (None,):
        for best in sizes.best:
            limits = [sizes.longest] * len(texts)
            engine.extend(weights, texts, rows, keys, limits, steps=0, mask=mask, best=best, lookup=lookup)


def _read(engine: Engine, weights: Weights, sizes: Sizes, quota: int) -> None:
    """Passes over prompts, and over what a grammar dictates."""
    most = engine.prefill_tokens

    def widths(tokens: int) -> list[int]:
        return sorted({min(width, most) for width in _powers(16, max(tokens, 1))})

    for width in widths(sizes.read - 1):
        for fresh in (True, False) if sizes.read - 1 > most else (True,):
            for size in buckets(smaller(min(quota, max(1, most // width // engine.shards)))):
                engine._store(weights, _nothing(engine, size, width, fresh=fresh))
            if sizes.prompt_best is not None:
                _score(engine, weights, 1, width, fresh=fresh, best=sizes.prompt_best)
    for width in widths(sizes.longest) if sizes.constrained else ():
        for size in buckets(smaller(min(quota, max(1, most // width // engine.shards)))):
            for best in sizes.best:
                for fresh in (True, False):
                    _score(engine, weights, size, width, fresh=fresh, best=best)


def _score(engine: Engine, weights: Weights, size: int, width: int, *, fresh: bool, best: int) -> None:
    part = _nothing(engine, size, width, fresh=fresh)
    engine._score(weights, part, np.ones(len(part.targets), np.float32), best)


def _nothing(engine: Engine, size: int, width: int, *, fresh: bool) -> Pass:
    """A pass over no tokens."""
    size *= engine.shards
    tokens = np.zeros((size, width), np.int32)
    starts = np.full(size, 0 if fresh else 1, np.int32)
    arrays: Any = (tokens, starts, np.zeros(size, np.int32))
    tables: Any = np.zeros((2, size, engine.least_pages), np.int32)
    return Pass([], np.zeros(0, np.int64), Part(*arrays), tokens.copy(), Tables(*tables))


def _powers(least: int, most: int) -> list[int]:
    """Powers of two from `least` to the first that is at least `most`."""
    found = [least]
    while found[-1] < most:
        found.append(2 * found[-1])
    return found
