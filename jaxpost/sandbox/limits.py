"""What a program in the sandbox may use, the levels of isolation, and what is known of it afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Level = Literal["process", "filters", "namespaces"]
LEVELS: tuple[Level, ...] = ("namespaces", "filters", "process")
"""The strongest first.

process: a session of its own, limits, an empty environment, a private folder, the kill of all that it started; beyond
that the program may do what its user may. filters: also no network, no files but Python's own and the system's
programs and libraries (that another is there, and its size, can still be asked), no signals to others, no way out of
its process group (seccomp and Landlock; Linux 6.2).
namespaces: also a file system, a process table and a network of its own, with nothing in them.
"""
Isolation = Literal["auto", "process", "filters", "namespaces"]
"""A level, or "auto": the strongest that works on this machine; `Ran.isolation` says which it was."""

Reason = Literal["ok", "error", "timeout", "memory", "output", "files"]
"""Why a program ended: by itself with exit code 0 or another, or over a limit."""

THREADS = 32
"""Of a program that may start no other process."""


class IsolationMissing(RuntimeError):
    """The isolation that was asked for does not work on this machine; nothing was run."""


@dataclass(frozen=True)
class Limits:
    """What one program may use; every limit is set before its first line runs.

    Raises:
      ValueError: a limit that is not positive, or memory in which Python does not start.
    """

    seconds: float = 5.0
    """By the clock, from its start."""
    cpu_seconds: int = 5
    """Of each of its processes."""
    memory_mb: int = 512
    """Address space of each of its processes."""
    processes: int = 1
    """1: it cannot start processes (and has at most THREADS threads). More: processes and threads together, at once."""
    file_mb: int = 16
    """Of each file and of all files together."""
    output_kb: int = 256
    """Of standard output and of standard error, each."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"the limit {name} = {value} must be positive")
        if self.memory_mb < 64:
            raise ValueError(f"memory_mb = {self.memory_mb}: Python itself needs 64")


class Ran(NamedTuple):
    """What a program did."""

    stdout: str
    """The first `output_kb`; bytes that are no UTF-8 are replaced."""
    stderr: str
    exit: int
    """The exit code; minus the signal's number if a signal ended it. The program chose it: it proves nothing."""
    reason: Reason
    seconds: float
    isolation: Level
