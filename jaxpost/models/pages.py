"""A model's keys and values in pages: pools that rows share, and tables that say which page holds what.

The pools are made once; tables change from call to call. Full and sliding-window blocks have pools of their own,
so that a window's old pages can be given back. Page 0 of a pool belongs to nobody: padding is written there.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int

from jaxpost.models.config import ModelConfig
from jaxpost.ops.paged import Pages, empty_pages
from jaxpost.ops.paged_shards import copy_pages, page_specs


class Pools(NamedTuple):
    """All pages of a model; `keys[s][b]` belongs to block b of stack s."""

    keys: tuple[tuple[Pages, ...], ...]
    values: tuple[tuple[Pages, ...], ...]


class Tables(NamedTuple):
    """Page of each C tokens of a row, in the full pools and in the window pools; 0 where none is kept."""

    full: Int[Array, "B M"]
    window: Int[Array, "B M"]


class PagedCache(struct.PyTreeNode):
    """What `Model.forward` reads and advances: token at position p of row b goes to slot p % C of page
    table[b, p // C]. All positions before a row's tokens must have been written.

    Attributes:
        fresh: static: every row starts at position 0, so its tokens see one another only and no page is read.
        mesh: static: what pools and rows are spread over (`places`); tables then number the pages of a row's part.
    """

    pools: Pools
    tables: Tables
    fresh: bool = struct.field(pytree_node=False, default=False)
    mesh: Mesh | None = struct.field(pytree_node=False, default=None)

    @property
    def page_size(self) -> int:
        return self.pools.keys[0][0].size


class Slots(NamedTuple):
    """Where the tokens of one forward pass go, for full and for window blocks."""

    tables: Tables
    full: Int[Array, "B T"]
    window: Int[Array, "B T"]
    slot: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    valid: Bool[Array, "B T"]
    mesh: Mesh | None = None


def init_pools(
    config: ModelConfig, *, pages: int, window_pages: int = 1, page_size: int = 64, dtype: DTypeLike = jnp.float32
) -> Pools:
    """Empty pools with `pages` pages for each full block and `window_pages` for each sliding-window block.

    Args:
        dtype: of what is stored: the dtype of computation, or int8 with one scale per token and head.

    Raises:
        ValueError: no page beside page 0 where the model needs one.

    Example:
        >>> from jaxpost.models.config import BlockConfig, RopeConfig, StackConfig
        >>> stack = StackConfig(repeats=3, period=(BlockConfig(rope=RopeConfig()),))
        >>> config = ModelConfig(family="llama", vocab_size=8, width=4, mlp_width=6, heads=2, kv_heads=1,
        ...                      head_dim=2, stacks=(stack,), max_positions=16)
        >>> init_pools(config, pages=5, page_size=4).keys[0][0].data.shape
        (3, 5, 1, 4, 2)
    """
    blocks = [kind for stack in config.stacks for kind in stack.period]
    for name, count, used in (
        ("pages", pages, any(kind.window is None for kind in blocks)),
        ("window_pages", window_pages, any(kind.window is not None for kind in blocks)),
    ):
        if used and count < 2:
            raise ValueError(f"{name}={count}: page 0 is nobody's, so a pool needs at least 2")

    def buffers() -> tuple[tuple[Pages, ...], ...]:
        return tuple(
            tuple(
                empty_pages(
                    stack.repeats,
                    pages if kind.window is None else window_pages,
                    config.kv_heads,
                    page_size,
                    config.head_dim,
                    jnp.dtype(dtype),
                )
                for kind in stack.period
            )
            for stack in config.stacks
        )

    return Pools(buffers(), buffers())


def page_bytes(config: ModelConfig, *, page_size: int, dtype: DTypeLike, window: bool) -> int:
    """Bytes of one page over all blocks that share its table: keys, values and int8's scales.

    Example:
        >>> from jaxpost.models.config import BlockConfig, RopeConfig, StackConfig
        >>> stack = StackConfig(repeats=3, period=(BlockConfig(rope=RopeConfig()),))
        >>> config = ModelConfig(family="llama", vocab_size=8, width=4, mlp_width=6, heads=2, kv_heads=1,
        ...                      head_dim=2, stacks=(stack,), max_positions=16)
        >>> page_bytes(config, page_size=4, dtype=jnp.float32, window=False)
        192
    """
    layers = sum(
        stack.repeats * sum((kind.window is not None) == window for kind in stack.period) for stack in config.stacks
    )
    per_head = config.head_dim * jnp.dtype(dtype).itemsize + (4 if jnp.dtype(dtype) == jnp.int8 else 0)
    return 2 * layers * config.kv_heads * page_size * per_head


def slots(cache: PagedCache, positions: Int[Array, "B T"], valid: Bool[Array, "B T"]) -> Slots:
    """Page and slot of every token; padding goes to page 0."""
    size = cache.page_size
    number = jnp.where(valid, positions, 0) // size

    def pages(table: Int[Array, "B M"]) -> Int[Array, "B T"]:
        return jnp.where(valid, jnp.take_along_axis(table, number, axis=1, mode="clip"), 0)

    full, window = (pages(table) for table in cache.tables)
    return Slots(cache.tables, full, window, jnp.where(valid, positions % size, 0), positions, valid, cache.mesh)


def places(pools: Pools, mesh: Mesh) -> Pools:
    """A NamedSharding for each array of the pools, or of their shapes: pages over rows' axes, heads over tensor."""

    def one(pages: Pages) -> Pages:
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), page_specs(pages, mesh))

    return jax.tree.map(one, pools, is_leaf=lambda x: isinstance(x, Pages))


def copy(
    pools: Pools,
    full: Int[Array, "R 2 X"],
    window: Int[Array, "R 2 Y"],
    config: ModelConfig,
    mesh: Mesh | None = None,
) -> Pools:
    """Copies a shared page before it is written: page full[r, 0] to full[r, 1] of part r of every full pool.

    `window` likewise; R is 1 without a mesh.
    """

    def one(stacks: tuple[tuple[Pages, ...], ...]) -> tuple[tuple[Pages, ...], ...]:
        return tuple(
            tuple(
                copy_pages(pages, full if kind.window is None else window, mesh)
                for pages, kind in zip(blocks, stack.period, strict=True)
            )
            for blocks, stack in zip(stacks, config.stacks, strict=True)
        )

    return Pools(one(pools.keys), one(pools.values))
