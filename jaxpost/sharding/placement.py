"""Logical axes -> mesh axes by one table of rules, and from them the places of parameters, states and activations."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpost.sharding.mesh import AXES, flags
from jaxpost.types import Constrain, TrainState

Rules = Mapping[str, str | tuple[str, ...] | None]
Report = Callable[[str], None]

RULES: Rules = {
    # parameters
    "layers": None,
    "norm": None,
    "rank": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    # activations
    "batch": ("data", "fsdp"),
    "batch_copies": "data",  # rows of one copy of the weights stay together
    "rows": ("data", "fsdp", "tensor"),  # where each row is worked on by itself, as when a token is drawn
    "pages": ("data", "fsdp"),  # a cache's pages lie with the rows that hold them
    "length": "seq",
    "act_embed": None,
    "act_heads": "tensor",
    "act_kv_heads": "tensor",
    "act_mlp": "tensor",
    "act_vocab": ("tensor", "fsdp"),
}

REPLICABLE = frozenset({"kv_heads", "vocab"})
"""Parameter axes that may stay whole where a mesh axis does not divide them: small, or still split by fsdp."""

LARGE = 2**20
"""Elements from which a replicated optimiser array is worth a message."""

_log = logging.getLogger(__name__)


# Logical axes -> specs


def spec(axes: Sequence[str | None], rules: Rules = RULES, mesh: Mesh | None = None) -> PartitionSpec:
    """The partition of an array whose dimensions have these logical axes.

    With a mesh, mesh axes of size 1 are left out, so that equal placements have equal specs.

    Raises:
      ValueError: an axis without a rule, or one mesh axis that would split two dimensions.

    >>> spec(("layers", "embed", "mlp")) == PartitionSpec(None, "fsdp", "tensor")
    True
    """
    return _to_spec(_mesh_axes(axes, rules, mesh))


def _mesh_axes(axes: Sequence[str | None], rules: Rules, mesh: Mesh | None) -> list[tuple[str, ...]]:
    """Mesh axes of each dimension, checked for collisions before those of size 1 are dropped."""
    per_dim: list[tuple[str, ...]] = []
    user: dict[str, str] = {}
    for axis in axes:
        if axis is not None and axis not in rules:
            raise ValueError(f"logical axis {axis!r} has no sharding rule; known: {', '.join(sorted(rules))}")
        rule = None if axis is None else rules[axis]
        names = () if rule is None else (rule,) if isinstance(rule, str) else tuple(rule)
        for name in names:
            if name not in AXES:
                raise ValueError(f"the rule of {axis!r} names {name!r}, which is no mesh axis ({', '.join(AXES)})")
            if name in user:
                raise ValueError(
                    f"axes {tuple(axes)}: mesh axis {name!r} would split both {user[name]!r} and {axis!r}; "
                    "change the rule of one of them"
                )
            user[name] = str(axis)
        per_dim.append(names if mesh is None else tuple(n for n in names if mesh.shape[n] > 1))
    return per_dim


def _to_spec(per_dim: Sequence[tuple[str, ...]]) -> PartitionSpec:
    parts = [None if not names else names[0] if len(names) == 1 else names for names in per_dim]
    while parts and parts[-1] is None:
        parts.pop()
    return PartitionSpec(*parts)


# Parameters and optimiser state


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(
    axes_tree: Any, mesh: Mesh, abstract: Any, *, rules: Rules = RULES, report: Report = _log.warning
) -> Any:
    """A NamedSharding for every parameter.

    Args:
      axes_tree: tree of tuples of logical axes (`models.table.axes_tree`), one per array.
      mesh: where the parameters will live.
      abstract: tree of the same structure of arrays or `jax.ShapeDtypeStruct`.
      rules: logical axis -> mesh axes.
      report: told of each dimension in `REPLICABLE` that stays whole because the mesh does not divide it.

    Returns:
      A tree of the structure of `abstract`.

    Raises:
      ValueError: another dimension that its mesh axes do not divide (names the parameter), or see `spec`.
    """

    def one(path: tuple[Any, ...], leaf: Any, axes: tuple[str | None, ...]) -> NamedSharding:
        name = "/".join(keys_of(path))
        if len(axes) != len(leaf.shape):
            raise ValueError(f"parameter {name}: axes {axes} do not name the dimensions of shape {tuple(leaf.shape)}")
        per_dim = _mesh_axes(axes, rules, mesh)
        for d, (axis, names) in enumerate(zip(axes, per_dim, strict=True)):
            ways = math.prod(mesh.shape[n] for n in names)
            if leaf.shape[d] % ways == 0:
                continue
            what = f"parameter {name}: dimension {d} ({axis}, {leaf.shape[d]})"
            split = " * ".join(f"{n}={mesh.shape[n]}" for n in names)
            if axis not in REPLICABLE:
                raise ValueError(f"{what} cannot be split by {split}; change {flags(names)} to a divisor")
            report(f"{what} cannot be split by {split} and is kept whole there")
            per_dim[d] = ()
        return NamedSharding(mesh, _to_spec(per_dim))

    return jax.tree_util.tree_map_with_path(one, abstract, axes_tree)


def state_shardings(abstract: TrainState, params: Any, mesh: Mesh, *, report: Report = _log.warning) -> TrainState:
    """Shardings of a train state: what mirrors a parameter lies where the parameter lies.

    An array whose path ends with the whole path of a parameter and whose shape is the parameter's (the
    parameters themselves, moments, averages) takes its sharding; all else (counts, factored second moments)
    is replicated. This holds for any nesting of optax transformations, masks and partitions included.

    Args:
      abstract: the state's shapes, e.g. `jax.eval_shape(partial(init_state, optimizer=tx), params)`.
      params: shardings of `abstract.params`, from `param_shardings`.
      mesh: for what is replicated.
      report: told of each array of `LARGE` elements or more that is replicated on more than one device.

    Returns:
      A tree of the structure of `abstract`.
    """
    shapes = {keys_of(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(abstract.params)}
    places = {keys_of(path): place for path, place in jax.tree_util.tree_leaves_with_path(params)}
    if shapes.keys() != places.keys():
        odd = sorted(shapes.keys() ^ places.keys())[0]
        raise ValueError(f"shardings and parameters differ at {'/'.join(odd)}")

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        keys = keys_of(path)
        for start in range(len(keys)):
            if shapes.get(keys[start:]) == tuple(leaf.shape):
                return places[keys[start:]]
        if math.prod(leaf.shape) >= LARGE and mesh.size > 1:
            report(f"{'/'.join(keys)} {tuple(leaf.shape)} mirrors no parameter: every device holds all of it")
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(one, abstract)


def keys_of(path: tuple[Any, ...]) -> tuple[str, ...]:
    """A tree path as plain words."""
    return tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


# Activations


def make_constrain(mesh: Mesh, rules: Rules = RULES) -> Constrain:
    """constrain(x, axes): gives an activation the sharding of its logical axes; the identity on one device.

    Mesh axes that do not divide a dimension are left out from the right (a batch of 4 on data=4 fsdp=2 is
    split by data only): placement never changes values, and small batches must run too.

    >>> from jaxpost.sharding import make_mesh
    >>> constrain = make_constrain(make_mesh({"fsdp": -1}))
    >>> constrain(jax.numpy.ones((8, 4)), ("batch", "act_embed")).shape
    (8, 4)
    """

    def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        if mesh.size == 1:
            return x
        if len(axes) != x.ndim:
            raise ValueError(f"axes {axes} do not name the dimensions of shape {x.shape}")
        per_dim = [_dividing(names, n, mesh) for names, n in zip(_mesh_axes(axes, rules, mesh), x.shape, strict=True)]
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, _to_spec(per_dim)))

    return constrain


def pinned(fn: Callable[..., Any], places: Any) -> Callable[..., Any]:
    """fn with its first argument kept where `places` (from `param_shardings`) says: so come back its gradients too.

    Without it the partitioner may let the optimiser work in a layout that suits the loss (the head split by
    vocabulary) and carry parameters and moments there and back in every step.
    """
    if all(place.mesh.size == 1 for place in jax.tree.leaves(places)):
        return fn

    @wraps(fn)
    def placed(params: Any, *args: Any, **kwargs: Any) -> Any:
        return fn(jax.lax.with_sharding_constraint(params, places), *args, **kwargs)

    return placed


def _dividing(names: tuple[str, ...], size: int, mesh: Mesh) -> tuple[str, ...]:
    while size % math.prod(mesh.shape[n] for n in names):
        names = names[:-1]
    return names
