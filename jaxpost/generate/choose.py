"""One token a row from logits: a pure function of logits, parameters, history and one uniform number a row.

Nothing sorts the vocabulary and nothing draws noise for all of it: top-k, top-p and min-p are a cut found by bisection
(`cuts.py`), and the token comes from inverting the cumulative distribution, block by block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from jaxpost.generate.cuts import LANES, Cut, Limits, Logits, Row, blocks, find_cut, token_ids, total
from jaxpost.generate.params import LOGPROBS_MODES
from jaxpost.generate.penalties import History, edit_logits, edits
from jaxpost.generate.rows import RowParams

_RAW, _PROCESSED = LOGPROBS_MODES.index("raw"), LOGPROBS_MODES.index("processed")


class Choice(NamedTuple):
    """One token a row."""

    token: Int32[Array, " B"]
    logprob: Float32[Array, " B"]
    """Of the token, under the distribution that the row's `logprobs_mode` names."""
    stuck: Bool[Array, " B"]
    """No token may be drawn (all are banned), or the logits hold a NaN or +inf: token and log-probability are 0."""


def choose(
    logits: Logits,
    rows: RowParams,
    history: History,
    uniform: Row,
    mask: UInt32[Array, "B Vw"] | None = None,
) -> Choice:
    """Draws one token a row: argmax where the temperature is 0 (the lowest id of equals), else by inverse CDF.

    The order is vLLM's: `edit_logits`, temperature, min-p, top-k, top-p. Top-k keeps exactly k tokens, of equal logits
    the lowest ids; top-p keeps the smallest set of most probable tokens whose sum is >= p. With weights w = exp(x / T)
    of the kept tokens the token drawn is the first, by id, at which the sum of w exceeds u times the whole sum: it
    always has w > 0. The same logits, parameters, history and number give the same token in any batch.

    Args:
      logits: [B V] float32; -inf bans a token.
      rows: parameters of each row; all traced.
      history: the text so far; penalties, n-grams, bad words and min_tokens read it.
      uniform: [B] in [0, 1), from `noise.uniforms`.
      mask: [B ceil(V/32)] bits of the tokens that a grammar allows; None where no row has one.

    Example:
      >>> from jaxpost.generate.params import SamplingParams
      >>> from jaxpost.generate.rows import pack
      >>> rows = pack([SamplingParams(temperature=0)], vocab_size=3, eos_ids=[])
      >>> history = History(jnp.zeros((1, 4), jnp.int32), jnp.ones(1, jnp.int32), jnp.ones(1, jnp.int32))
      >>> int(choose(jnp.array([[0.0, 5.0, 1.0]]), rows, history, jnp.zeros(1)).token[0])
      1
    """
    rows = jax.tree.map(jnp.asarray, rows)
    edited = edits(rows, history) if mask is None else jnp.asarray(True)
    limited = (rows.temperature > 0) & ((rows.top_k > 0) | (rows.top_p < 1) | (rows.min_p > 0))
    draw = partial(_draw, logits=logits, rows=rows, uniform=uniform)

    def processed() -> Choice:
        x = jax.lax.cond(edited, lambda: edit_logits(logits, rows, history, mask), lambda: logits)
        return draw(x, altered=edited | limited, cut=True)

    if mask is not None:
        return processed()
    return jax.lax.cond(
        edited | jnp.any(limited), processed, lambda: draw(logits, altered=jnp.zeros_like(limited), cut=False)
    )


def log_probabilities(
    logits: Logits,
    rows: RowParams,
    history: History,
    mask: UInt32[Array, "B Vw"] | None = None,
) -> Logits:
    """log p of every token under the distribution that each row's `logprobs_mode` names; the same as `choose` tells.

    Banned and cut tokens have -inf in the mode "processed"; all do where nothing is left.
    """
    rows = jax.tree.map(jnp.asarray, rows)
    processed = rows.logprobs_mode == _PROCESSED

    def process() -> Logits:
        x = edit_logits(logits, rows, history, mask)
        return jnp.where(processed[:, None], _cut(x, jnp.max(x, axis=-1), rows).apply(x), logits)

    x = jax.lax.cond(jnp.any(processed), process, lambda: logits)
    top = jnp.max(x, axis=-1, keepdims=True)
    heat = jnp.where(rows.logprobs_mode == _RAW, 1.0, _heat(rows))[:, None]
    scaled = (x - jnp.where(top == -jnp.inf, 0.0, top)) / heat
    mass = total(jnp.exp(scaled))[:, None]
    return scaled - jnp.log(jnp.where(mass == 0, 1.0, mass))


def top_logprobs(logprobs: Logits, n: int) -> tuple[Float32[Array, "B N"], Int32[Array, "B N"]]:
    """The n largest of each row, largest first, and their ids; n is static.

    Example:
      >>> values, ids = top_logprobs(jnp.array([[-3.0, -0.1, -2.0]]), 2)
      >>> ids.tolist()
      [[1, 2]]
    """
    values, ids = jax.lax.top_k(logprobs, min(n, logprobs.shape[-1]))
    return values, ids.astype(jnp.int32)


