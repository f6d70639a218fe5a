"""Processors that change or ban logits by a request's lists and by what the text already holds.

Each is exact for every row at once; rows that do not use it come out as they went in. `edit_logits` applies all of
them, each inside a `lax.cond`, so that what no row uses costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from jaxpost.generate.rows import RowParams

Logits = Float32[Array, "B V"]


class History(NamedTuple):
    """The text so far: prompt and answer, right-padded."""

    tokens: Int32[Array, "B S"]
    prompt_lengths: Int32[Array, " B"]
    lengths: Int32[Array, " B"]
    """Tokens of the prompt and of the answer so far."""


def edit_logits(logits: Logits, rows: RowParams, history: History, mask: UInt32[Array, "B Vw"] | None = None) -> Logits:
    """Every processor before the temperature, in vLLM's order; banned tokens get -inf.

    The order: allowed tokens and `mask`, bad words, n-grams, min_tokens, bias, then repetition, frequency and presence.

    Args:
      mask: [B ceil(V/32)] bits of the tokens that a grammar allows; None: all.
    """
    used = _uses(rows, history)
    steps: tuple[tuple[Array, Callable[[Logits], Logits]], ...] = (
        (used.allowed, lambda x: keep_bits(x, rows.allowed)),
        (used.bad_words, lambda x: ban_words(x, rows.bad_words, history)),
        (used.ngram, lambda x: ban_ngrams(x, rows.ngram, history)),
        (used.min_tokens, lambda x: _ban(x, jnp.where(too_short(rows, history)[:, None], rows.end_ids, -1))),
        (used.bias, lambda x: add_bias(x, rows.bias_ids, rows.bias)),
        (used.penalties, lambda x: penalise(x, rows.repetition, rows.presence, rows.frequency, history)),
    )
    if mask is not None:
        logits = keep_bits(logits, mask)
    for wanted, step in steps:
        logits = jax.lax.cond(wanted, step, lambda x: x, logits)
    return logits


def edits(rows: RowParams, history: History) -> Bool[Array, ""]:
    """Whether `edit_logits` would change anything for any row."""
    return jnp.any(jnp.stack(_uses(rows, history)))


class _Used(NamedTuple):
    allowed: Array
    bad_words: Array
    ngram: Array
    min_tokens: Array
    bias: Array
    penalties: Array


def _uses(rows: RowParams, history: History) -> _Used:
    return _Used(
        allowed=jnp.any(~rows.allowed != 0),
        bad_words=jnp.any(rows.bad_words >= 0),
        ngram=jnp.any(rows.ngram > 0),
        min_tokens=jnp.any(too_short(rows, history)),
        bias=jnp.any(rows.bias_ids >= 0),
        penalties=jnp.any((rows.repetition != 1) | (rows.presence != 0) | (rows.frequency != 0)),
    )


def too_short(rows: RowParams, history: History) -> Bool[Array, " B"]:
    """Rows that have fewer than `min_tokens` new tokens."""
    return history.lengths - history.prompt_lengths < rows.min_tokens


def keep_bits(logits: Logits, bits: UInt32[Array, "B Vw"]) -> Logits:
    """-inf where bit v % 32 of word v // 32 is 0."""
    places = jnp.arange(32, dtype=jnp.uint32)
    may = ((bits[:, :, None] >> places) & jnp.uint32(1)) != 0
    return jnp.where(may.reshape(bits.shape[0], -1)[:, : logits.shape[-1]], logits, -jnp.inf)


def add_bias(logits: Logits, ids: Int32[Array, "B N"], values: Float32[Array, "B N"]) -> Logits:
    """logit[id] += value; ids of -1 are padding."""
    return logits.at[_rows_of(ids), _outside(ids, logits)].add(values, mode="drop")


def ban_words(logits: Logits, words: Int32[Array, "B W L"], history: History) -> Logits:
    """Bans the last token of a word whose other tokens the answer (not the prompt) ends with, as vLLM does."""
    length = jnp.sum(words >= 0, axis=-1)
    place = jnp.arange(words.shape[-1])
    before = length[..., None] - 1
    at = history.lengths[:, None, None] - before + place
    there = jnp.take_along_axis(history.tokens[:, None], jnp.clip(at, 0, history.tokens.shape[1] - 1), axis=-1)
    same = jnp.all((place >= before) | ((there == words) & (at >= history.prompt_lengths[:, None, None])), axis=-1)
    last = jnp.take_along_axis(words, jnp.maximum(before, 0), axis=-1)[..., 0]
    return _ban(logits, jnp.where(same, last, -1))


def ban_ngrams(logits: Logits, size: Int32[Array, " B"], history: History) -> Logits:
    """Bans every token that would complete a run of `size` tokens that the text already holds; 0 is off.

    Position e ends such a run when tokens[e - j] = tokens[length - j] for j = 1 .. size - 1.
    """
    tokens, length = history.tokens, history.lengths
    end = jnp.arange(tokens.shape[1])

    def compare(j: Array, match: Array) -> Array:
        recent = jnp.take_along_axis(tokens, jnp.maximum(length - j, 0)[:, None], axis=1)
        return match & ((jnp.roll(tokens, j, axis=1) == recent) | (j >= size)[:, None])

    start = (end >= size[:, None] - 1) & (end < length[:, None]) & (size > 0)[:, None]
    # A run longer than the room for texts matches nowhere, and a loop over it would not end in any useful time.
    match = jax.lax.fori_loop(1, jnp.minimum(jnp.max(size), tokens.shape[1]), compare, start)
    return _ban(logits, jnp.where(match, tokens, -1))


def penalise(
    logits: Logits,
    repetition: Float32[Array, " B"],
    presence: Float32[Array, " B"],
    frequency: Float32[Array, " B"],
    history: History,
) -> Logits:
    """Repetition over prompt and answer (arXiv:1909.05858), then frequency and presence over the answer.

    x -> x / r if x > 0 else x r, where the token is in the text; then x - f count - p [count > 0] with its count in
    the answer.
    """
    slot = jnp.arange(history.tokens.shape[1])
    inside = slot < history.lengths[:, None]
    answered = inside & (slot >= history.prompt_lengths[:, None])
    row = _rows_of(history.tokens)
    text = _outside(jnp.where(inside, history.tokens, -1), logits)
    answer = _outside(jnp.where(answered, history.tokens, -1), logits)
    seen = jnp.zeros(logits.shape, bool).at[row, text].set(True, mode="drop")
    count = jnp.zeros(logits.shape, jnp.float32).at[row, answer].add(1.0, mode="drop")
    repeated = jnp.where(logits > 0, logits / repetition[:, None], logits * repetition[:, None])
    logits = jnp.where(seen, repeated, logits)
    return logits - frequency[:, None] * count - jnp.where(count > 0, presence[:, None], 0.0)


def _ban(logits: Logits, ids: Int32[Array, "B N"]) -> Logits:
    return logits.at[_rows_of(ids), _outside(ids, logits)].set(-jnp.inf, mode="drop")


def _rows_of(ids: Array) -> Array:
    return jnp.arange(ids.shape[0])[:, None]


def _outside(ids: Array, logits: Array) -> Array:
    """Padding as an index past the end, which scatters drop (-1 would be the last token)."""
    return jnp.where(ids < 0, logits.shape[-1], ids)
