"""Pages on a mesh: each device reads and writes its own pages, for its own rows and heads.

Pools are split by page as rows are split (data and fsdp), and by head as the projections that write them (tensor,
where it divides them). A row's table holds page numbers of the row's own part, so no key or value ever moves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxpost import sharding
from jaxpost.ops import paged, platform
from jaxpost.ops.paged import Pages


def page_specs(pages: Pages, mesh: Mesh) -> Pages:
    """Where pages lie: a PartitionSpec for each array; anything with `ndim` and a head axis serves as an array."""
    heads = _axis("act_kv_heads", mesh) if pages.data.shape[2] % mesh.shape["tensor"] == 0 else None
    return jax.tree.map(lambda x: PartitionSpec(None, _axis("pages", mesh), heads, *[None] * (x.ndim - 3)), pages)


def write_pages(
    pages: Pages,
    new: Float[Array, "B T K H"],
    *,
    layer: Int[Array, ""] | int,
    page: Int[Array, "B T"],
    slot: Int[Array, "B T"],
    mesh: Mesh | None,
) -> Pages:
    """`ops.paged.write_pages` on every device. B must be a multiple of `sharding.row_shards(mesh)`."""
    if mesh is None:
        return _write(pages, new, layer=layer, page=page, slot=slot)

    def local(pages: Pages, new: Array, layer: Array, page: Array, slot: Array) -> Pages:
        return _write(pages, new, layer=layer, page=page, slot=slot)

    places, row = page_specs(pages, mesh), PartitionSpec(_axis("batch", mesh))
    kv = PartitionSpec(row[0], None, places.data[2])
    run = _each_device(local, mesh, (places, kv, PartitionSpec(), row, row), places)
    return run(pages, new, jnp.asarray(layer, jnp.int32), page, slot)


def paged_attention(
    q: Float[Array, "B T N H"],
    keys: Pages,
    values: Pages,
    *,
    layer: Int[Array, ""] | int,
    table: Int[Array, "B M"],
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    mesh: Mesh | None,
    **rules: Any,
) -> Float[Array, "B T N H"]:
    """`ops.paged.paged_attention` on every device, which reads as far as its own longest row; `rules` as there."""
    if mesh is None:
        where: dict[str, Any] = {"layer": layer, "table": table, "positions": positions, "valid": valid}
        return _attend(q, keys, values, **where, **rules)

    def local(q, keys, values, layer, table, positions, valid):
        return _attend(q, keys, values, layer=layer, table=table, positions=positions, valid=valid, **rules)

    places, row = page_specs(keys, mesh), PartitionSpec(_axis("batch", mesh))
    heads = PartitionSpec(row[0], None, places.data[2])
    run = _each_device(local, mesh, (heads, places, places, PartitionSpec(), row, row, row), heads)
    return run(q, keys, values, jnp.asarray(layer, jnp.int32), table, positions, valid)


def _write(pages: Pages, new: Array, **at: Any) -> Pages:
    """On one device."""
    if platform.choices().paged_kernel and pages.scale is None:
        from jaxpost.ops import paged_kernel

        return paged_kernel.write_pages(pages, new, **at)
    return paged.write_pages(pages, new, **at)


def _attend(q: Array, keys: Pages, values: Pages, *, window: int | None = None, **rest: Any) -> Array:
    """On one device, by the kernel where there is one that fits."""
    if platform.choices().paged_kernel:
        from jaxpost.ops import paged_kernel  # Pallas for TPU is slow to import and of use to few programs.

        if paged_kernel.fits(q, keys, window):
            return paged_kernel.paged_attention(q, keys, values, **rest)
    return paged.paged_attention(q, keys, values, window=window, **rest)


def copy_pages(pages: Pages, pairs: Int[Array, "R 2 X"], mesh: Mesh | None) -> Pages:
    """`ops.paged.copy_pages` for each of the R parts of the rows: page pairs[r, 0] to page pairs[r, 1] of its own."""
    if mesh is None:
        return paged.copy_pages(pages, *pairs[0])
    places = page_specs(pages, mesh)
    rows = PartitionSpec(_axis("pages", mesh))
    return _each_device(lambda pages, pairs: paged.copy_pages(pages, *pairs[0]), mesh, (places, rows), places)(
        pages, pairs
    )


def _each_device(function: Callable[..., Any], mesh: Mesh, ins: Any, outs: Any) -> Callable[..., Any]:
    # Loops inside begin with constants, which are the same everywhere; what they become is not.
    return jax.shard_map(function, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=False)


def _axis(name: str, mesh: Mesh) -> Any:
    """Mesh axes of one dimension, as part of a PartitionSpec."""
    found = sharding.spec((name,), mesh=mesh)
    return found[0] if len(found) else None
