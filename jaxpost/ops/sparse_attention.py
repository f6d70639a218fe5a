"""Attention that visits only the pairs of a chunk of queries and a chunk of keys in which something is visible.

For rows in which most tokens may not see each other, such as the answers behind one copy of their prompt. Which pairs
those are is known only when the program runs: for every chunk of queries a list of chunks of keys, and a loop of that
length. The softmax goes along with the loop (running maximum and total, 1805.02867), the backward pass recomputes
the scores from queries, keys and normaliser (2205.14135) over the same lists.

Letters: B rows, T tokens, C tokens of a chunk, J = T / C chunks, K key/value heads, G query heads of each, H head
width, R = G C. Scores stand keys first, [B K C R]: each product then finds its factors as they lie.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jaxpost.ops import platform
from jaxpost.ops.masks import MASKED, Rules, batched_product, visible


class Chunks(NamedTuple):
    """Where the tokens of every chunk stand, each [J B C]; segment 0 is padding."""

    positions: Int[Array, "J B C"]
    segments: Int[Array, "J B C"]
    prefixes: Int[Array, "J B C"]
    """A segment earlier in the row that a token's own continues, 0 for none."""


class _Visits(NamedTuple):
    """What a chunk of queries reads: chunks of keys order[j, :count[j]]."""

    order: Int[Array, "J J"]
    count: Int[Array, " J"]


def active_pairs(at: Chunks, *, window: int | None = None) -> Bool[Array, "J J"]:
    """Pairs of a chunk of queries and one of keys in which, in any row, some query may see some key.

    By the range of segments, prefixes and positions in each chunk, J^2 B work: every pair with a visible key is
    among them, and where ids grow along a row as packing leaves them, few others.

    Example:
        >>> p, s = jnp.asarray([[[0, 1]], [[0, 1]], [[2, 3]]]), jnp.asarray([[[1, 1]], [[2, 2]], [[2, 2]]])
        >>> active_pairs(Chunks(p, s, jnp.zeros_like(s))).astype(int).tolist()
        [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    """
    most = jnp.iinfo(jnp.int32).max

    def span(x: Array, on: Array) -> tuple[Array, Array]:
        return jnp.min(jnp.where(on, x, most), axis=-1), jnp.max(jnp.where(on, x, -1), axis=-1)

    real = at.segments != 0
    low, high = span(at.segments, real)
    first, last = span(at.positions, real)

    def meets(x: Array) -> Array:
        lowest, highest = span(x, real & (x != 0))
        return (lowest[:, None] <= high) & (low <= highest[:, None])

    # Padding alone spans from the largest number to -1: it meets nothing.
    on = (meets(at.segments) | meets(at.prefixes)) & (last[:, None] >= first)
    if window is not None:
        on &= first[:, None] - last < window
    return jnp.any(on, axis=-1) & jnp.tril(jnp.ones(on.shape[:2], bool))


def sparse_attention(
    rules: Rules,
    size: int,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    prefixes: Int[Array, "B T"],
) -> Float[Array, "B T N H"]:
    """`ops.attention.attention` of a row to itself, in chunks of `size` tokens, those that see nothing left out."""
    batch, length, heads, width = q.shape
    kv_heads, count = k.shape[2], -(-length // size)

    def chunked(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, count * size - length)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, count, size, *x.shape[2:]), 1, 0)

    # Padding has segment 0: it sees nothing and nothing sees it.
    at = Chunks(*(chunked(x) for x in (positions, segments, prefixes)))
    active = active_pairs(at, window=rules.window)
    order = jnp.argsort(~active, axis=1, stable=True).astype(jnp.int32)
    visits = _Visits(order, jnp.sum(active, axis=1, dtype=jnp.int32))
    rows = chunked(q).reshape(count, batch, size, kv_heads, heads // kv_heads, width).transpose(0, 1, 3, 4, 2, 5)
    out = _attend(rules, rows, chunked(k).swapaxes(2, 3), chunked(v).swapaxes(2, 3), at, visits)
    out = out.transpose(1, 0, 4, 2, 3, 5).reshape(batch, count * size, heads, width)
    return out[:, :length]


def _pick(x: Array, i: Array) -> Array:
    return lax.dynamic_index_in_dim(x, i, 0, keepdims=False)


_product = partial(batched_product, contract=(3, 2))


def _scores(
    rules: Rules, k: Float[Array, "B K C H"], q: Float[Array, "B K H R"], mask: Bool[Array, "B C R"]
) -> tuple[Float[Array, "B K C R"], Float[Array, "B K C R"] | None]:
    """Masked scores, and tanh of the raw ones over the soft cap."""
    scores, bent = _product(k.astype(q.dtype), q) * rules.scale, None
    if rules.softcap is not None:
        bent = jnp.tanh(scores / rules.softcap)
        scores = rules.softcap * bent
    return jnp.where(mask[:, None], scores, MASKED), bent


def _masks(rules: Rules, at: Chunks, groups: int, i: Array) -> Callable[[Array], Array]:
    """j -> which keys of chunk j each query of chunk i sees, [B C R].

    A query's place is repeated for its G heads: a mask that has to be spread over them later is not computed with
    vector instructions on a CPU.
    """
    q_positions, q_segments, q_prefixes = (jnp.tile(_pick(x, i), (1, groups)) for x in at)

    def mask(j: Array) -> Bool[Array, "B C R"]:
        keys = _pick(at.positions, j), _pick(at.segments, j)
        places = q_positions, keys[0], q_segments, keys[1], q_prefixes
        return visible(*places, window=rules.window).swapaxes(1, 2)

    return mask


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    rules: Rules,
    q: Float[Array, "J B K G C H"],
    k: Float[Array, "J B K C H"],
    v: Float[Array, "J B K C H"],
    at: Chunks,
    visits: _Visits,
) -> Float[Array, "J B K G C H"]:
    return _forward(rules, q, k, v, at, visits)[0]


