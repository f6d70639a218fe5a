"""What a head says of texts that an engine holds: only tokens that were not read before are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import numpy as np
from jaxtyping import Array

from jaxpost.generate import programs
from jaxpost.generate.engine import Engine, Weights
from jaxpost.generate.layout import Text, passes, power
from jaxpost.types import Params

Read = Callable[[Params, Array], Array]
"""read(head's parameters, hidden [.. D]) -> outputs [.. K]."""
AFTER = 0
"""Stands last in a text, in place of the token that comes next: an engine does not read a text's last token."""


def open_text(engine: Engine, text: Text | None, same: int) -> Text:
    """A text to be measured: empty, or a fork that keeps the first `same` tokens of one that was.

    Raises:
        ValueError: a sliding window has passed the place where the texts part.
    """
    if text is None:
        [made] = engine._texts([[AFTER]])
        return made
    made = engine.fork(text)
    try:
        engine.retract(made, len(made.tokens) - 1 - same)
    except ValueError:
        engine.release([made])
        raise
    return made


def measure(
    engine: Engine,
    weights: Weights,
    texts: Sequence[Text],
    tokens: Sequence[Sequence[int]],
    places: Sequence[Sequence[int]],
    *,
    head: Params,
    read: Read,
) -> list[np.ndarray]:
    """Adds tokens to texts of `open_text`; a head's outputs after some of them, float32 [places, K] a text.

    Args:
        places: indices in the whole text, among the new tokens, ascending.

    Raises:
        OutOfPages: they do not fit; nothing has changed.
    """
    engine._reserve(texts, [len(new) for new in tokens])
    for text, new in zip(texts, tokens, strict=True):
        text.tokens[-1:] = [*new, AFTER]
    number = {id(text): i for i, text in enumerate(texts)}
    found: list[list[np.ndarray]] = [[] for _ in texts]
    for part in passes(texts, engine.shards, engine.prefill_tokens, least_pages=engine.least_pages):
        numbers = [number[id(text)] for text in part.sequences]
        starts = [text.pages.stored for text in part.sequences]
        inside = [
            [p - start for p in places[i] if start <= p < start + part.counts[slot]]
            for i, start, slot in zip(numbers, starts, part.slots, strict=True)
        ]
        at = np.zeros((len(part.targets), power(max(map(len, inside)))), np.int32)
        for slot, row in zip(part.slots, inside, strict=True):
            at[slot, : len(row)] = row
        run = engine._program("measure", partial(programs.measure, engine.model), read=read, fresh=part.fresh)
        tables, tokens_of, at = engine._arrays((part.tables, part.part, at))
        engine.pools, outputs = run(weights.stacked, engine.pools, tables, tokens_of, at, head)
        engine._advance(part)
        outputs = np.asarray(jax.device_get(outputs), np.float32)
        for i, slot, row in zip(numbers, part.slots, inside, strict=True):
            found[i].append(outputs[slot, : len(row)])
    return [np.concatenate(rows) if rows else np.zeros((0, 0), np.float32) for rows in found]
