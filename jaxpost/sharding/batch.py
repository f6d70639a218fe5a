"""Rows of a batch: which of them a process feeds, and how they become arrays over the mesh."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Int

from jaxpost.sharding.placement import RULES, Rules, keys_of, spec


def batch_sharding(mesh: Mesh, rules: Rules = RULES) -> NamedSharding:
    """Rows over data and fsdp, all other dimensions whole; fits every array that leads with B."""
    return NamedSharding(mesh, spec(("batch",), rules, mesh))


def check_batch(batch_size: int, mesh: Mesh, *, microbatches: int = 1) -> None:
    """Says early, in the words of the flags, that rows cannot be dealt out evenly.

    Raises:
      ValueError: `batch_size` is not divisible by `microbatches`, or a microbatch not by data * fsdp.

    >>> from jaxpost.sharding import make_mesh
    >>> check_batch(8, make_mesh({"fsdp": -1}), microbatches=3)
    Traceback (most recent call last):
    ...
    ValueError: --train.batch_size 8 is not divisible by --train.microbatches 3
    """
    if batch_size % microbatches:
        raise ValueError(f"--train.batch_size {batch_size} is not divisible by --train.microbatches {microbatches}")
    data, fsdp = mesh.shape["data"], mesh.shape["fsdp"]
    if (batch_size // microbatches) % (data * fsdp):
        parts = f" in {microbatches} microbatches" if microbatches > 1 else ""
        step = data * fsdp * microbatches
        raise ValueError(
            f"--train.batch_size {batch_size}{parts} cannot be dealt to {data * fsdp} devices (--mesh.data {data} x "
            f"--mesh.fsdp {fsdp}): make it a multiple of {step}, such as {-(-batch_size // step) * step}"
        )


def local_rows(mesh: Mesh, batch_size: int) -> Int[np.ndarray, " b"]:
    """The rows of the global batch that this process feeds, ascending.

    They follow the mesh: processes that share a tensor axis feed the same rows, and the devices of one host need
    not be neighbours along fsdp.

    Raises:
      ValueError: `batch_size` cannot be dealt to the mesh (see `check_batch`).

    >>> from jaxpost.sharding import make_mesh
    >>> local_rows(make_mesh({"fsdp": -1}), 8).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    check_batch(batch_size, mesh)
    index = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[i] for i in index.values() if i is not None]))


def to_global(batch: Any, mesh: Mesh) -> Any:
    """Rows of this process -> arrays over the mesh.

    Args:
      batch: tree of host arrays that lead with this process's rows, in the order of `local_rows`.
      mesh: rows go over data and fsdp.

    Returns:
      The same tree of global `jax.Array`s, sharded by `batch_sharding`.

    Raises:
      ValueError: the rows cannot be dealt to this process's devices (names the array).

    >>> from jaxpost.sharding import make_mesh
    >>> import numpy as np
    >>> to_global({"x": np.zeros((8, 3))}, make_mesh({"fsdp": -1}))["x"].shape
    (8, 3)
    """
    sharding = batch_sharding(mesh)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    here = len(local_rows(mesh, ways))

    def one(path: tuple[Any, ...], x: Any) -> jax.Array:
        rows = np.shape(x)[0] if np.ndim(x) else 0
        if rows == 0 or rows % here:
            raise ValueError(
                f"batch array {'/'.join(keys_of(path))} of shape {np.shape(x)} cannot be dealt to the {here} shards "
                f"of rows of this process (--mesh.data {mesh.shape['data']} x --mesh.fsdp {mesh.shape['fsdp']}): "
                f"its rows must be a multiple of {here}"
            )
        shape = (rows // here * ways, *np.shape(x)[1:])
        return jax.make_array_from_process_local_data(sharding, np.asarray(x), shape)

    return jax.tree_util.tree_map_with_path(one, batch)


def row_shards(mesh: Mesh | None) -> int:
    """Parts into which rows are split: data * fsdp; 1 without a mesh.

    >>> row_shards(None)
    1
    """
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def spread(tree: Any, mesh: Mesh) -> Any:
    """Host arrays that are equal on every process and lead with B -> global arrays with their rows dealt out.

    B must be a multiple of `row_shards(mesh)`.

    >>> from jaxpost.sharding import make_mesh
    >>> tuple(spread(np.zeros((8, 3)), make_mesh({"fsdp": -1})).sharding.spec)
    ('fsdp',)
    """
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__), tree)