def _forward(rules: Rules, q: Array, k: Array, v: Array, at: Chunks, visits: _Visits) -> tuple[Array, tuple]:
    chunks, batch, kv_heads, groups, size, width = q.shape
    rows = groups * size
    columns, v_columns = q.reshape(chunks, batch, kv_heads, rows, width).swapaxes(3, 4), v.swapaxes(3, 4)

    def one(i: Array) -> tuple[Array, Array]:
        here, mask = _pick(columns, i), _masks(rules, at, groups, i)

        def visit(n: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, out = state
            j = visits.order[i, n]
            scores = _scores(rules, _pick(k, j), here, mask(j))[0]
            new = jnp.maximum(top, jnp.max(scores, axis=2, keepdims=True))
            weights, kept = jnp.exp(scores - new), jnp.exp(top - new)
            total = total * kept + jnp.sum(weights, axis=2, keepdims=True)
            return new, total, out * kept + _product(_pick(v_columns, j), weights.astype(v.dtype))

        zeros = lambda n: jnp.zeros((batch, kv_heads, n, rows), jnp.float32)  # noqa: E731
        top, total, out = lax.fori_loop(0, visits.count[i], visit, (zeros(1) + MASKED, zeros(1), zeros(width)))
        # Where nothing is seen, 0 makes every exp(score - normaliser) of the backward pass 0 as well.
        sees = top > MASKED / 2
        total = jnp.where(sees, total, 1.0)
        out = jnp.where(sees, out / total, 0.0).astype(q.dtype)
        return out.swapaxes(2, 3), jnp.where(sees, top + jnp.log(total), 0.0)

    out, normaliser = lax.map(one, jnp.arange(chunks))
    out = checkpoint_name(out.reshape(q.shape), platform.ATTENTION_RESIDUALS)
    normaliser = checkpoint_name(normaliser, platform.ATTENTION_RESIDUALS)
    return out, (q, k, v, at, visits, out, normaliser)


def _backward(rules: Rules, residuals: tuple, d_out: Array) -> tuple:
    q, k, v, at, visits, out, normaliser = residuals
    chunks, batch, kv_heads, groups, size, width = q.shape
    rows, out, d_out = (x.reshape(chunks, batch, kv_heads, groups * size, width) for x in (q, out, d_out))
    overlap = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)[:, :, :, None]
    columns, d_columns, k_columns = rows.swapaxes(3, 4), d_out.swapaxes(3, 4), k.swapaxes(3, 4).astype(q.dtype)

    def one(grads: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], Array]:
        mask = _masks(rules, at, groups, i)
        here, d_here, norm, both = (_pick(x, i) for x in (columns, d_columns, normaliser, overlap))
        here_rows, d_rows = _pick(rows, i), _pick(d_out, i)

        def visit(n: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            d_k, d_v, d_q = state
            j = visits.order[i, n]
            scores, bent = _scores(rules, _pick(k, j), here, mask(j))
            weights = jnp.exp(scores - norm)
            d_scores = weights * (_product(_pick(v, j).astype(d_out.dtype), d_here) - both) * rules.scale
            if bent is not None:
                d_scores = d_scores * (1 - jnp.square(bent))
            d_scores = d_scores.astype(q.dtype)
            add = lambda x, y: lax.dynamic_update_index_in_dim(x, _pick(x, j) + y, j, 0)  # noqa: E731
            d_k = add(d_k, _product(d_scores, here_rows))
            d_v = add(d_v, _product(weights.astype(d_out.dtype), d_rows))
            return d_k, d_v, d_q + _product(_pick(k_columns, j), d_scores)

        start = jnp.zeros((batch, kv_heads, width, groups * size), jnp.float32)
        d_k, d_v, d_q = lax.fori_loop(0, visits.count[i], visit, (*grads, start))
        return (d_k, d_v), d_q.swapaxes(2, 3).astype(q.dtype)

    zeros = jnp.zeros(k.shape, jnp.float32)
    (d_k, d_v), d_q = lax.scan(one, (zeros, zeros), jnp.arange(chunks))
    return d_q.reshape(q.shape), d_k.astype(k.dtype), d_v.astype(v.dtype), None, None


_attend.defvjp(_forward, _backward)
