"""Keys and values of tokens already read: a dense buffer with one slot per token and row.

All rows write to the same slots, so advancing the cache is one contiguous write per layer: a row with fewer
valid tokens than its neighbours leaves holes, and a hole is never attended to. Padding may lie on the left, the
right or between.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxpost.models.config import ModelConfig


class DenseCache(NamedTuple):
    """A cache with room for S tokens per row.

    `keys[s][b]` and `values[s][b]` belong to block b of stack s. They are loop carries of the layer scan: as its
    inputs and outputs the whole cache would be copied at every call.
    """

    keys: tuple[tuple[Float[Array, "L B K S H"], ...], ...]
    """Keys after RoPE."""
    values: tuple[tuple[Float[Array, "L B K S H"], ...], ...]
    positions: Int[Array, "B S"]
    """Position of each slot's token in its sequence; -1 for an empty slot or a hole."""
    length: Int[Array, ""]
    """Slots used so far, holes included."""

    @property
    def capacity(self) -> int:
        return self.positions.shape[1]


def init_cache(config: ModelConfig, batch: int, capacity: int, dtype=jnp.float32) -> DenseCache:
    """An empty cache for `batch` rows of at most `capacity` tokens (padding counts) in the dtype of computation.

    Example:
        >>> from jaxpost.models.config import BlockConfig, RopeConfig, StackConfig
        >>> stack = StackConfig(repeats=3, period=(BlockConfig(rope=RopeConfig()),))
        >>> config = ModelConfig(family="llama", vocab_size=8, width=4, mlp_width=6, heads=2, kv_heads=1,
        ...                      head_dim=2, stacks=(stack,), max_positions=16)
        >>> init_cache(config, 2, 5).keys[0][0].shape
        (3, 2, 1, 5, 2)
    """
    if batch < 1 or capacity < 1:
        raise ValueError(f"a cache needs at least one row and one slot, not {batch} rows and {capacity} slots")

    def buffers():
        return tuple(
            tuple(
                jnp.zeros((stack.repeats, batch, config.kv_heads, capacity, config.head_dim), dtype)
                for _ in stack.period
            )
            for stack in config.stacks
        )

    return DenseCache(buffers(), buffers(), jnp.full((batch, capacity), -1, jnp.int32), jnp.zeros((), jnp.int32))


def reserve(
    cache: DenseCache, positions: Int[Array, "B T"], valid: Bool[Array, "B T"]
) -> tuple[DenseCache, Int[Array, ""]]:
    """Takes the next T slots for tokens at `positions`; returns the advanced cache and the first slot.

    Call it once per forward pass; the layers then `write` their keys and values from that slot on.
    """
    if positions.shape[1] > cache.capacity:
        raise ValueError(f"{positions.shape[1]} tokens do not fit into a cache of {cache.capacity} slots")
    start = cache.length
    stored = jnp.where(valid, positions.astype(jnp.int32), -1)
    table = lax.dynamic_update_slice(cache.positions, stored, (0, start))
    return cache._replace(positions=table, length=start + positions.shape[1]), start


def write(
    buffer: Float[Array, "L B K S H"], new: Float[Array, "B T K H"], layer: Int[Array, ""], start: Int[Array, ""]
) -> Float[Array, "L B K S H"]:
    """Puts one layer's new keys or values at slots [start, start + T)."""
    rows = jnp.swapaxes(new, 1, 2)[None].astype(buffer.dtype)
    zero = jnp.zeros((), start.dtype)
    return lax.dynamic_update_slice(buffer, rows, (layer.astype(start.dtype), zero, zero, start, zero))


def read(buffer: Float[Array, "L B K S H"], layer: Int[Array, ""]) -> Float[Array, "B K S H"]:
    """One layer's keys or values."""
    return lax.dynamic_index_in_dim(buffer, layer, 0, keepdims=False)
