"""What every measurement shares."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Measurement = dict[str, Any]
"""seconds: of each repetition; compile: seconds of compilation; anything else is printed below the table."""


class Task(NamedTuple):
    title: str
    tokens: int
    """Per repetition: read and trained, or generated."""
    targets: Mapping[str, float]
    """Peer -> the ratio that we want at least."""
    libraries: Mapping[str, Callable[[str, str], Measurement]]
    """Library -> run(task, model folder); "jaxpost" is among them."""


def timed(step: Callable[[], Any], repetitions: int) -> list[float]:
    """Seconds of each repetition after one that does not count."""
    step()
    return [once(step) for _ in range(repetitions)]


def once(step: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def compile_timed(jitted: Any, *arguments: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    compiled = jitted.lower(*arguments).compile()
    return compiled, time.perf_counter() - start
