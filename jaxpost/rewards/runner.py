"""Rewards in worker processes, with a time limit for each row: what raises, hangs or gives no number is told."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from jaxpost.rewards.combine import Combined, evaluate, leaves
from jaxpost.rewards.contract import Completion, Example, RewardFn, Rewards, Sample, name_of
from jaxpost.rewards.scored import OffPool

START_SECONDS = 120.0
"""For a worker to start and to load users' files."""
STARTS = 3
"""Workers that may fail to start in one call before it is an error."""
MAX_REWARD = 1e15
"""A reward beyond it, up or down, is a fault: its square would leave float32, and with it its whole group."""


class Problem(NamedTuple):
    """Why a row has no score from one reward."""

    reward: str
    row: int
    reason: str

    def __str__(self) -> str:
        return f"reward {self.reward!r} left row {self.row} unscored: {self.reason}"


class Scored(NamedTuple):
    """Columns of all rows, NaN where unscored, and a sentence for each fault."""

    rewards: Rewards
    problems: tuple[Problem, ...]


class Task(NamedTuple):
    """One row for one reward."""

    reward: int
    row: int


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    deadline: float
    """On the monotonic clock; infinite while it is idle."""
    ready: bool = False
    task: Task | None = None

    def kill(self) -> None:
        """Ends the process and all that it started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()


@dataclass
class _Board:
    """What is known of one call's rows."""

    found: dict[Task, dict[str, float]] = field(default_factory=dict)
    problems: list[tuple[Task, str, str]] = field(default_factory=list)
    queue: deque[Task] = field(default_factory=deque)
    again: set[Task] = field(default_factory=set)
    """Rows whose worker ended under them: they get one more."""
    failed_starts: int = 0


