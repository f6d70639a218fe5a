"""The device mesh: sizes checked against the devices, laid out for the network; and the processes behind it."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "tensor", "seq", "expert")
"""Mesh axes: data (copies), fsdp (copies that share the weights), tensor (one layer), seq (tokens), expert."""


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
                f"change {flags(a for a, n in sizes.items() if n > 1)}"
            )
        sizes[free[0]] = num_devices // fixed
    elif fixed != num_devices:
        hint = flags(a for a, n in sizes.items() if n > 1) or "--mesh.fsdp"
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


def flags(axes: Iterable[str]) -> str:
    """Command-line flags of some mesh axes, for a message."""
    return " or ".join(f"--mesh.{a}" for a in axes)


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
