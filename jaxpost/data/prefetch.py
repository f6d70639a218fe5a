"""Batches made ahead of their use, by grain's threads. The only module that names grain."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


def prefetched(make: Callable[[int], T], start: int, stop: int, *, ahead: int, threads: int = 1) -> Iterator[T]:
    """make(start), make(start + 1) ... in order, up to `ahead` of them made early; `ahead` 0 makes each when asked.

    >>> list(prefetched(lambda k: k * k, 2, 5, ahead=2))
    [4, 9, 16]
    """
    if ahead <= 0:
        return (make(k) for k in range(start, stop))
    import grain

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    return iter(grain.MapDataset.range(start, stop).map(make).to_iter_dataset(options))
