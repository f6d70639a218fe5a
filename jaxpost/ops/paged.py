"""Attention over keys and values that lie in pages: a block of queries reads its rows' pages one after another.

Letters: L repeats of a stack, P pages, K key/value heads, C tokens of a page, H head width, B rows, T queries,
N query heads, G = N / K queries per group, M pages of the longest row.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxpost.ops import bits
from jaxpost.ops.attention import MASKED, batched_product


class Pages(NamedTuple):
    """One block's keys or values of all layers. int8 pages carry one float32 scale per token and head."""

    data: Shaped[Array, "L P K C H"]
    scale: Float[Array, "L P K C"] | None = None

    @property
    def size(self) -> int:
        """Tokens of a page."""
        return self.data.shape[3]


def empty_pages(
    layers: int, pages: int, kv_heads: int, size: int, width: int, dtype: jnp.dtype | type = jnp.float32
) -> Pages:
    """Room for `pages` pages of `size` tokens; `dtype` int8 stores rounded values with their scales.

    Example:
        >>> pages = empty_pages(2, 5, 1, 4, 8, jnp.int8)
        >>> pages.data.shape, pages.scale.shape
        ((2, 5, 1, 4, 8), (2, 5, 1, 4))
    """
    shape = (layers, pages, kv_heads, size, width)
    scale = jnp.zeros(shape[:-1], jnp.float32) if jnp.dtype(dtype) == jnp.int8 else None
    return Pages(jnp.zeros(shape, bits.stored_dtype(dtype)), scale)


def write_pages(
    pages: Pages,
    new: Float[Array, "B T K H"],
    *,
    layer: Int[Array, ""] | int,
    page: Int[Array, "B T"],
    slot: Int[Array, "B T"],
) -> Pages:
    """Puts each token's keys or values at its slot of its page of one layer.

    int8: x is stored as round(x / s) with s = max|x| / 127 over the head's width, so an error is at most s / 2.
    """
    if pages.scale is None:
        dtype = jnp.bfloat16 if pages.data.dtype == jnp.uint16 else pages.data.dtype
        return Pages(pages.data.at[layer, page, :, slot].set(bits.hide(new.astype(dtype))))
    wide = new.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1) / 127
    rounded = jnp.round(wide / jnp.where(scale == 0, 1.0, scale)[..., None]).astype(jnp.int8)
    return Pages(pages.data.at[layer, page, :, slot].set(rounded), pages.scale.at[layer, page, :, slot].set(scale))


def read_pages(pages: Pages, layer: Int[Array, ""] | int, page: Int[Array, " B"], dtype) -> Float[Array, "B K C H"]:
    """One page a row of one layer, in the dtype of computation."""
    data = bits.show(pages.data[layer, page])
    if pages.scale is None:
        return data.astype(dtype)
    return (data.astype(jnp.float32) * pages.scale[layer, page][..., None]).astype(dtype)


def copy_pages(pages: Pages, source: Int[Array, " X"], target: Int[Array, " X"]) -> Pages:
    """Copies whole pages of every layer: page `target[i]` becomes page `source[i]`."""
    data = pages.data.at[:, target].set(pages.data[:, source])
    return Pages(data, None if pages.scale is None else pages.scale.at[:, target].set(pages.scale[:, source]))


class _Softmax(NamedTuple):
    """Softmax over the keys seen so far: largest score, sum of exponentials, weighted sum of values."""

    top: Float[Array, "B K R 1"]
    total: Float[Array, "B K R 1"]
    out: Float[Array, "B K R H"]


def paged_attention(
    q: Float[Array, "B T N H"],
    keys: Pages,
    values: Pages,
    *,
    layer: Int[Array, ""] | int,
    table: Int[Array, "B M"],
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(scale q k^T) v over the pages of each row: token t of a row lies in slot t % C of page table[t // C].

    The softmax runs over pages with a running maximum (2205.14135), so no row is ever gathered whole, and a page
    that holds nothing visible changes no bit: a row's result does not depend on how long the others are.

    Args:
        q: queries after RoPE, at `positions`; every key up to them has been written.
        table: page of each C tokens of a row; entries that no query sees may hold any page's number.
        valid: padding queries see nothing and give zeros.
        scale, window, softcap: as `ops.attention.attention`.

    Example:
        >>> pages = empty_pages(1, 3, 1, 4, 2)
        >>> at = jnp.asarray([[2]])
        >>> pages = write_pages(pages, jnp.ones((1, 1, 1, 2)), layer=0, page=at, slot=jnp.asarray([[0]]))
        >>> paged_attention(jnp.ones((1, 1, 2, 2)), pages, pages, layer=0, table=at, scale=1.0,
        ...                 positions=jnp.asarray([[0]]), valid=jnp.asarray([[True]]))[0, 0].tolist()
        [[1.0, 1.0], [1.0, 1.0]]
    """
    batch, length, heads, width = q.shape
    kv_heads, size = keys.data.shape[2], keys.size
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, width).transpose(0, 2, 3, 1, 4)
    rows = grouped.reshape(batch, kv_heads, -1, width)

    def one_page(number: Array, state: _Softmax) -> _Softmax:
        page = lax.dynamic_index_in_dim(table, number, 1, keepdims=False)
        scores = batched_product(rows, read_pages(keys, layer, page, q.dtype), (3, 3)) * scale
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        seen = _seen(number * size + jnp.arange(size, dtype=jnp.int32), positions, valid, window)
        per_query = scores.reshape(batch, kv_heads, -1, length, size)
        scores = jnp.where(seen[:, None, None], per_query, MASKED).reshape(scores.shape)
        top = jnp.maximum(state.top, jnp.max(scores, axis=-1, keepdims=True))
        weights, shrink = jnp.exp(scores - top), jnp.exp(state.top - top)
        v = read_pages(values, layer, page, q.dtype)
        return _Softmax(
            top,
            state.total * shrink + jnp.sum(weights, axis=-1, keepdims=True),
            state.out * shrink + batched_product(weights.astype(q.dtype), v, (3, 2)),
        )

    start, end = _range(positions, valid, window, size)
    column = (*rows.shape[:3], 1)
    nothing = _Softmax(jnp.full(column, MASKED), jnp.zeros(column), jnp.zeros(rows.shape))
    state = lax.fori_loop(start, end, one_page, nothing)
    sees = state.top > MASKED / 2
    out = jnp.where(sees, state.out / jnp.where(sees, state.total, 1.0), 0.0).astype(q.dtype)
    return out.reshape(grouped.shape).transpose(0, 3, 1, 2, 4).reshape(q.shape)


def _seen(
    keys: Int[Array, " C"], positions: Int[Array, "B T"], valid: Bool[Array, "B T"], window: int | None
) -> Bool[Array, "B T C"]:
    """Which keys, by their positions, a query sees."""
    behind = positions[:, :, None] - keys
    seen = (behind >= 0) & valid[:, :, None]
    return seen if window is None else seen & (behind < window)


def _range(
    positions: Int[Array, "B T"], valid: Bool[Array, "B T"], window: int | None, size: int
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """First page and one past the last page that any query sees."""
    end = jnp.max(jnp.where(valid, positions, -1)) // size + 1
    if window is None:
        return jnp.zeros_like(end), end
    oldest = jnp.min(jnp.where(valid, positions, jnp.iinfo(jnp.int32).max))
    return jnp.minimum(jnp.maximum(oldest - window + 1, 0) // size, end), end
