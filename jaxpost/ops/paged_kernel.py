"""JAX's TPU kernel for one query a row over pages, which it reads where they lie: no page is copied or gathered.

Letters as in `ops.paged`; G = N / K queries per key/value head.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention as kernel
from jaxtyping import Array, Bool, Float, Int

from jaxpost.ops.paged import Pages

LANES, SUBLANES = 128, 16
"""Head width and page size must be multiples of a bfloat16 tile's sides."""
BLOCK = 512
"""Tokens that the kernel fetches at one time."""


def fits(q: Float[Array, "B T N H"], pages: Pages, window: int | None) -> bool:
    """Whether the kernel computes this: one query a row, no window, whole tiles of bfloat16 pages."""
    _, _, _, size, width = pages.data.shape
    whole = width % LANES == 0 and size % SUBLANES == 0
    # It rounds pages of any other dtype to bfloat16.
    return q.shape[1] == 1 and window is None and pages.data.dtype == jnp.bfloat16 and whole


def write_pages(
    pages: Pages,
    new: Float[Array, "B T K H"],
    *,
    layer: Int[Array, ""] | int,
    page: Int[Array, "B T"],
    slot: Int[Array, "B T"],
) -> Pages:
    """`ops.paged.write_pages` of pages without scales, one head at a time: a write of all heads at once would have the
    compiler keep the pool in a layout of its own, and copy all of it between that and the kernel's."""
    data = _flat(pages)[0].at[_numbers(pages, layer, page), slot[..., None]].set(new.astype(pages.data.dtype))
    return Pages(data.reshape(pages.data.shape))


def _flat(pages: Pages) -> Float[Array, "1 X C H"]:
    """All layers' pages of all heads as pages of one head; no copy."""
    return pages.data.reshape(1, -1, *pages.data.shape[3:])


def _numbers(pages: Pages, layer: Int[Array, ""] | int, page: Int[Array, "*S"]) -> Int[Array, "*S K"]:
    """Where they stand there."""
    _, count, heads, _, _ = pages.data.shape
    first = (jnp.asarray(layer, jnp.int32) * count + page.astype(jnp.int32)) * heads
    return first[..., None] + jnp.arange(heads, dtype=jnp.int32)


def paged_attention(
    q: Float[Array, "B 1 N H"],
    keys: Pages,
    values: Pages,
    *,
    layer: Int[Array, ""] | int,
    table: Int[Array, "B M"],
    positions: Int[Array, "B 1"],
    valid: Bool[Array, "B 1"],
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "B 1 N H"]:
    """`ops.paged.paged_attention` by the kernel, where it `fits`.

    A key/value head of a page counts as a page, and of a row as a row: so all layers and heads of a pool are one run of
    pages, and the pool keeps its layout.
    """
    batch, _, heads, width = q.shape
    kv_heads, size = keys.data.shape[2:4]
    numbers = _numbers(keys, layer, table).swapaxes(1, 2)
    lengths = jnp.where(valid, positions + 1, 0).astype(jnp.int32)
    rows = (batch * kv_heads, heads // kv_heads, width)
    # The kernel mixes float32 with bfloat16, and keeps its running sum in the dtype of the queries.
    with jax.numpy_dtype_promotion("standard"):
        out = kernel(
            (q.astype(jnp.float32) * scale).reshape(rows),
            _flat(keys),
            _flat(values),
            jnp.broadcast_to(lengths, (batch, kv_heads)).reshape(-1),
            numbers.reshape(batch * kv_heads, -1),
            attn_logits_soft_cap=softcap,
            pages_per_compute_block=math.gcd(table.shape[1], max(1, BLOCK // size)),
        )
    return out.astype(q.dtype).reshape(q.shape)
