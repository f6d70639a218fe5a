"""Texts on the host as rows of a batch: which row each takes, their tokens and page tables as padded arrays.

Rows come in `shards` equal parts, one for each set of pages. Lengths are powers of two and numbers of rows come from
a short list, so few programs are compiled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, UInt32

from jaxpost.generate.pages import PagedRow
from jaxpost.generate.programs import Part, Rows
from jaxpost.models.pages import Tables
from jaxpost.ops import platform

Slots = Int[np.ndarray, " N"]
"""The row of a batch that each of N texts takes."""


@dataclass
class Text:
    """One text on the host and the pages that hold it. All tokens but the last are stored once it was admitted."""

    tokens: list[int]
    prompt_length: int
    pages: PagedRow = field(default_factory=PagedRow)
    ranked: int = 0
    """Its length when `Engine.rank` wrote its last token too."""

    @property
    def unstored(self) -> int:
        """Tokens that are still to be stored."""
        return len(self.tokens) - 1 - self.pages.stored


@dataclass(frozen=True)
class Pass:
    """One pass over prompts: host arrays, `counts` tokens of each row."""

    sequences: list[Text]
    slots: Slots
    part: Part
    targets: Int[np.ndarray, "B T"]
    tables: Tables

    @property
    def counts(self) -> Int[np.ndarray, " B"]:
        return np.asarray(self.part.counts)

    @property
    def fresh(self) -> bool:
        return not np.any(self.part.starts)


def power(count: int, least: int = 1) -> int:
    """The smallest power of two that is at least both."""
    return 1 << (max(count, least, 1) - 1).bit_length()


def bucket(rows: int) -> int:
    """Rows that a batch is padded to: the platform's first bucket with room."""
    return next(size for size in _buckets() if size >= rows)


def smaller(rows: int) -> int:
    """The largest bucket that is at most `rows`, which needs no padding; 0 for no rows."""
    return max((size for size in takewhile(lambda size: size <= rows, _buckets())), default=0)


def buckets(rows: int) -> list[int]:
    """All buckets up to that of `rows`."""
    return [*takewhile(lambda size: size < bucket(rows), _buckets()), bucket(rows)]


def _buckets() -> Iterator[int]:
    """Ascending, without end."""
    listed = platform.choices().row_buckets
    yield from listed
    size = listed[-1]
    while True:
        size *= 2
        yield size


def slots_of(sequences: Sequence[Text], shards: int) -> tuple[Slots, int]:
    """The row of each text, among its part's, and how many rows the batch has.

    Example:
        >>> texts = [Text([1], 1, PagedRow(shard=shard)) for shard in (1, 0, 1)]
        >>> slots, size = slots_of(texts, 2)
        >>> slots.tolist(), size  # with buckets 1, 8, 16, 32
        ([8, 0, 9], 16)
    """
    counts = [0] * shards
    ranks = []
    for sequence in sequences:
        ranks.append(counts[sequence.pages.shard])
        counts[sequence.pages.shard] += 1
    size = bucket(max(counts))
    return np.asarray([s.pages.shard * size + r for s, r in zip(sequences, ranks, strict=True)]), shards * size


def dealt(sequences: Sequence[Text], shards: int, tree: Any) -> tuple[Slots, int, Any]:
    """`slots_of`, and host arrays of a row a text (padded, if there is one part) in the batch's order."""
    slots, size = slots_of(sequences, shards)
    if shards > 1:
        order = np.zeros(size, np.int32)
        order[slots] = np.arange(len(sequences))
        tree = jax.tree.map(lambda x: x[order], tree)
    return slots, size, tree


def rows_of(
    sequences: Sequence[Text],
    limits: Sequence[int],
    keys: UInt32[np.ndarray, "B 2"],
    slots: Slots,
    size: int,
    *,
    page_size: int,
    least_pages: int = 1,
) -> tuple[Rows, Tables]:
    """Rows that decode, with room for `limits` tokens, and their tables."""
    width = power(-(-max(limits) // page_size), least_pages)
    tokens = np.zeros((size, width * page_size), np.int32)
    numbers = np.ones((3, size), np.int32)
    for i, sequence, limit in zip(slots, sequences, limits, strict=True):
        tokens[i, : len(sequence.tokens)] = sequence.tokens
        numbers[:, i] = sequence.prompt_length, len(sequence.tokens), limit
    live = np.isin(np.arange(size), slots)
    arrays: Any = (tokens, *numbers, live, keys)
    return Rows(*arrays), tables_of(sequences, slots, size, width)


def tables_of(sequences: Sequence[Text], slots: Slots, size: int, width: int) -> Tables:
    """Their pages, padded with page 0."""
    tables: Any = np.zeros((2, size, width), np.int32)
    for i, sequence in zip(slots, sequences, strict=True):
        tables[0, i, : len(sequence.pages.full)] = sequence.pages.full
        tables[1, i, : len(sequence.pages.window)] = sequence.pages.window
    return Tables(*tables)


def passes(sequences: Sequence[Text], shards: int, prefill_tokens: int, *, least_pages: int = 1) -> Iterator[Pass]:
    """Passes over what the texts have not stored: long ones in pieces, short ones together."""
    todo = sorted(sequences, key=lambda s: -s.unstored)
    while todo := [s for s in todo if s.unstored > 0]:
        width = min(power(todo[0].unstored, 16), prefill_tokens)
        waiting = [[s for s in todo if s.pages.shard == shard] for shard in range(shards)]
        # As many rows as fill a bucket: what is left over has passes of its own, and none is padding.
        most = smaller(min(max(1, prefill_tokens // width // shards), max(map(len, waiting))))
        parts = [part[:most] for part in waiting]
        chosen = [s for part in parts for s in part]
        slots, size = slots_of(chosen, shards)
        tokens, targets = np.zeros((2, size, width), np.int32)
        places = np.zeros((2, size), np.int32)
        for i, s in zip(slots, chosen, strict=True):
            start, end = s.pages.stored, min(s.pages.stored + width, len(s.tokens) - 1)
            tokens[i, : end - start], targets[i, : end - start] = s.tokens[start:end], s.tokens[start + 1 : end + 1]
            places[:, i] = start, end - start
        pages = power(max(max(len(s.pages.full), len(s.pages.window)) for s in chosen), least_pages)
        arrays: Any = (tokens, *places)
        yield Pass(chosen, slots, Part(*arrays), targets, tables_of(chosen, slots, size, pages))


def page_pairs(parts: Sequence[Sequence[tuple[int, int]]], width: int) -> Int[np.ndarray, "R 2 X"]:
    """Pages to copy in each part; padding copies page 0 onto itself."""
    out = np.zeros((len(parts), 2, width), np.int32)
    for i, part in enumerate(parts):
        out[i, :, : len(part)] = np.asarray(part, np.int32).reshape(-1, 2).T
    return out
