"""Where arrays live: the device mesh, one table of logical axes, and shardings made from both.

Every parameter and activation names its dimensions by meaning ("embed", "mlp", "batch" ...). `RULES` says
which mesh axes split each meaning; nothing else in the project names a mesh axis for a model's arrays.
A dimension whose rule is None, or whose mesh axes have size 1, is replicated.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from jaxpost.types import Constrain, TrainState

AXES = ("data", "fsdp", "tensor", "seq", "expert")
"""Mesh axes: data (copies), fsdp (copies that share the weights), tensor (one layer), seq (tokens), expert."""

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


# Meshes


def mesh_sizes(section: Any, num_devices: int) -> dict[str, int]:
    """Sizes of all mesh axes; one of those given may be -1 (all devices that remain).

    Args:
      section: a mapping from axis to size, or a dataclass with such fields (`config.MeshSection`); axes left
        out have size 1.
      num_devices: how many devices the product of the sizes must equal.

    Raises:
      ValueError: unknown axis, more than one -1, a size below 1, or a product that is not `num_devices`.

    >>> mesh_sizes({"fsdp": -1, "tensor": 2}, 8)
    {'data': 1, 'fsdp': 4, 'tensor': 2, 'seq': 1, 'expert': 1}
    """
    given = dict(section) if isinstance(section, Mapping) else dataclasses.asdict(section)
    if unknown := sorted(set(given) - set(AXES)):
        raise ValueError(f"unknown mesh axis {unknown[0]!r}: the axes are {', '.join(AXES)}")
    sizes = {axis: int(given.get(axis, 1)) for axis in AXES}
    shown = " ".join(f"{a}={n}" for a, n in sizes.items())
    free = [a for a, n in sizes.items() if n == -1]
    if len(free) > 1:
        raise ValueError(f"mesh {shown}: only one axis may be -1; give --mesh.{free[1]} a number")
    for axis, n in sizes.items():
        if n != -1 and n < 1:
            raise ValueError(f"mesh {shown}: --mesh.{axis} must be at least 1, or -1 for all devices that remain")
    fixed = math.prod(n for n in sizes.values() if n != -1)
    if free:
        if num_devices % fixed:
            raise ValueError(
                f"mesh {shown}: the fixed axes need a multiple of {fixed} devices and there are {num_devices}; "
                f"change {_flags(a for a, n in sizes.items() if n > 1)}"
            )
        sizes[free[0]] = num_devices // fixed
    elif fixed != num_devices:
        hint = _flags(a for a, n in sizes.items() if n > 1) or "--mesh.fsdp"
        raise ValueError(
            f"mesh {shown} needs {fixed} devices and there are {num_devices}; change {hint} (one may be -1)"
        )
    return sizes


def make_mesh(section: Any, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with axes `AXES` (Auto axis types), laid out for the machine's network.

    On several TPU slices the slow network between slices carries `data`, and `fsdp` only for what `data` leaves.

    Args:
      section: see `mesh_sizes`.
      devices: default all devices of all processes.

    Raises:
      ValueError: the sizes do not fit the devices, or the slices.

    >>> make_mesh({"fsdp": -1}).axis_names
    ('data', 'fsdp', 'tensor', 'seq', 'expert')
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(section, len(devices))
    shape = tuple(sizes.values())
    types = (AxisType.Auto,) * len(AXES)
    num_slices = _num_slices(devices)
    if num_slices == 1:
        return jax.make_mesh(shape, AXES, devices=devices, axis_types=types)
    across = slice_sizes(sizes, num_slices)
    within = tuple(n // across[a] for a, n in sizes.items())
    arranged = mesh_utils.create_hybrid_device_mesh(
        within, tuple(across.values()), devices, allow_split_physical_axes=True
    )
    return Mesh(arranged, AXES, axis_types=types)


def slice_sizes(sizes: Mapping[str, int], num_slices: int) -> dict[str, int]:
    """How many parts of each mesh axis lie on different slices: `data` takes what it can, then `fsdp`.

    Raises:
      ValueError: data * fsdp cannot be spread over the slices.

    >>> slice_sizes({"data": 2, "fsdp": 16, "tensor": 1, "seq": 1, "expert": 1}, 4)
    {'data': 2, 'fsdp': 2, 'tensor': 1, 'seq': 1, 'expert': 1}
    """
    data = math.gcd(sizes["data"], num_slices)
    fsdp = math.gcd(sizes["fsdp"], num_slices // data)
    if data * fsdp != num_slices:
        raise ValueError(
            f"data={sizes['data']} fsdp={sizes['fsdp']} cannot be spread over {num_slices} slices: "
            f"set --mesh.data to a multiple of {num_slices}"
        )
    return {axis: {"data": data, "fsdp": fsdp}.get(axis, 1) for axis in AXES}


def _num_slices(devices: Sequence[Any]) -> int:
    # GPU and CPU processes also carry a slice_index, but there any axis may cross it.
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(d, "slice_index", 0) for d in devices})


def _flags(axes: Any) -> str:
    return " or ".join(f"--mesh.{a}" for a in axes)


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
        name = "/".join(_keys(path))
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
                raise ValueError(f"{what} cannot be split by {split}; change {_flags(names)} to a divisor")
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
    shapes = {_keys(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(abstract.params)}
    places = {_keys(path): place for path, place in jax.tree_util.tree_leaves_with_path(params)}
    if shapes.keys() != places.keys():
        odd = sorted(shapes.keys() ^ places.keys())[0]
        raise ValueError(f"shardings and parameters differ at {'/'.join(odd)}")

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        keys = _keys(path)
        for start in range(len(keys)):
            if shapes.get(keys[start:]) == tuple(leaf.shape):
                return places[keys[start:]]
        if math.prod(leaf.shape) >= LARGE and mesh.size > 1:
            report(f"{'/'.join(keys)} {tuple(leaf.shape)} mirrors no parameter: every device holds all of it")
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(one, abstract)


def _keys(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


# Activations and batches


def make_constrain(mesh: Mesh, rules: Rules = RULES) -> Constrain:
    """constrain(x, axes): gives an activation the sharding of its logical axes; the identity on one device.

    Mesh axes that do not divide a dimension are left out from the right (a batch of 4 on data=4 fsdp=2 is
    split by data only): placement never changes values, and small batches must run too.

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


