"""The supervised loop: batches come from data; it knows nothing of the method that learns from them.

At the top of the loop `k` updates are done: evaluate if due, save if due, then dispatch update k + 1 and, while it
runs, read the metrics of update k. A checkpoint thus holds everything up to its step: the state, the data position
(the integer k), and the lengths of metrics.jsonl and samples.jsonl, which a resumed run cuts back to. That is why
a run killed at any moment ends with the same parameters, metrics and samples as one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax

from jaxpost.metrics.terms import Sums, add, to_host
from jaxpost.train.attempt import Attempt, Opened, opened
from jaxpost.train.compiled import CompiledEval
from jaxpost.train.guards import ALIKE, TrainingStopped, check_step
from jaxpost.train.job import EvalStep, RunResult, Source, SupervisedJob
from jaxpost.train.meters import peak_memory_gib
from jaxpost.train.progress import duration
from jaxpost.train.report import one_line

__all__ = ["EvalStep", "RunResult", "Source", "SupervisedJob", "run_supervised"]

_FIRST_SKIPS = 5
"""Skipped updates that get a line of their own; after them, every hundredth."""


def run_supervised(job: SupervisedJob) -> RunResult:
    """Train to the end, or to a signal; go on from the last checkpoint if the folder holds one.

    Every process of a multi-host run calls it with the same job (but for its own rows); process 0 writes.

    Returns:
        The final state and how the run ended. On SIGTERM or SIGINT a checkpoint is saved first.

    Raises:
        RunFolderError: the folder cannot be used (another run's, another configuration, in use).
        CheckpointError: a checkpoint cannot be written or read, or does not fit (CheckpointMismatch).
        TrainingStopped: updates went wrong; says at which step, why, and what to do.
        ShapeChanged: a batch of other shapes than the first.
    """
    if job.evals and job.eval_step is None:
        raise ValueError("The job has evaluation data but no eval_step.")
    with opened(job) as held:
        return _Run(job, held).run()


class _Pending(NamedTuple):
    """An update whose metrics are still on the device."""

    step: int
    metrics: dict[str, Any]
    waited: float
    ended: float | None


class _Run(Attempt[SupervisedJob]):
    """One attempt at a supervised job."""

    def __init__(self, job: SupervisedJob, held: Opened) -> None:
        if job.watch is not None:
            self.files_kept = (*self.files_kept, "alarms.jsonl")
        super().__init__(job, held)
        self.eval_steps = {name: CompiledEval(job, name) for name in job.evals}
        self.pending: _Pending | None = None
        kinds = f"{len(self.devices)} x {self.devices[0].device_kind}"
        updates = f"updates {self.started_at} to {job.num_steps}"
        self.progress.say(f"{job.run.name}: {updates} on {kinds}, in {self.folder.path}")

    def train(self) -> RunResult:
        """The loop of the module's description."""
        job, position = self.job, self.position
        batches: Iterator[Any] | None = None
        try:
            while True:
                if self._evaluation_due():
                    self._drain()
                    self._evaluate()
                finished = position.step >= job.num_steps and not self._evaluation_due()
                stopping = not finished and (self.asked_to_stop or self.interrupted())
                if self.save_due(stopping, finished):
                    self._drain()
                    self.save()
                if stopping or finished:
                    break
                if batches is None:
                    batches = job.source.iterate(position.step)
                self._update(batches)
        finally:
            if (close := getattr(batches, "close", None)) is not None:
                close()
        self.checkpoints.wait()
        return self.finish((self.signals.received or "SIGTERM") if stopping else None)

    def _update(self, batches: Iterator[Any]) -> None:
        start = time.perf_counter()
        batch = next(batches, None)
        waited = time.perf_counter() - start
        if batch is None:
            raise ValueError(
                f"The training data ended after batch {self.position.step}; sources must go on without end."
            )
        if not self.step.compiled:
            with self.meter.pause():
                self.progress.busy("compiling the training step ...")
                self.step.compile(self.state, batch)
            self.progress.say(f"Compiled the training step in {duration(self.step.compile_seconds)}")
        wish = self.signals.received is not None
        self.state, metrics = self.step(self.state, batch, self.position.step, wish)
        self.position.step += 1
        # Some backends compute within the call; there, the update has ended already.
        ended = time.perf_counter() if all(x.is_ready() for x in metrics.values()) else None
        previous, self.pending = self.pending, _Pending(self.position.step, metrics, waited, ended)
        if previous is not None:
            self._read(previous)

    def _drain(self) -> None:
        previous, self.pending = self.pending, None
        if previous is not None:
            self._read(previous)

    def _read(self, update: _Pending) -> None:
        """Take in the metrics of an update, which blocks until the device has them."""
        job, position, step = self.job, self.position, update.step
        metrics = {name: float(value) for name, value in jax.device_get(update.metrics).items()}
        self.asked_to_stop |= metrics.pop("halt") > 0
        tokens, trained = int(metrics.pop("tokens")), int(metrics.pop("tokens_trained"))
        ended = time.perf_counter() if update.ended is None else update.ended
        self.meter.add(ended=ended, waited=update.waited, tokens=tokens, trained=trained)
        lr = None if job.lr_at is None else float(job.lr_at(step - 1))
        position.add(metrics, tokens=tokens, trained=trained)
        try:
            position.skips = check_step(metrics, step, position.skips, job.train.guard, trained=trained)
        except TrainingStopped:
            self._log(step, lr)
            raise
        if position.skips and (position.skipped <= _FIRST_SKIPS or position.skipped % 100 == 0):
            shown = ", ".join(f"{name} {metrics[name]:.4g}" for name in ("loss", "grad_norm") if name in metrics)
            shown = ALIKE if metrics.get("empty") else shown
            self.progress.say(f"Skipped update {step} ({shown}); {position.skips} in a row, {position.skipped} in all")
        if step % max(job.train.log_every, 1) == 0 or step == job.num_steps:
            self._log(step, lr)

    def _log(self, step: int, lr: float | None) -> None:
        record: dict[str, Any] = {"step": step, "kind": "train", **self.position.close_window()}
        if lr is not None:
            record["lr"] = lr
        record["time"] = self.meter.read() | {
            "compile_seconds": round(self.step.compile_seconds, 3),
            "peak_memory_gib": round(peak_memory_gib(self.devices), 3),
        }
        self.write(record)
        self._watch(record)
        self.progress.update(record, self.meter.seconds_per_update * (self.job.num_steps - step))

    def _watch(self, record: dict[str, Any]) -> None:
        """Raise the alarms that a record calls for."""
        if self.job.watch is None:
            return
        loop = self.position.loop
        loop["watch"], alarms = self.job.watch(loop.get("watch", {}), record)
        for alarm in alarms:
            self.progress.say(f"ALARM at step {alarm.step}, {alarm.alarm}: {alarm.message}")
            if self.files:
                self.files["alarms.jsonl"].write(alarm._asdict())

    def _evaluation_due(self) -> bool:
        job, step = self.job, self.position.step
        if self.position.evaluated == step or not (job.evals or job.sample):
            return False
        return step in (0, job.num_steps) or (job.train.eval_every > 0 and step % job.train.eval_every == 0)

    def _evaluate(self) -> None:
        """Evaluate every source and draw samples; a signal gives it up, to be done again on resume."""
        start = time.perf_counter()
        job, position = self.job, self.position
        with self.meter.pause():
            params = job.eval_params(self.state)
            record: dict[str, Any] = {"step": position.step, "kind": "eval"}
            for name, source in job.evals.items():
                means = self._evaluate_source(name, source, params)
                if means is None:
                    return
                record |= means if len(job.evals) == 1 else {f"{name}/{k}": v for k, v in means.items()}
            samples = job.sample(params, job.frozen) if job.sample is not None else []
            if self.interrupted():
                return
            self._record_evaluation(record, samples, time.perf_counter() - start)

    def _record_evaluation(self, record: dict[str, Any], samples: list[dict[str, str]], seconds: float) -> None:
        job, position = self.job, self.position
        if job.evals:
            position.keep_best(record)
            self.write(record | {"time": {"seconds": round(seconds, 3)}})
            best = position.results
            losses = [
                f"{name} {value:.4f}" + (f" (best {best[f'best/{name}']:.4f})" if f"best/{name}" in best else "")
                for name, value in record.items()
                if (name == "loss" or name.endswith("/loss")) and not name.startswith("best/")
            ]
            head = f"step {position.step:>{len(str(job.num_steps))}}/{job.num_steps}  held out: "
            self.progress.say(f"{head}{', '.join(losses)}  in {duration(seconds)}")
        for sample in samples:
            self.progress.say(f"  > {one_line(sample['prompt'])}\n    {one_line(sample['text'])}")
            if self.files:
                self.files["samples.jsonl"].write({"step": position.step, **sample})
        position.evaluated = position.step
        self.describe()

    def _evaluate_source(self, name: str, source: Source, params: Any) -> dict[str, float] | None:
        count = source.num_batches_per_epoch
        if self.job.train.eval_batches is not None:
            count = min(count, self.job.train.eval_batches)
        totals: dict[str, Sums] = {}
        kept: list[Any] = []
        pending: tuple[Mapping[str, Sums], Any] | None = None
        batches = source.iterate(0)
        for index in range(count):
            if self.interrupted():
                return None
            self.progress.busy(f"evaluating {name} {index + 1}/{count} ...")
            # One batch is computed while the one before it is added up.
            previous, pending = pending, self.eval_steps[name](params, next(batches))
            totals = _added(totals, previous, kept)
        if (close := getattr(batches, "close", None)) is not None:
            close()
        means = _means(_added(totals, pending, kept))
        return means if self.job.examine is None else {**means, **self.job.examine(name, kept)}


def _added(
    totals: Mapping[str, Sums], found: tuple[Mapping[str, Sums], Any] | None, kept: list[Any]
) -> dict[str, Sums]:
    """The sums with a batch's, once the device has them; what is kept of the batch goes into `kept`."""
    if found is None:
        return dict(totals)
    new = to_host(found[0])
    kept.append(jax.device_get(found[1]))
    return dict(add(totals, new) if totals else new)


def _means(totals: Mapping[str, Sums]) -> dict[str, float]:
    """Means in float64, and "loss" = sum of coef * mean over terms with weight.

    Without any weight a term of the loss is NaN, as is a loss of such terms: nothing was seen. Other numbers are 0.
    """
    none = {name: math.nan if s.coef else 0.0 for name, s in totals.items()}
    out = {name: float(s.total / s.weight) if s.weight else none[name] for name, s in totals.items()}
    terms = [name for name, s in totals.items() if s.coef]
    seen = [float(totals[name].coef) * out[name] for name in terms if totals[name].weight]
    return {"loss": math.fsum(seen) if seen or not terms else math.nan} | out
