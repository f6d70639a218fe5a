"""Top-k, top-p and min-p without sorting: where each row's order of tokens is cut.

All three keep a beginning of one order, logits downwards and ids upwards among equals, so all that they decide is a
threshold and the last id kept at it. Thresholds are found by bisection, mostly among the few blocks of the vocabulary
with the largest maxima.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

LANES = 128
"""Tokens of a block."""
_CANDIDATES = 64
"""Blocks that are looked at first."""
_HALVINGS = 14
"""Steps that halve the interval of values before the steps that halve that of bit patterns, which always end."""

Logits = Float32[Array, "B V"]
Row = Float32[Array, " B"]


class Cut(NamedTuple):
    """Keeps x[v] > threshold, and x[v] = threshold where v <= last."""

    threshold: Float32[Array, " B"]
    last: Int32[Array, " B"]

    def keeps(self, x: Float32[Array, "B N"], ids: Int32[Array, "#B N"]) -> Bool[Array, "B N"]:
        """Which tokens are on the kept side; `x` are the logits of the tokens `ids`."""
        level = self.threshold[:, None]
        return (x > level) | ((x == level) & (ids <= self.last[:, None]))

    def apply(self, x: Float32[Array, "B N"], ids: Int32[Array, "#B N"] | None = None) -> Float32[Array, "B N"]:
        """-inf on the other side; without `ids`, x holds the whole vocabulary."""
        return jnp.where(self.keeps(x, token_ids(x) if ids is None else ids), x, -jnp.inf)


class Limits(NamedTuple):
    """What cuts a row: k tokens (the size of the vocabulary or more is off), mass p (1 is off), min_p (0 is off)."""

    k: Int32[Array, " B"]
    p: Float32[Array, " B"]
    min_p: Float32[Array, " B"]


def find_cut(x: Logits, top: Row, heat: Row, limits: Limits) -> Cut:
    """Where min-p, then top-k, then top-p cut each row of weights exp((x - top) / heat).

    min-p keeps weights >= min_p; top-k exactly k of the rest, of equals the lowest ids; top-p the fewest of those,
    largest first, whose sum is at least p of theirs.

    Args:
      top: [B] each row's largest logit.
      heat: [B] temperature, above 0.
    """
    # log(min_p) needs no pass over the vocabulary.
    least = jnp.where(limits.min_p > 0, top + heat * jnp.log(jnp.where(limits.min_p > 0, limits.min_p, 1.0)), -jnp.inf)
    cut = Cut(least, jnp.full(least.shape, x.shape[-1], jnp.int32))
    wanted = jnp.any((limits.k < x.shape[-1]) | (limits.p < 1))
    return jax.lax.cond(wanted, partial(_by_rank_and_mass, x, top, heat, limits), lambda cut: cut, cut)


def _by_rank_and_mass(x: Logits, top: Row, heat: Row, limits: Limits, cut: Cut) -> Cut:
    by_k, by_p = limits.k < x.shape[-1], limits.p < 1
    count = limits.k.astype(jnp.float32)
    x = cut.apply(x)
    weigh = lambda x: jnp.exp((x - top[:, None]) / heat[:, None])  # noqa: E731
    mass = jax.lax.cond(jnp.any(by_p & ~by_k), lambda: total(weigh(x)), lambda: jnp.ones_like(top))

    def within(values: Array, ids: Array) -> Cut:
        """The cut among some tokens, of which the others are known to lie beyond it: by k, then by p."""

        def stage(number: Array, cut: Cut) -> Cut:
            first, kept = number == 0, cut.apply(values, ids)
            weights = jnp.where(first, (kept > -jnp.inf).astype(jnp.float32), weigh(kept))
            whole = total(weights)
            need = jnp.where(first, jnp.minimum(count, whole), limits.p * jnp.where(by_k, whole, mass))
            used = jnp.where(first, by_k, by_p)
            return _where(used, threshold(kept, ids, top, weights, jnp.where(used, need, jnp.inf)), cut)

        return jax.lax.fori_loop(jnp.where(jnp.any(by_k), 0, 1), jnp.where(jnp.any(by_p), 2, 1), stage, cut)

    if x.shape[-1] <= 2 * _CANDIDATES * LANES:
        return within(x, token_ids(x))
    values, ids, floor = _candidates(x, top)
    over = values > floor[:, None]
    enough_k = total(over.astype(jnp.float32)) >= count
    enough_p = total(jnp.where(over, weigh(values), 0.0)) >= limits.p * mass
    known = (floor == -jnp.inf) | jnp.where(by_k, enough_k, ~by_p | enough_p)
    return jax.lax.cond(jnp.all(known), lambda: within(values, ids), lambda: within(x, token_ids(x)))


def _candidates(x: Logits, top: Row) -> tuple[Array, Array, Row]:
    """Logits and ids of the blocks with the largest maxima, ids ascending, and what no other logit exceeds."""
    maxima = jnp.max(blocks(x, -jnp.inf), axis=-1)
    numbers = token_ids(maxima)
    finite = (maxima > -jnp.inf).astype(jnp.float32)
    count = total(finite)
    floor = _value(_bisect(maxima, top, finite, jnp.minimum(float(_CANDIDATES), count)).low)
    kept = maxima >= floor[:, None]
    # Of blocks that meet at the floor those of higher ids find no slot.
    slot = jnp.where(kept, jnp.cumsum(kept, axis=-1, dtype=jnp.int32) - 1, _CANDIDATES)
    empty = jnp.full((x.shape[0], _CANDIDATES), maxima.shape[-1], jnp.int32)
    row = jnp.arange(x.shape[0])[:, None]
    chosen = empty.at[row, slot].set(jnp.broadcast_to(numbers, kept.shape), mode="drop")
    ids = (chosen[:, :, None] * LANES + jnp.arange(LANES, dtype=jnp.int32)).reshape(x.shape[0], -1)
    values = jnp.take_along_axis(x, jnp.minimum(ids, x.shape[-1] - 1), axis=-1)
    return jnp.where(ids < x.shape[-1], values, -jnp.inf), ids, jnp.where(count > _CANDIDATES, floor, -jnp.inf)


class _Bracket(NamedTuple):
    """The threshold lies from key `low` (the mass from it upwards is enough) to below `high` (it is not)."""

    step: Array
    low: Array
    high: Array
    mass: Array
    """From `low` upwards."""
    count: Array
    """Tokens from `low` upwards."""
    above: Array
    """Tokens from `high` upwards."""


def threshold(
    x: Float32[Array, "B N"], ids: Int32[Array, "#B N"], top: Row, weights: Float32[Array, "B N"], need: Row
) -> Cut:
    """The shortest beginning of the order that holds at least `need` > 0 of the weights (all, if they are less)."""
    found = _bisect(x, top, weights, need)
    level = _value(found.low)
    several = (found.mass > need) & (found.count - found.above > 1)
    keep_all = jnp.full(level.shape, jnp.iinfo(jnp.int32).max, jnp.int32)

    def lowest_ids() -> Array:
        """At the threshold only as many as `need` asks for."""
        equal = x == level[:, None]
        each = jnp.max(jnp.where(equal, weights, 0.0), axis=-1)
        short = need - total(jnp.where(x > level[:, None], weights, 0.0))
        wanted = jnp.maximum(jnp.ceil(short / jnp.where(each > 0, each, 1.0)), 1.0)
        rank = jnp.cumsum(equal, axis=-1, dtype=jnp.int32).astype(jnp.float32)
        at = jnp.where(equal & (rank == wanted[:, None]), ids, keep_all[:, None])
        return jnp.where(several & (each > 0), jnp.min(at, axis=-1), keep_all)

    return Cut(level, jax.lax.cond(jnp.any(several), lowest_ids, lambda: keep_all))


def _bisect(x: Float32[Array, "B N"], top: Row, weights: Float32[Array, "B N"], need: Row) -> _Bracket:
    """Bisection on float32 values, then on their bit patterns read as integers of the same order.

    It ends when one token or one value is left between the ends, so it is exact: `low` is the threshold. Sums have one
    fixed tree, so a larger set never has a smaller sum.
    """
    lowest = jnp.min(jnp.where(x > -jnp.inf, x, top[:, None]), axis=-1)

    def measure(key: Array) -> tuple[Array, Array]:
        over = x >= _value(key)[:, None]
        return total(jnp.where(over, weights, 0.0)), total(over.astype(jnp.float32))

    def settled(b: _Bracket) -> Array:
        return (b.mass <= need) | (b.count - b.above <= 1) | (b.high - 1 <= b.low)

    def halve(b: _Bracket) -> _Bracket:
        by_value = _key(_value(b.low) / 2 + _value(b.high) / 2)
        by_bits = (b.low >> 1) + (b.high >> 1) + (b.low & b.high & 1)
        middle = jnp.where(b.step < _HALVINGS, jnp.clip(by_value, b.low + 1, b.high - 1), by_bits)
        middle = jnp.where(settled(b), b.low, middle)
        mass, count = measure(middle)
        enough = mass >= need
        return _Bracket(
            b.step + 1,
            jnp.where(enough, middle, b.low),
            jnp.where(enough, b.high, middle),
            jnp.where(enough, mass, b.mass),
            jnp.where(enough, count, b.count),
            jnp.where(enough, b.above, count),
        )

    low = _key(lowest)
    mass, count = measure(low)
    everything = _Bracket(jnp.int32(0), low, _key(top) + 1, mass, count, jnp.zeros_like(count))
    return jax.lax.while_loop(lambda b: ~jnp.all(settled(b)), halve, everything)


def _where(rows: Array, new: Cut, old: Cut) -> Cut:
    return jax.tree.map(partial(jnp.where, rows), new, old)


def _key(value: Row) -> Array:
    """float32 -> int32 of the same order."""
    bits = jax.lax.bitcast_convert_type(value, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _value(key: Array) -> Row:
    return jax.lax.bitcast_convert_type(jnp.where(key < 0, key ^ 0x7FFFFFFF, key), jnp.float32)


def token_ids(x: Float32[Array, "B N"]) -> Int32[Array, "1 N"]:
    """0 .. N - 1."""
    return jnp.arange(x.shape[-1], dtype=jnp.int32)[None]


def blocks(x: Float32[Array, "B N"], fill: float) -> Float32[Array, "B M C"]:
    """Runs of LANES tokens, the last one filled up."""
    short = -x.shape[-1] % LANES
    full = jnp.pad(x, ((0, 0), (0, short)), constant_values=fill) if short else x
    return full.reshape(x.shape[0], -1, LANES)


def total(x: Float32[Array, "B N"]) -> Row:
    """Sums of blocks, summed: float32 error far below one running sum's."""
    return jnp.sum(jnp.sum(blocks(x, 0.0), axis=-1), axis=-1)