def batch_sharding(mesh: Mesh, rules: Rules = RULES) -> NamedSharding:
    """Rows over data and fsdp, all other dimensions whole; fits every array that leads with B."""
    return NamedSharding(mesh, spec(("batch",), rules, mesh))


def check_batch(batch_size: int, mesh: Mesh, *, microbatches: int = 1) -> None:
    """Says early, in the words of the flags, that rows cannot be dealt out evenly.

    Raises:
      ValueError: `batch_size` is not divisible by `microbatches`, or a microbatch not by data * fsdp.

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
                f"batch array {'/'.join(_keys(path))} of shape {np.shape(x)} cannot be dealt to the {here} row shards "
                f"of this process (--mesh.data {mesh.shape['data']} x --mesh.fsdp {mesh.shape['fsdp']}): "
                f"its rows must be a multiple of {here}"
            )
        shape = (rows // here * ways, *np.shape(x)[1:])
        return jax.make_array_from_process_local_data(sharding, np.asarray(x), shape)

    return jax.tree_util.tree_map_with_path(one, batch)


# Processes


def initialize_distributed(environ: Mapping[str, str] = os.environ) -> bool:
    """Joins the other processes of the run when the environment asks for it; call it before any other use of jax.

    `JAXPOST_DISTRIBUTED=auto` finds the others by itself (TPU pods, Slurm, Open MPI). Elsewhere set all of
    `JAXPOST_COORDINATOR=host:port`, `JAXPOST_NUM_PROCESSES` and `JAXPOST_PROCESS_ID` (0 runs on the coordinator).

    Returns:
      Whether the process is part of a group.

    Raises:
      ValueError: some of the variables are missing or not numbers.

    >>> initialize_distributed({})
    False
    """
    names = ("JAXPOST_COORDINATOR", "JAXPOST_NUM_PROCESSES", "JAXPOST_PROCESS_ID")
    given = [n for n in names if environ.get(n)]
    mode = environ.get("JAXPOST_DISTRIBUTED", "")
    if mode not in ("", "0", "auto"):
        raise ValueError(f"JAXPOST_DISTRIBUTED={mode!r}: it is auto, 0 or unset")
    if given and len(given) < len(names):
        missing = [n for n in names if n not in given]
        raise ValueError(f"{given[0]} is set but {', '.join(missing)} not: all three are needed")
    if given:
        try:
            count, index = int(environ[names[1]]), int(environ[names[2]])
        except ValueError:
            raise ValueError(f"{names[1]} and {names[2]} must be whole numbers") from None
        jax.distributed.initialize(environ[names[0]], count, index)
    elif mode == "auto":
        jax.distributed.initialize()
    return bool(given) or mode == "auto"
