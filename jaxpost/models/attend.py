"""Attention of one block, with whatever cache there is: none, dense slots or pages.

Letters: L repeats of a stack, B rows, T tokens, N query heads, K key/value heads, H head width, S cache slots.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpost.models.cache import DenseCache, read, write
from jaxpost.models.config import BlockConfig, ModelConfig, RopeConfig
from jaxpost.models.pages import PagedCache, Slots
from jaxpost.ops import attention as attention_ops
from jaxpost.ops.paged_shards import paged_attention, write_pages

Rotation = tuple[Array, Array]
Cache = DenseCache | PagedCache


class Context(NamedTuple):
    """What every block of a forward pass shares."""

    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"]
    kv_positions: Int[Array, "B S"]
    kv_segments: Int[Array, "B S"]
    rotations: dict[RopeConfig, Rotation]
    place: Int[Array, ""] | Slots | None = None
    """Where a cache takes this pass's tokens: a dense one's first slot, or pages; None without a cache."""
    fresh: bool = False
    """Paged rows that start at position 0: their tokens see one another only."""
    prefixes: Int[Array, "B T"] | None = None


class BlockCache(NamedTuple):
    """The buffers of one block of the period, and which repeat is running."""

    keys: Any
    """[L, B, K, S, H] dense, or `Pages`."""
    values: Any
    layer: Int[Array, ""] | int


def cached_attention(
    config: ModelConfig,
    kind: BlockConfig,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    context: Context,
    cache: BlockCache | None,
    attend: attention_ops.AttentionFn,
) -> tuple[Float[Array, "B T N H"], BlockCache | None]:
    """Stores new keys and values where there is a cache, and attends to all that the queries may see."""
    rules: dict[str, Any] = {
        "scale": config.attention_scale or config.head_dim**-0.5,
        "window": kind.window,
        "softcap": config.attention_softcap,
    }
    place = context.place
    if cache is not None and isinstance(place, Slots):
        full = kind.window is None
        mesh = place.mesh
        at: dict[str, Any] = {"layer": cache.layer, "page": place.full if full else place.window, "slot": place.slot}
        at["mesh"] = mesh
        cache = cache._replace(keys=write_pages(cache.keys, k, **at), values=write_pages(cache.values, v, **at))
        if not context.fresh:
            table = place.tables.full if full else place.tables.window
            where: dict[str, Any] = {
                "layer": cache.layer,
                "table": table,
                "positions": place.positions,
                "valid": place.valid,
                "mesh": mesh,
            }
            return paged_attention(q, cache.keys, cache.values, **where, **rules), cache
    if cache is not None and isinstance(place, jax.Array):
        layer = jnp.asarray(cache.layer, jnp.int32)
        cache = cache._replace(keys=write(cache.keys, k, layer, place), values=write(cache.values, v, layer, place))
        k, v = read(cache.keys, layer), read(cache.values, layer)
    out = attend(
        q,
        k,
        v,
        q_positions=context.positions,
        kv_positions=context.kv_positions,
        q_segments=context.segments,
        kv_segments=context.kv_segments,
        q_prefixes=context.prefixes,
        kv_heads_first=cache is not None and not isinstance(place, Slots),
        **rules,
    )
    return out, cache


def stack_buffers(cache: Cache | None, s: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Keys and values of stack s, one entry a block of its period."""
    buffers = cache.pools if isinstance(cache, PagedCache) else cache
    return ((), ()) if buffers is None else (buffers.keys[s], buffers.values[s])


def with_stack_buffers(cache: Any, s: int, keys: tuple[Any, ...], values: tuple[Any, ...]) -> Any:
    """The cache with stack s's keys and values replaced."""
    if cache is None:
        return None
    buffers = cache.pools if isinstance(cache, PagedCache) else cache
    buffers = buffers._replace(
        keys=(*buffers.keys[:s], keys, *buffers.keys[s + 1 :]),
        values=(*buffers.values[:s], values, *buffers.values[s + 1 :]),
    )
    return cache.replace(pools=buffers) if isinstance(cache, PagedCache) else buffers
