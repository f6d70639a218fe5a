"""What a run is made of, and what it returns."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from jaxpost.config import RunSection, TrainSection
from jaxpost.metrics.terms import Sums
from jaxpost.train.watch import Alarm
from jaxpost.types import Hyper, Params, TrainState, TrainStep


@runtime_checkable
class Source(Protocol):
    """Batches by index: batch k is a pure function of (seed, k), so that a run's data position is an integer."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever any batch would."""
        ...

    @property
    def num_batches_per_epoch(self) -> int: ...

    def iterate(self, start: int) -> Iterator[Any]:
        """Batches start, start + 1, ... without end: this process's rows, as NumPy arrays."""
        ...


@runtime_checkable
class EvalStep(Protocol):
    """eval_step(params, frozen, batch, key, hyper) -> sums and weights, added over batches and divided once."""

    def __call__(
        self, params: Params, frozen: Params, batch: Any, key: Any, hyper: Hyper
    ) -> Mapping[str, Sums] | tuple[Mapping[str, Sums], Any]: ...


WatchFn = Callable[[dict[str, Any], Mapping[str, Any]], tuple[dict[str, Any], list[Alarm]]]


def token_counts(batch: Any) -> dict[str, Array]:
    """Tokens of a TokenBatch (traced inside the step): all that are no padding, and those that are trained."""
    return {"tokens": jnp.sum(batch.segment_ids > 0), "tokens_trained": jnp.sum(batch.weights > 0)}


def trained_params(state: TrainState) -> Params:
    """The parameters that evaluation reads, where no moving average is kept."""
    return state.params


@dataclass(frozen=True, kw_only=True)
class Job:
    """What both loops need: functions and settings; no names left to look up."""

    folder: Path
    """The run's folder; made if missing, resumed if it is this run's."""
    config_text: str
    """The resolved configuration as YAML; kept in the folder and compared on resume."""
    run: RunSection
    num_steps: int
    step: TrainStep
    """Not jitted. Its metrics are scalars; `skipped` is 1 where it left the state as it was."""
    init_state: Callable[[], TrainState]
    """Makes the first state (loads weights ...); not called when a checkpoint is restored."""
    abstract_state: TrainState
    """ShapeDtypeStructs of the state with their shardings (None: replicated)."""
    frozen: Params = field(default_factory=dict)
    """What the loss reads and nobody trains, already on its devices."""
    hyper: Mapping[str, Any] = field(default_factory=dict)
    """The loss's and the guard's scalars; traced, never compiled in."""
    mesh: Mesh | None = None
    place: Callable[[Any], Any] = jax.device_put
    """This process's rows -> the global batch (`sharding.to_global` bound to a mesh)."""
    eval_params: Callable[[TrainState], Params] = trained_params
    """What evaluation, samples and export read (a moving average, if one is kept)."""
    lr_at: Callable[[int], Any] | None = None
    """Learning rate of update k, for the log."""
    export: Callable[[TrainState, Path], None] | None = None
    """Writes the final model into a folder."""
    count: Callable[[Any], dict[str, Array]] = token_counts
    """Traced: {"tokens", "tokens_trained"} of a batch."""
    flops_per_token: float | None = None
    """Forward and backward; None: utilisation is not reported."""
    identity: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints (base model, tokenizer, data ...) that a resumed run must share."""
    command: tuple[str, ...] = field(default_factory=lambda: tuple(sys.argv))

    @property
    def saving(self) -> tuple[int, int]:
        """Steps between checkpoints (0: only the last), and how many of them stay."""
        raise TypeError(f"{type(self).__name__} does not say when it saves")

    def fingerprints(self) -> dict[str, str]:
        """All that a resumed run must share."""
        return dict(self.identity)


@dataclass(frozen=True, kw_only=True)
class SupervisedJob(Job):
    """Everything that `run_supervised` needs."""

    train: TrainSection
    source: Source
    evals: Mapping[str, Source] = field(default_factory=dict)
    eval_step: EvalStep | None = None
    sample: Callable[[Params, Params], list[dict[str, str]]] | None = None
    """sample(eval_params, frozen) -> [{"prompt", "text"}], deterministic."""
    examine: Callable[[str, Sequence[Any]], Mapping[str, float]] | None = None
    """examine(name of an evaluation source, what was kept of each of its batches) -> further numbers of it, beside the
    loss's. With it `eval_step` returns (sums, what is kept), the rows of all processes."""
    watch: WatchFn | None = None
    """(state, record) -> the new state and the alarms that the record raises; the state survives JSON."""

    @property
    def saving(self) -> tuple[int, int]:
        return self.train.save_every, self.train.keep_checkpoints

    def fingerprints(self) -> dict[str, str]:
        data = {"data": self.source.fingerprint}
        return {**self.identity, **data, **{f"eval {name}": s.fingerprint for name, s in self.evals.items()}}


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    folder: Path
    step: int
    """Updates done, over all attempts."""
    state: TrainState
    metrics: dict[str, float]
    """Of the last evaluation, e.g. {"eval/loss": 1.2}, and "best/..." of the best one."""
    stopped: str | None = None
    """The signal that ended it early, "SIGTERM" or "SIGINT"; None: it ran to the end."""

    @property
    def exit_code(self) -> int:
        """What a shell expects: 0, or 128 + the signal's number."""
        return {"SIGTERM": 143, "SIGINT": 130}.get(self.stopped or "", 0)
