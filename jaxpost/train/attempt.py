"""One attempt at a job, from its first state or its last checkpoint: what both loops share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Generic, NamedTuple, TypeVar

import jax

from jaxpost.checkpoint import Checkpoints
from jaxpost.metrics.writers import JsonlFile, Writer, open_writers
from jaxpost.ops import platform
from jaxpost.train.compiled import CompiledStep, state_shardings, with_shardings
from jaxpost.train.folder import RunFolder, RunFolderError, open_folder
from jaxpost.train.guards import StopSignals, TrainingStopped
from jaxpost.train.job import Job, RunResult
from jaxpost.train.meters import Meter, peak_flops
from jaxpost.train.position import Position, check_same_run
from jaxpost.train.progress import Progress
from jaxpost.train.report import before_and_after, describe_run, plain_config
from jaxpost.types import TrainState

J = TypeVar("J", bound=Job)


class Opened(NamedTuple):
    """What an attempt holds while it lasts."""

    folder: RunFolder
    progress: Progress
    signals: StopSignals
    checkpoints: Checkpoints


@contextmanager
def opened(job: Job) -> Iterator[Opened]:
    """Opens a job's folder, console, signals and checkpoints, and closes them whatever happens."""
    with ExitStack() as stack:
        folder = stack.enter_context(
            open_folder(
                job.folder,
                config_text=job.config_text,
                resume=job.run.resume,
                allow_changed_config=job.run.allow_changed_config,
            )
        )
        if job.mesh is not None:
            stack.enter_context(jax.set_mesh(job.mesh))
        progress = Progress(job.num_steps, log=folder.path / "log.txt", enabled=folder.writes)
        stack.callback(progress.close)
        signals = stack.enter_context(StopSignals())
        checkpoints = stack.enter_context(
            Checkpoints(folder.checkpoints, keep=job.saving[1], background=platform.current() != "cpu")
        )
        yield Opened(folder, progress, signals, checkpoints)


class Attempt(Generic[J]):
    """State, position, files and checkpoints of a run; a loop adds what a step is."""

    unit: str = "update"
    """What a step of the loop is called."""
    files_kept: tuple[str, ...] = ("metrics.jsonl", "samples.jsonl")
    """Files that grow with the run and that a resumed run cuts back."""

    def __init__(self, job: J, held: Opened) -> None:
        self.job, self.folder, self.progress = job, held.folder, held.progress
        self.signals, self.checkpoints = held.signals, held.checkpoints
        self.alone = jax.process_count() == 1
        self.state, self.position = self._start()
        files = self.position.files
        self.files = {
            name: JsonlFile(self.folder.path / name, files.get(name, 0))
            for name in self.files_kept
            if self.folder.writes
        }
        self.writers: list[Writer] = []
        if self.folder.writes:
            config = plain_config(job.config_text)
            self.writers = open_writers(
                job.run.loggers, self.folder.path, name=job.run.name, config=config, start_step=self.position.step
            )
        self.folder.record_start(job.command, self.position.step)
        self.step = CompiledStep(job)
        self.devices = list(job.mesh.devices.flat) if job.mesh is not None else jax.devices()[:1]
        peak = peak_flops(self.devices) if job.flops_per_token else None
        self.meter = Meter(flops_per_token=job.flops_per_token, peak=peak)
        self.saved: int | None = self.checkpoints.latest
        self.asked_to_stop = False
        self.started_at = self.position.step

    def run(self) -> RunResult:
        """Train, and leave the folder readable whatever happens."""
        try:
            return self.train()
        except TrainingStopped as error:
            self.progress.note(str(error))
            status = f"Stopped at step {self.position.step}: {error}"
            describe_run(self.job, self.folder, status, self.position.results)
            raise
        finally:
            self.close()

    def train(self) -> RunResult:
        """The loop."""
        raise TypeError(f"{type(self).__name__} has no loop; define train()")

    def _start(self) -> tuple[TrainState, Position]:
        job, latest = self.job, self.checkpoints.latest
        identity = job.fingerprints()
        if latest is None:
            if job.run.resume == "must":
                raise RunFolderError(f"--run.resume must: there is no complete checkpoint in {self.folder.path}.")
            state = jax.device_put(job.init_state(), state_shardings(job.abstract_state, job.mesh))
            return state, Position(identity=identity, config=job.config_text)
        check_same_run(
            self.checkpoints.meta(),
            identity=identity,
            config_text=job.config_text,
            allow_changed=job.run.allow_changed_config,
        )
        self.progress.busy(f"restoring step {latest} ...")
        state, meta = self.checkpoints.restore(with_shardings(job.abstract_state, job.mesh))
        self.progress.say(f"Resumed from the checkpoint of step {latest}")
        return state, Position.from_meta(meta, identity=identity, config=job.config_text)

    def interrupted(self) -> bool:
        """Alone, a signal acts at once; with others, only through the step, so that all stop at the same update."""
        return self.alone and self.signals.received is not None

    def save_due(self, stopping: bool, finished: bool) -> bool:
        """Whether this step leaves a checkpoint."""
        every = self.job.saving[0]
        return stopping or finished or (every > 0 and self.position.step % every == 0)

    def write(self, record: Mapping[str, Any]) -> None:
        """Log one record of metrics."""
        if self.files:
            self.files["metrics.jsonl"].write(record)
        for writer in self.writers:
            writer.write(record)

    def save(self) -> None:
        """Checkpoint everything up to here."""
        if self.position.step in (0, self.saved):
            return
        with self.meter.pause():
            self.progress.busy("saving a checkpoint ...")
            for name, file in self.files.items():
                self.position.files[name] = file.sync()
            self.checkpoints.save(self.position.step, self.state, self.position.to_meta())
            self.describe()
        self.saved = self.position.step

    def finish(self, stopped: str | None) -> RunResult:
        """Export, say how it ended, and return it."""
        job, position = self.job, self.position
        if stopped is None:
            self._export()
            for line in before_and_after(self.folder.path) if self.folder.writes else ():
                self.progress.say(line)
            text = f"Finished {position.step} {self.unit}s; everything is in {self.folder.path}"
        elif position.step:
            text = (
                f"Stopped by {stopped} after {self.unit} {position.step} of {job.num_steps}; everything is saved. "
                "Run the same command again to go on from here."
            )
        else:
            text = f"Stopped by {stopped} before the first {self.unit}. Run the same command again to start."
        self.progress.say(text)
        self.describe(text)
        return RunResult(self.folder.path, position.step, self.state, position.results, stopped)

    def _export(self) -> None:
        # Under another name until it is whole; made again if this attempt trained further.
        job, final = self.job, self.folder.export
        if job.export is None or (final.exists() and self.started_at == self.position.step):
            return
        self.progress.busy("exporting the model ...")
        unfinished = final.with_name("export.unfinished")
        if self.folder.writes:
            shutil.rmtree(unfinished, ignore_errors=True)
        job.export(self.state, unfinished)
        if self.folder.writes:
            shutil.rmtree(final, ignore_errors=True)
            unfinished.rename(final)

    def describe(self, status: str | None = None) -> None:
        """Write README.md and curves for how far the run has come."""
        status = status or f"At {self.unit} {self.position.step} of {self.job.num_steps}."
        describe_run(self.job, self.folder, status, self.position.results)

    def close(self) -> None:
        """Close files and loggers."""
        for file in (*self.files.values(), *self.writers):
            file.close()