class Pool:
    """Scores completions with one reward or a combination, in processes that are killed when a row takes too long.

    Every simple reward inside a combination runs row by row on its own: if it raises, hangs or gives no number from
    -MAX_REWARD to MAX_REWARD for a row, that row is NaN in its columns and in what is combined of them, a `Problem`
    tells why, and everything else goes on.
    It may be used from any thread (calls wait for one another); workers are fresh processes, so neither jax nor the
    caller's main module is imported in them. Rewards must be importable objects: dataclasses of a module, functions,
    `FromFile`.

    Args:
      workers: processes; they start with the first call and stay until `close`.
      seconds: for one row of one simple reward.

    Raises:
      ValueError: limits that are not positive, two simple rewards of one name, or a reward's file that cannot be loaded
        (at the first call).
    """

    def __init__(self, reward: RewardFn, *, workers: int = 2, seconds: float = 5.0):
        if workers < 1 or seconds <= 0:
            raise ValueError(f"workers = {workers} and seconds = {seconds} must be positive")
        self.reward, self.workers, self.seconds = reward, workers, seconds
        every = _distinct(leaves(reward))
        names = [name_of(leaf) for leaf in every]
        if len(set(names)) < len(names):
            raise ValueError(f"rewards need different names, not {', '.join(names)}")
        self._leaves = [leaf for leaf in every if not isinstance(leaf, OffPool)]
        self._names = [name_of(leaf) for leaf in self._leaves]
        self._pool: list[_Worker] = []
        self._lock = threading.Lock()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers; a later call starts new ones."""
        with self._lock:
            self._end()

    def __call__(
        self,
        examples: Sequence[Example],
        completions: Sequence[Completion],
        *,
        known: Mapping[OffPool, Rewards] = MappingProxyType({}),
    ) -> Scored:
        """Scores N completions; examples[i] is the row that completions[i] answers.

        Args:
          known: columns of the rewards that models compute.
        """
        if len(examples) != len(completions):
            raise ValueError(f"{len(examples)} examples for {len(completions)} completions")
        rows = [
            (dict(e), Sample(c.text, tuple(c.tokens), c.finish)) for e, c in zip(examples, completions, strict=True)
        ]
        tasks = [Task(reward, row) for row in range(len(rows)) for reward in range(len(self._leaves))]
        with self._lock:
            try:
                board = self._run(rows, tasks)
            except BaseException:
                self._end()  # rows are still under way: their answers must not reach the next call
                raise
        columns = [self._columns(number, len(rows), board) for number in range(len(self._leaves))]
        problems = sorted(Problem(name, task.row, reason) for task, name, reason in board.problems)
        found = lambda leaf: known[leaf] if isinstance(leaf, OffPool) else columns[self._leaves.index(leaf)]  # noqa: E731
        rewards = evaluate(self.reward, found)
        name, score = next(iter(rewards.items()))
        if isinstance(self.reward, Combined) and np.any(wild := np.abs(score) > MAX_REWARD):
            problems += [Problem(name, int(row), f"it came to {score[row]}") for row in np.flatnonzero(wild)]
            rewards[name] = np.where(wild, np.nan, score)
        return Scored(rewards, tuple(problems))

    def _columns(self, number: int, count: int, board: _Board) -> Rewards:
        """A simple reward's columns; names in the order of their first appearance."""
        found = {row: board.found[Task(number, row)] for row in range(count) if Task(number, row) in board.found}
        names = list(dict.fromkeys(name for scores in found.values() for name in scores)) or [self._names[number]]
        out = {name: np.full(count, np.nan) for name in names}
        for row, scores in found.items():
            for name, column in out.items():
                column[row] = scores.get(name, np.nan)
                if not abs(column[row]) <= MAX_REWARD:
                    reason = (
                        f"it gave {column[row]}" if name in scores else f"it gave no {name!r}, as it does elsewhere"
                    )
                    board.problems.append((Task(number, row), name, reason))
                    column[row] = np.nan
        return out

    def _run(self, rows: list[tuple[dict[str, Any], Sample]], tasks: list[Task]) -> _Board:
        """Hands tasks to idle workers until every one is settled."""
        board = _Board(queue=deque(tasks))
        queue = board.queue
        for worker in [worker for worker in self._pool if worker.process.poll() is not None]:
            worker.kill()  # ended since the last call, which is no row's fault
            self._pool.remove(worker)
        while queue or any(worker.task for worker in self._pool):
            while len(self._pool) < min(self.workers, len(queue) + sum(w.task is not None for w in self._pool)):
                self._pool.append(self._start())
            for worker in self._pool:
                if worker.ready and worker.task is None and queue:
                    self._send(worker, queue.popleft(), rows)
            busy = [worker for worker in self._pool if worker.task is not None or not worker.ready]
            soonest = min((worker.deadline for worker in busy), default=time.monotonic())
            heard = wait([worker.connection for worker in busy], max(0.0, soonest - time.monotonic()))
            for worker in busy:
                if worker.connection in heard:
                    self._hear(worker, board)
                elif time.monotonic() >= worker.deadline:
                    self._drop(worker, board, f"it took longer than {self.seconds:g} s")
        return board

    def _start(self) -> _Worker:
        ours, theirs = socket.socketpair()
        path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), *sys.path]))
        process = subprocess.Popen(
            [sys.executable, "-m", "jaxpost.rewards.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=2,  # what a reward prints must not mix with the caller's output
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )
        theirs.close()
        connection = Connection(ours.detach())
        worker = _Worker(process, connection, time.monotonic() + START_SECONDS)
        try:
            connection.send((self._leaves, self.seconds))
        except ConnectionError:
            pass  # it died at once, which is noticed when it is heard
        except Exception as error:
            worker.kill()
            names = ", ".join(self._names)
            raise ValueError(
                f"rewards {names} cannot be sent to a process; define them in a module: {error}"
            ) from error
        return worker

    def _send(self, worker: _Worker, task: Task, rows: list[tuple[dict[str, Any], Sample]]) -> None:
        worker.task, worker.deadline = task, time.monotonic() + self.seconds
        with suppress(ConnectionError):
            worker.connection.send((task.reward, *rows[task.row]))

    def _hear(self, worker: _Worker, board: _Board) -> None:
        try:
            kind, answer = worker.connection.recv()
        except (EOFError, OSError):
            self._bury(worker, board)
            return
        worker.deadline = float("inf")
        if kind == "ready":
            worker.ready = True
        elif kind == "failed":
            raise ValueError(f"a reward cannot be loaded: {answer}")
        elif worker.task is not None:
            if kind == "scored":
                board.found[worker.task] = answer
            else:
                board.problems.append((worker.task, self._names[worker.task.reward], f"it raised {answer}"))
            worker.task = None

    def _bury(self, worker: _Worker, board: _Board) -> None:
        """A worker has ended: its row is scored once more, because not the row but the machine may have killed it."""
        worker.process.wait()
        task = worker.task
        if worker.ready and task is not None and task not in board.again:
            board.again.add(task)
            board.queue.appendleft(task)
            worker.task = None
        self._drop(worker, board, f"its process ended with exit code {worker.process.returncode}, twice")

    def _drop(self, worker: _Worker, board: _Board, reason: str) -> None:
        """Kills a worker; its row is unscored."""
        worker.kill()
        self._pool.remove(worker)
        if not worker.ready:
            board.failed_starts += 1
            if board.failed_starts < STARTS:
                return
            raise RuntimeError(f"a reward worker did not start: exit code {worker.process.returncode}; see its output")
        if worker.task is not None:
            board.problems.append((worker.task, self._names[worker.task.reward], reason))

    def _end(self) -> None:
        for worker in self._pool:
            worker.kill()
        self._pool.clear()


def _distinct(rewards: list[RewardFn]) -> list[RewardFn]:
    """Each reward once, equal ones together."""
    out: list[RewardFn] = []
    for reward in rewards:
        if reward not in out:
            out.append(reward)
    return out
