"""From one mesh to another of the same devices: training splits weights by fsdp, decoding wants them by tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpost.sharding.mesh import AXES, mesh_sizes
from jaxpost.sharding.placement import keys_of


def remesh(mesh: Mesh, section: Mapping[str, int]) -> Mesh:
    """The same devices, in the same order, under other axis sizes; `section` as `mesh_sizes` takes it.

    Raises:
      ValueError: the sizes do not fit the devices.

    >>> from jaxpost.sharding import make_mesh
    >>> dict(remesh(make_mesh({"fsdp": -1}), {"tensor": 2, "data": -1}).shape)["tensor"]
    2
    """
    sizes = mesh_sizes(section, mesh.size)
    return Mesh(mesh.devices.reshape(tuple(sizes.values())), AXES, axis_types=mesh.axis_types)


def reshard(tree: Any, places: Any) -> Any:
    """The same values at other places of the same devices.

    An array that lies so already comes back itself, not copied. Each of the others is moved by a program of its own,
    so that what moves is one array at a time; no device holds more of it than its old and its new part need.

    Args:
      tree: arrays.
      places: a NamedSharding for each; over the same devices in the same order, as `remesh` keeps them.

    Raises:
      ValueError: an array on other devices (names it).
    """

    def one(path: tuple[Any, ...], x: jax.Array, place: NamedSharding) -> jax.Array:
        if x.sharding.is_equivalent_to(place, x.ndim):
            return x
        if not isinstance(x.sharding, NamedSharding) or _order(x.sharding.mesh) != _order(place.mesh):
            raise ValueError(
                f"{'/'.join(keys_of(path))} lies on {len(x.sharding.device_set)} devices, and shall go to "
                f"{place.mesh.size} others or in another order: place it on the mesh first (jax.device_put)"
            )
        # One at a time, so that no more than one array's buffers are under way.
        return jax.block_until_ready(move(x, place))

    return jax.tree_util.tree_map_with_path(one, tree, places)


@partial(jax.jit, static_argnums=1)
def move(x: jax.Array, place: NamedSharding) -> jax.Array:
    """x at another place. It is split over all devices on the way, as the partitioner would else gather all of it."""
    return lax.with_sharding_constraint(lax.with_sharding_constraint(x, _all_split(x.shape, place)), place)


def _all_split(shape: tuple[int, ...], place: NamedSharding) -> NamedSharding:
    """A place like `place` in which the mesh axes that it leaves out split some dimension too, where one divides."""
    mesh = place.mesh
    per_dim = [() if p is None else (p,) if isinstance(p, str) else tuple(p) for p in place.spec]
    per_dim += [()] * (len(shape) - len(per_dim))
    used = {name for names in per_dim for name in names}
    more = tuple(name for name in mesh.axis_names if mesh.shape[name] > 1 and name not in used)
    # A dimension that is split already comes first: only its own parts are then joined again.
    for d in sorted(range(len(shape)), key=lambda d: not per_dim[d]):
        if shape[d] % math.prod(mesh.shape[name] for name in (*per_dim[d], *more)) == 0:
            per_dim[d] += more
            break
    return NamedSharding(mesh, PartitionSpec(*(names or None for names in per_dim)))


def _order(mesh: Any) -> list[Any]:
    return list(mesh.devices.flat)
