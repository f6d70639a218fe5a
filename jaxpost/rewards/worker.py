"""The process that `runner.Pool` starts: `python -m jaxpost.rewards.worker FD`. It imports neither jax nor a model."""

from __future__ import annotations

import faulthandler
import os
import sys
from multiprocessing.connection import Connection
from typing import Any

from jaxpost.rewards.contract import RewardFn, RowReward, Sample, name_of
from jaxpost.rewards.functions import FromFile, load

GRACE = 5.0
"""Seconds after a row's limit at which a worker whose parent is gone ends itself."""
MAX_WORDS = 500
"""Characters of an error that are told."""


def main(descriptor: int) -> None:
    """Reads (rewards, seconds), says "ready", then answers rows (reward, example, sample) one by one."""
    connection = Connection(descriptor)
    try:
        try:
            rewards, seconds = connection.recv()
        except (AttributeError, ImportError) as error:
            connection.send(("failed", f"it must be in a module that can be imported: {error}"))
            return
        connection.send(_start(rewards))
        with open(os.devnull, "w") as silent:
            while True:
                number, example, sample = connection.recv()
                # A watchdog of C, which ends the process even where Python code holds the interpreter's lock.
                faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=silent)
                answer = _score(rewards[number], example, sample)
                faulthandler.cancel_dump_traceback_later()
                connection.send(answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent closed its end


def _start(rewards: list[RewardFn]) -> tuple[str, str]:
    """Loads users' files and the like before the first row: faults are told at once, and the time is not a row's."""
    for reward in rewards:
        try:
            if isinstance(reward, FromFile):
                load(reward.spec)
            elif isinstance(reward, RowReward):
                reward.prepare()
        except BaseException as error:
            name = reward.spec if isinstance(reward, FromFile) else name_of(reward)
            return "failed", f"{name}: {told(error)}"
    return "ready", ""


def _score(reward: RewardFn, example: dict[str, Any], sample: Sample) -> tuple[str, Any]:
    try:
        columns = reward([example], [sample])
        return "scored", {name: float(column[0]) for name, column in columns.items()}
    except BaseException as error:  # a user's sys.exit() too is this row's fault only
        return "raised", told(error)


def told(error: BaseException) -> str:
    """Its type and words in one line that can be printed: they may hold the model's text, however long."""
    try:
        words = " ".join(str(error).split())
    except BaseException:
        words = "an error without words"
    shown = "".join(c if c.isprintable() else "?" for c in words[:MAX_WORDS])
    return f"{type(error).__name__}: {shown}" + ("..." if len(words) > MAX_WORDS else "")


if __name__ == "__main__":
    main(int(sys.argv[1]))
