"""The online loop: batches come from the policy's own samples; it knows nothing of the method that learns from them.

Step k: draw samples of the next problems, score them on the host, compute their advantages, and make one or several
updates. A checkpoint holds everything up to its step: the state, the problem cursor, the loop's own numbers and samples
that wait for the next step, so a run killed at any moment ends as one that was not.

With `rollout.overlap` the samples of step k + 1 are drawn with the policy before step k's updates, while step k's
rewards are being computed; which sample belongs to which step never depends on what was ready first.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jaxpost.rl.episodes import Episode, Problem, from_json, to_json
from jaxpost.train.attempt import Attempt, Opened, opened
from jaxpost.train.collect import Step, collect, draw_round
from jaxpost.train.guards import check_step
from jaxpost.train.job import RunResult
from jaxpost.train.learn import Learner, Numbers, Outcome
from jaxpost.train.meters import peak_memory_gib
from jaxpost.train.online_eval import evaluate
from jaxpost.train.online_job import OnlineJob
from jaxpost.train.online_log import Window, sample_records, step_metrics
from jaxpost.train.progress import duration
from jaxpost.train.watch import watch

__all__ = ["OnlineJob", "run_online"]

_SHOWN_FAULTS = 3


def run_online(job: OnlineJob) -> RunResult:
    """Train to the end, or to a signal; go on from the last checkpoint if the folder holds one.

    Every process of a multi-host run calls it with the same job; process 0 writes.

    Returns:
        The final state and how the run ended. On SIGTERM or SIGINT a checkpoint is saved first.

    Raises:
        RunFolderError, CheckpointError, TrainingStopped: as `run_supervised`.
        ValueError: a problem that does not fit the rows or the model's context; says what to change.
    """
    with opened(job) as held:
        return _OnlineRun(job, held).run()


class _OnlineRun(Attempt[OnlineJob]):
    """One attempt at an online job."""

    unit = "step"
    files_kept = ("metrics.jsonl", "samples.jsonl", "alarms.jsonl")

    def __init__(self, job: OnlineJob, held: Opened) -> None:
        super().__init__(job, held)
        loop = self.position.loop
        self.cursor: int = loop.get("cursor", 0)
        self.numbers = Numbers.of(loop.get("numbers", {}), job)
        self.window = Window.of(loop.get("window", {}))
        self.watch: dict[str, Any] = loop.get("watch", {})
        self.waiting: tuple[list[Problem], list[Episode]] | None = None
        if "waiting" in loop:
            self.waiting = from_json(loop["waiting"], job.problem)
        self.faults: Counter[str] = Counter()
        """Of each reward, since this start."""
        self.learner = Learner(job, self.step)
        self.scoring = ThreadPoolExecutor(1, "rewards")
        kinds = f"{len(self.devices)} x {self.devices[0].device_kind}"
        each = f"{job.rollout.prompts} problems x {job.rollout.samples} samples a step"
        steps = f"steps {self.started_at} to {job.num_steps}"
        self.progress.say(f"{job.run.name}: {steps}, {each}, on {kinds}, in {self.folder.path}")

    def train(self) -> RunResult:
        """The loop of the module's description."""
        while True:
            if self._evaluation_due():
                self._evaluate()
            finished = self._ended() and not self._evaluation_due()
            stopping = not finished and (self.asked_to_stop or self.interrupted())
            if self.save_due(stopping, finished):
                self._keep()
                self.save()
            if stopping or finished:
                break
            self._iterate()
        self.checkpoints.wait()
        self._sum_up()
        return self.finish((self.signals.received or "SIGTERM") if stopping else None)

    def _ended(self) -> bool:
        """Whether all steps are done, or all samples drawn; samples that wait for their step do not count."""
        job = self.job
        waiting = len(self.waiting[0]) if self.waiting is not None else 0
        drawn = (self.cursor - waiting) * job.rollout.samples
        return self.position.step >= job.num_steps or drawn >= (job.train.samples or math.inf)

    def _iterate(self) -> None:
        """One step: samples, rewards, updates."""
        job, step, began = self.job, self.position.step, time.perf_counter()
        times: dict[str, float] = {}
        with self._timed(times, "rollout"):
            now = self.waiting if self.waiting is not None else self._draw(step)
        self.waiting = None
        scored = None
        if job.rollout.overlap and step + 1 < job.num_steps:
            # Among several processes a thread's collectives could meet the sampler's in another order.
            scored = self.scoring.submit(self._score, *now) if self.alone else None
            with self._timed(times, "rollout"):
                self.waiting = self._draw(step + 1)
        with self._timed(times, "reward"):
            columns = self._score(*now) if scored is None else scored.result()
        found = collect(job, now, columns, lambda number: self._refill(step, number, times))
        job.forget()
        self.progress.busy("learning ..." if self.step.compiled else "compiling the training step ...")
        outcome = self.learner.learn(self.state, found, self.numbers, step, self.signals.received is not None)
        self._tell(found)
        self.state, before, self.numbers = outcome.state, self.numbers, outcome.numbers
        times |= outcome.times
        self.position.step += 1
        self.asked_to_stop |= outcome.halt
        self._log(found, outcome, before.updates, times, time.perf_counter() - began)
        for number, metrics in enumerate(outcome.updates, before.updates + 1):
            self.position.skips = check_step(metrics, number, self.position.skips, job.train.guard)

    def _draw(self, step: int, round_: int = 0) -> tuple[list[Problem], list[Episode]]:
        """Samples of the next problems."""
        job = self.job
        self.progress.busy(f"sampling for step {step + 1} ..." + (f" (again, {round_})" if round_ else ""))
        problems = [job.problem(self.cursor + i) for i in range(job.rollout.prompts)]
        self.cursor += len(problems)
        return problems, draw_round(job, self.state.params, problems, step, self.numbers.updates)

    def _score(self, problems: list[Problem], episodes: list[Episode]) -> Any:
        return self.job.score([problems[e.problem].example for e in episodes], episodes)

    def _refill(self, step: int, number: int, times: dict[str, float]) -> Any:
        """One more round of samples with their rewards, for groups that carry no signal."""
        with self._timed(times, "rollout"):
            problems, episodes = self._draw(step, number)
        with self._timed(times, "reward"):
            return (problems, episodes), self._score(problems, episodes)

    def _tell(self, found: Step) -> None:
        """Say which rewards failed, the first few times."""
        for problem in found.faults:
            name = problem.partition(" left row ")[0]  # a reward that fails often must not hide another's first fault
            self.faults[name] += 1
            if self.faults[name] <= _SHOWN_FAULTS or self.faults.total() % 100 == 0:
                self.progress.say(f"step {self.position.step + 1}: {problem} ({self.faults.total()} in all)")

    def _sum_up(self) -> None:
        """Say at the end how much failed: only the first faults were told."""
        if self.faults:
            each = ", ".join(f"{name}: {count}" for name, count in sorted(self.faults.items()))
            self.progress.say(f"Rewards failed {self.faults.total()} times since the start ({each}).")

    def _log(self, found: Step, outcome: Outcome, version: int, times: dict[str, float], seconds: float) -> None:
        job, position, updates = self.job, self.position, outcome.updates
        metrics = step_metrics(found, updates, version)
        self.numbers = self.numbers.after(job, found, metrics)
        tokens = sum(int(u.get("tokens", 0)) for u in updates)
        trained = sum(int(u.get("tokens_trained", 0)) for u in updates)
        position.tokens, position.tokens_trained = position.tokens + tokens, position.tokens_trained + trained
        position.skipped += sum(int(u.get("skipped", 0)) for u in updates)
        self.window.add(metrics, times | {"seconds": seconds})
        self.meter.add(ended=time.perf_counter(), waited=0.0, tokens=tokens, trained=trained)
        if self.files and (position.step - 1) % job.train.sample_every == 0:
            for record in sample_records(position.step, found, outcome.credit, job.rollout.samples):
                self.files["samples.jsonl"].write(record)
        if position.step % max(job.train.log_every, 1) == 0 or self._ended():
            self._write_window()

    def _write_window(self) -> None:
        position, job = self.position, self.job
        means, times = self.window.close()
        record: dict[str, Any] = {"step": position.step, "kind": "train", **means}
        record |= self.numbers.logged(job) | {"problems": self.cursor, "tokens_trained": position.tokens_trained}
        if job.lr_at is not None:
            record["lr"] = float(job.lr_at(job.planned(position.step) - 1))
        record["time"] = {name: round(value, 4) for name, value in times.items()} | {
            "compile_seconds": round(self.step.compile_seconds, 3),
            "peak_memory_gib": round(peak_memory_gib(self.devices), 3),
        }
        self.write(record)
        self._warn(record)
        left = self.meter.seconds_per_update * (job.num_steps - position.step)
        shown = {name: record[name] for name in ("reward", "answer_tokens", "entropy") if name in record}
        self.progress.update({"step": position.step, **shown, "time": record["time"]}, left)

    def _warn(self, record: dict[str, Any]) -> None:
        """Raise the alarms that a record calls for."""
        gold = self.job.evals[0].section.name if self.job.evals else None
        if not self.job.equal_alarm:
            record = {name: value for name, value in record.items() if name != "zero_variance_groups"}
        self.watch, alarms = watch(self.watch, record, limits=self.job.train.watch, gold=gold)
        for alarm in alarms:
            self.progress.say(f"ALARM at step {alarm.step}, {alarm.alarm}: {alarm.message}")
            if self.files:
                self.files["alarms.jsonl"].write(alarm._asdict())

    def _evaluation_due(self) -> bool:
        job, step = self.job, self.position.step
        if self.position.evaluated == step or not job.evals:
            return False
        return step == 0 or self._ended() or (job.train.eval_every > 0 and step % job.train.eval_every == 0)

    def _evaluate(self) -> None:
        """Answer and judge the held-out problems; a signal gives it up, to be done again on resume."""
        job, position, start = self.job, self.position, time.perf_counter()
        ends = position.step == 0 or self._ended()
        record: dict[str, Any] = {"step": position.step, "kind": "eval"}
        samples: list[dict[str, Any]] = []
        params = job.eval_params(self.state)
        with self.meter.pause():
            for each in job.evals:
                if each.section.when == "ends" and not ends:
                    continue
                if self.interrupted():
                    return
                self.progress.busy(f"evaluating {each.section.name} ({len(each.problems)} problems) ...")
                result = evaluate(job, each, params, self.numbers.updates)
                record |= result.metrics
                samples += [{"step": position.step, "kind": "eval", **s} for s in result.samples]
                head = f"step {position.step:>{len(str(job.num_steps))}}/{job.num_steps}"
                self.progress.say(f"{head}  {result.line}")
            job.forget()
        self.write(record | {"time": {"seconds": round(time.perf_counter() - start, 3)}})
        self._warn(record)
        for sample in samples if self.files else ():
            self.files["samples.jsonl"].write(sample)
        numbers = {name: value for name, value in record.items() if name not in ("step", "kind")}
        position.results |= {f"eval/{name}": float(value) for name, value in numbers.items()}
        position.evaluated = position.step
        self.progress.say(f"evaluated in {duration(time.perf_counter() - start)}")
        self.describe()

    def _keep(self) -> None:
        """What a checkpoint says of the loop."""
        loop = {
            "cursor": self.cursor,
            "numbers": self.numbers.to_json(),
            "window": self.window.to_json(),
            "watch": self.watch,
        }
        if self.waiting is not None:
            loop["waiting"] = to_json(*self.waiting)
        self.position.loop = loop

    def _timed(self, times: dict[str, float], name: str) -> Any:
        return _Timed(times, name)

    def close(self) -> None:
        """Close files, loggers, and the thread and processes that score."""
        try:
            self.scoring.shutdown(wait=True, cancel_futures=True)
            self.job.close()
        finally:
            super().close()


class _Timed:
    """Adds the seconds of a block to a table."""

    def __init__(self, times: dict[str, float], name: str):
        self.times, self.name = times, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.times[self.name] = self.times.get(self.name, 0.0) + time.perf_counter() - self.start
