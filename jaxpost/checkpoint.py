"""Checkpoints: the train state and a JSON of everything beside it, saved as one and restored exactly.

A checkpoint is a folder `<run>/checkpoints/<step>`, written by Orbax in the background under a temporary name
and renamed when complete, so that a crash or a full disk can only leave an unfinished folder, which the next
start removes. The JSON (`meta`) travels inside it: data position, file offsets, configuration hash, versions,
and a manifest of every array's shape and dtype. The manifest is checked before anything is read, because Orbax
casts another dtype in silence and reports another shape obscurely.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from importlib import metadata as package_metadata
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from jaxpost import __version__, disk

Meta = dict[str, Any]
_SHOWN = 6
_LETTERS = 150
_UNFINISHED = "*.orbax-checkpoint-tmp*"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read or used; the message names what and why, and what to do."""


class CheckpointMismatch(CheckpointError, ValueError):
    """A checkpoint of another architecture, shape, dtype, data or configuration than this run's."""


class Checkpoints:
    """The checkpoints of one run, newest `keep` of them preserved.

    Every method must be called by all processes.

    Args:
        folder: absolute or relative local path; made if missing. Unfinished saves in it are removed.
        keep: how many of the newest complete checkpoints stay.
        background: write while the caller goes on (`wait` and `close` finish it). On an accelerator that hides the
            disk; on a CPU it would cost a second copy of the state in memory and compete for the same cores.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> with Checkpoints(Path(tempfile.mkdtemp()), keep=1) as checkpoints:
        ...     checkpoints.save(3, {"w": jnp.arange(2.0)}, {"position": 3})
        ...     checkpoints.wait()
        ...     state, meta = checkpoints.restore({"w": jnp.zeros(2)})
        >>> meta["position"], [float(x) for x in state["w"]]
        (3, [0.0, 1.0])
    """

    def __init__(self, folder: Path, *, keep: int = 2, background: bool = True) -> None:
        if keep < 1:
            raise ValueError(f"train.keep_checkpoints is {keep}; it must be at least 1.")
        self.folder = Path(folder).absolute()
        _quiet_orbax()
        self._remove_unfinished()
        self._background = background
        # Compression gained a tenth of the disk, took over twice the time and half the state's size in memory.
        context = ocp.Context()
        context.array.saving.use_compression = False
        policies: Any = ocp.training
        self._manager: Any = policies.Checkpointer(
            str(self.folder),
            context=context,
            save_decision_policy=policies.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.preservation_policies.LatestN(keep),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close() if kind is None else self._close_quietly()

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return [c.step for c in self._manager.checkpoints]

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        steps = self.steps
        return steps[-1] if steps else None

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Save `state` and `meta` as `step`; in the background, return once the arrays are copied off the devices.

        Raises:
            CheckpointError: this save, or the one still running in the background, failed.
        """
        # Through text, so that what the caller changes while the save runs stays out of it.
        full = json.loads(json.dumps(dict(meta)))
        full |= {"step": step, "versions": versions(), "manifest": manifest(state)}
        try:
            self._manager.save_async(step, state, custom_metadata=full)
            if not self._background:
                self._manager.wait()
        except Exception as error:
            raise self._explained(error) from error

    def meta(self, step: int | None = None) -> Meta:
        """The JSON of a checkpoint (default: the newest), without reading arrays."""
        if (step := self.latest if step is None else step) is None:
            raise CheckpointError(f"There is no checkpoint in {self.folder}.")
        found = self._manager.checkpointables_metadata(step).custom_metadata
        if not isinstance(found, dict) or "manifest" not in found:
            raise CheckpointError(
                f"{self.folder / str(step)} is damaged, or was not written by jaxpost: its metadata has no manifest. "
                f"If it is this run's, {self._without(step)}; else start in another folder with --run.dir."
            )
        return found

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, Meta]:
        """Read a checkpoint (default: the newest) onto the shardings of `abstract_state`, on any mesh.

        Args:
            abstract_state: arrays or ShapeDtypeStructs with the wanted shapes, dtypes and shardings; what has
                no sharding goes to the first device.

        Raises:
            CheckpointMismatch: another architecture, shape or dtype; names the weights.
            CheckpointError: there is none, or it cannot be read.
        """
        meta = self.meta(step)
        where = self.folder / str(meta["step"])
        check_manifest(meta["manifest"], manifest(abstract_state), where)
        try:
            return self._manager.load(meta["step"], jax.tree.map(_placed, abstract_state)), meta
        except Exception as error:
            advice = self._without(meta["step"])
            raise CheckpointError(
                f"{where} is damaged or unreadable ({_short(error)}). {advice[0].upper()}{advice[1:]}."
            ) from error

    def _without(self, step: int) -> str:
        """What to do about a checkpoint that is of no use."""
        before = [other for other in self.steps if other < step]
        return f"delete that folder to go on from {f'step {before[-1]}' if before else 'the start'}"

    def wait(self) -> None:
        """Block until the save in the background is complete on disk.

        Raises:
            CheckpointError: it failed; earlier checkpoints are intact.
        """
        try:
            self._manager.wait()
        except Exception as error:
            raise self._explained(error) from error

    def close(self) -> None:
        """Finish the save in the background and release the threads."""
        try:
            self._manager.close()
        except Exception as error:
            raise self._explained(error) from error

    def _remove_unfinished(self) -> None:
        # What a crash or a full disk left: never a checkpoint, because a complete one has been renamed.
        if jax.process_index() == 0:
            for path in self.folder.glob(_UNFINISHED):
                shutil.rmtree(path, ignore_errors=True)

    def _close_quietly(self) -> None:
        # An error is already on its way to the user; a second one from here would hide it.
        try:
            self._manager.close()
        except Exception as error:
            logging.getLogger(__name__).warning("%s", self._explained(error))

    def _explained(self, error: BaseException) -> CheckpointError:
        if isinstance(error, CheckpointError):
            return error
        self._remove_unfinished()
        self._manager.reload()
        kept = (
            f"The checkpoint of step {self.latest} is intact" if self.latest is not None else "There is none before it"
        )
        if _disk_full(error):
            return CheckpointError(
                f"The disk of {self.folder} is full, or a limit on it is reached, while saving a checkpoint. {kept}. "
                "Free some space (or set --train.keep-checkpoints lower) and run the same command to resume."
            )
        return CheckpointError(
            f"Saving a checkpoint into {self.folder} failed ({type(error).__name__}: {error}). {kept}."
        )


def _short(error: BaseException) -> str:
    """An error's kind and the beginning of its text: Orbax writes pages."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    return f"{type(error).__name__}: {text if len(text) <= _LETTERS else text[:_LETTERS] + ' ...'}"


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    where = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


class _OwnWords(logging.Filter):
    """Drops Orbax's remarks, what damaged files hold, and tracebacks that its threads log of errors that it raises."""

    def filter(self, record: logging.LogRecord) -> bool:
        damaged = "json parse" in str(record.msg)  # prints the file; `Checkpoints.meta` says what to do
        noise = record.exc_info or damaged or record.levelno <= logging.WARNING
        return not (noise and "orbax" in record.pathname)


def _quiet_orbax() -> None:
    logger = logging.getLogger("absl")
    if not any(isinstance(each, _OwnWords) for each in logger.filters):
        logger.addFilter(_OwnWords())


def versions() -> dict[str, str]:
    """Versions of what determines a checkpoint's meaning."""
    return {"jaxpost": __version__} | {
        name: package_metadata.version(name) for name in ("jax", "optax", "orbax-checkpoint")
    }


def manifest(state: Any) -> dict[str, list[Any]]:
    """Path -> [shape, dtype] of every array of a tree.

    >>> import numpy as np
    >>> manifest({"policy": {"w": np.zeros((2, 3), np.float32)}})
    {'policy/w': [[2, 3], 'float32']}
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): [list(leaf.shape), str(leaf.dtype)]
        for path, leaf in leaves
    }


def check_manifest(saved: Mapping[str, list[Any]], wanted: Mapping[str, list[Any]], where: Path) -> None:
    """Compare a checkpoint's manifest with the state that this run would restore into.

    Raises:
        CheckpointMismatch: names the arrays that are missing, surplus, of another shape or of another dtype.
    """
    problems = [f"{path}: this run has it, the checkpoint does not" for path in wanted if path not in saved]
    problems += [f"{path}: the checkpoint has it, this run does not" for path in saved if path not in wanted]
    for path in (p for p in wanted if p in saved):
        (old_shape, old_dtype), (shape, dtype) = saved[path], wanted[path]
        if list(old_shape) != list(shape):
            problems.append(f"{path}: shape {tuple(old_shape)} in the checkpoint, {tuple(shape)} in this run")
        elif old_dtype != dtype:
            problems.append(f"{path}: dtype {old_dtype} in the checkpoint, {dtype} in this run")
    if problems:
        more = f"\n  ... and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointMismatch(
            f"The checkpoint {where} does not fit this run's model, adapter or optimiser:\n  "
            + "\n  ".join(problems[:_SHOWN])
            + more
            + "\nRestore the old settings, or start a new run with --run.name or --run.dir."
        )


def _disk_full(error: BaseException | None) -> bool:
    if disk.is_full(error):
        return True
    while error is not None:  # tensorstore's word for it; elsewhere it is also an accelerator's full memory
        if "RESOURCE_EXHAUSTED" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