def _draw(x: Logits, *, logits: Logits, rows: RowParams, uniform: Row, altered: Array, cut: bool) -> Choice:
    """From edited logits `x`; `logits` are the model's; `altered` rows draw from another distribution than theirs."""
    best_logit, best = _best(x)
    heat = _heat(rows)
    top = jnp.where(jnp.isfinite(best_logit), best_logit, 0.0)
    token, mass = _invert(x, top, heat, uniform, _cut(x, top, rows) if cut else None)
    # A NaN shows in the sum: a maximum may pass over it.
    stuck = ~jnp.isfinite(best_logit) | ~jnp.isfinite(mass)
    token = jnp.where(stuck, 0, jnp.where(rows.temperature == 0, best, token))
    processed = (_pick(x, token) - top) / heat - jnp.log(mass)
    logprob = _in_mode(processed, token, logits=logits, rows=rows, altered=altered)
    return Choice(token, jnp.where(stuck, 0.0, logprob), stuck)


def _in_mode(processed: Row, token: Array, *, logits: Logits, rows: RowParams, altered: Array) -> Row:
    """The log-probability by name; another distribution's normaliser is computed only if some row needs it."""
    heat, mode = _heat(rows), rows.logprobs_mode
    wants_other = (mode != _PROCESSED) & (altered | ((mode == _RAW) & (heat != 1)))

    def under(divide: Row) -> Callable[[], Row]:
        def logprob() -> Row:
            top = jnp.max(logits, axis=-1)
            normaliser = total(jnp.exp((logits - top[:, None]) / divide[:, None]))
            return (_pick(logits, token) - top) / divide - jnp.log(normaliser)

        return logprob

    other = jax.lax.cond(
        jnp.any(wants_other),
        under(jnp.where(mode == _RAW, jnp.ones_like(heat), heat)),
        lambda: processed,
    )
    return jnp.where(mode == _PROCESSED, processed, other)


def _heat(rows: RowParams) -> Row:
    """T, and 1 for greedy rows."""
    return jnp.where(rows.temperature == 0, 1.0, rows.temperature)


def _cut(x: Logits, top: Row, rows: RowParams) -> Cut:
    """Greedy rows keep all."""
    greedy = rows.temperature == 0
    limits = Limits(
        k=jnp.where(greedy | (rows.top_k <= 0), x.shape[-1], rows.top_k),
        p=jnp.where(greedy, 1.0, rows.top_p),
        min_p=jnp.where(greedy, 0.0, rows.min_p),
    )
    return find_cut(x, top, _heat(rows), limits)


def _invert(x: Logits, top: Row, heat: Row, uniform: Row, cut: Cut | None) -> tuple[Array, Row]:
    """The token at which the running sum of weights exceeds u * total, and the total.

    Sums of blocks, then of the tokens of one block: the float32 error stays near 1e-7 of the total. The weights are
    never written down: one block's are computed again.
    """

    def weigh(x: Array, ids: Array) -> Array:
        weights = jnp.exp((x - top[:, None]) / heat[:, None])
        return weights if cut is None else jnp.where(cut.keeps(x, ids) | jnp.isnan(x), weights, 0.0)

    sums = jnp.sum(blocks(weigh(x, token_ids(x)), 0.0), axis=-1)
    running = jnp.cumsum(sums, axis=-1)
    target = uniform * running[:, -1]
    block, before = _crossing(sums, running, target)
    near, there = _block(x, block)
    inside = jnp.where(near < x.shape[-1], weigh(there, near), 0.0)
    place, _ = _crossing(inside, jnp.cumsum(inside, axis=-1), target - before)
    return block * LANES + place, running[:, -1]


def _crossing(parts: Array, running: Array, target: Row) -> tuple[Array, Row]:
    """First place of nonzero part whose running sum exceeds the target (else the last nonzero), and the sum before."""
    width = parts.shape[-1]
    first = _first((running > target[:, None]) & (parts > 0))
    last = width - 1 - _first(jnp.flip(parts > 0, axis=-1))
    place = jnp.clip(jnp.where(first < width, first, last), 0, width - 1)
    return place, jnp.where(place > 0, _pick(running, jnp.maximum(place - 1, 0)), 0.0)


def _first(hits: Bool[Array, "B N"]) -> Int32[Array, " B"]:
    """Lowest index of a hit, N without one (a minimum, which a CPU computes ten times faster than an argmax)."""
    width = hits.shape[-1]
    return jnp.min(jnp.where(hits, jnp.arange(width, dtype=jnp.int32), width), axis=-1)


def _pick(values: Float32[Array, "B N"], at: Int32[Array, " B"]) -> Row:
    return jnp.take_along_axis(values, at[:, None], axis=-1)[:, 0]


def _best(x: Logits) -> tuple[Row, Array]:
    """The largest logit and its lowest id, by the blocks' maxima: one pass, where a CPU's argmax takes ten times it."""
    maxima = jnp.max(blocks(x, -jnp.inf), axis=-1)
    top = jnp.max(maxima, axis=-1)
    block = jnp.minimum(_first(maxima == top[:, None]), maxima.shape[-1] - 1)
    near, there = _block(x, block)
    return top, block * LANES + _first((there == top[:, None]) & (near < x.shape[-1]))


def _block(x: Logits, block: Int32[Array, " B"]) -> tuple[Int32[Array, "B C"], Float32[Array, "B C"]]:
    """Ids and logits of one block a row; ids may lie past the vocabulary."""
    near = block[:, None] * LANES + jnp.arange(LANES, dtype=jnp.int32)
    return near, jnp.take_along_axis(x, jnp.minimum(near, x.shape[-1] - 1), axis=-1)
