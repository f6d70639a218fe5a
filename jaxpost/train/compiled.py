"""Steps compiled once, ahead of their first call: another shape or sharding is an error, never a recompilation."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxpost.metrics.terms import Sums
from jaxpost.train.job import Job, SupervisedJob
from jaxpost.types import TrainState

Signature = dict[str, tuple[tuple[int, ...], str]]


class ShapeChanged(RuntimeError):
    """A batch has other shapes than the first one, which would compile the program again."""


def signature(batch: Any) -> Signature:
    """Shape and dtype of each array of a batch, by name."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(batch)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): (tuple(x.shape), str(x.dtype)) for path, x in leaves
    }


def check_signature(first: Signature, batch: Any, what: str) -> None:
    """Refuse a batch whose shapes differ from the first one's.

    Raises:
        ShapeChanged: naming each array that differs.
    """
    now = signature(batch)
    if now != first:
        names = sorted(k for k in first.keys() | now.keys() if first.get(k) != now.get(k))
        shown = "; ".join(f"{k}: {first.get(k, 'absent')} before, {now.get(k, 'absent')} now" for k in names)
        raise ShapeChanged(
            f"{what} would be compiled again, because this batch has other shapes than the first: {shown}. "
            "Every batch of a source must have the same shapes (pad or drop the last one)."
        )


def state_shardings(abstract_state: TrainState, mesh: Mesh | None) -> TrainState:
    """The sharding of every array of the state; replicated (or on one device without a mesh) where none is given."""
    plain = NamedSharding(mesh, PartitionSpec()) if mesh is not None else SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: getattr(leaf, "sharding", None) or plain, abstract_state)


def with_shardings(abstract_state: TrainState, mesh: Mesh | None) -> TrainState:
    """The abstract state with every sharding filled in: what a checkpoint is restored into."""
    shardings = state_shardings(abstract_state, mesh)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), abstract_state, shardings
    )


def host_scalars(hyper: Mapping[str, Any]) -> dict[str, Any]:
    """Scalars as NumPy arrays, which every process may pass to a program over all devices.

    >>> host_scalars({"beta": 0.5})
    {'beta': array(0.5, dtype=float32)}
    """
    return {name: np.asarray(jax.device_get(jnp.asarray(value))) for name, value in hyper.items()}


class CompiledStep:
    """The training step, jitted with the state donated and compiled at the first batch.

    The key of update k is fold_in(key(seed), k), so noise depends on the update alone. `halt` carries each
    process's wish to stop into the step, whose sum all processes read back: they stop at the same update.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._first: Signature = {}
        self._compiled: Any = None
        self._halts: dict[bool, Any] = {}
        self._hyper = host_scalars(job.hyper)
        self.compile_seconds = 0.0

    @property
    def compiled(self) -> bool:
        return self._compiled is not None

    def compile(self, state: TrainState, batch: Any) -> None:
        """Compile for the shapes of this state and this process's batch, and measure how long it takes."""
        job, start = self._job, time.perf_counter()

        def run(state: Any, frozen: Any, batch: Any, seed: Any, index: Any, halt: Any, hyper: Any) -> Any:
            key = jax.random.fold_in(jax.random.key(seed), index)
            state, metrics = job.step(state, frozen, batch, key, hyper)
            return state, {**metrics, **job.count(batch), "halt": halt.sum()}

        metrics_sharding = None if job.mesh is None else NamedSharding(job.mesh, PartitionSpec())
        out = (state_shardings(job.abstract_state, job.mesh), metrics_sharding)
        args = self._arguments(state, batch, 0, False)
        self._compiled = jax.jit(run, donate_argnums=0, out_shardings=out).lower(*args).compile()
        self._first = signature(batch)
        self.compile_seconds = time.perf_counter() - start

    def __call__(
        self, state: TrainState, batch: Any, index: int, halt: bool, hyper: Mapping[str, Any] | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """Run update `index` (from 0) on this process's rows; returns at once, before the result is computed.

        Args:
            hyper: values in the place of the job's, under the same names.

        Raises:
            ShapeChanged: the batch has other shapes than the one compiled for.
        """
        check_signature(self._first, batch, "The training step")
        *args, usual = self._arguments(state, batch, index, halt)
        return self._compiled(*args, usual if hyper is None else host_scalars(hyper))

    def _arguments(self, state: TrainState, batch: Any, index: int, halt: bool) -> tuple[Any, ...]:
        job = self._job
        seed, step = np.uint32(job.run.seed), np.int32(index)
        return state, job.frozen, job.place(batch), seed, step, self._halt(halt), self._hyper

    def _halt(self, wish: bool) -> Any:
        if wish not in self._halts:
            mesh = self._job.mesh
            if mesh is None:
                self._halts[wish] = np.full((1,), int(wish), np.int32)
            else:
                everywhere = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
                self._halts[wish] = jax.make_array_from_callback(
                    (mesh.size,), everywhere, lambda _: np.full((1,), int(wish), np.int32)
                )
        return self._halts[wish]


class CompiledEval:
    """An evaluation step, compiled at its first batch; one for each source of batches."""

    def __init__(self, job: SupervisedJob, name: str) -> None:
        self._job, self._name = job, name
        self._first: Signature | None = None
        self._compiled: Any = None

    def __call__(self, params: Any, batch: Any) -> tuple[Mapping[str, Sums], Any]:
        """Sums over the batch, and what the job keeps of it (None: nothing)."""
        job = self._job
        shapes = signature(batch)
        if self._first is not None:
            check_signature(self._first, batch, f"The evaluation step for '{self._name}'")
        args = (params, job.frozen, job.place(batch), np.uint32(job.run.seed), host_scalars(job.hyper))
        if self._compiled is None:

            def run(params: Any, frozen: Any, batch: Any, seed: Any, hyper: Any) -> Any:
                assert job.eval_step is not None
                return job.eval_step(params, frozen, batch, jax.random.key(seed), hyper)

            out = None if job.mesh is None else NamedSharding(job.mesh, PartitionSpec())
            self._compiled = jax.jit(run, out_shardings=out).lower(*args).compile()
            self._first = shapes
        found = self._compiled(*args)
        return (found, None) if job.examine is None else found
