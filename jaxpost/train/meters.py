"""How fast a run is, and of what its machine could do: tokens per second, utilisation, waiting, memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp

_TERA = 1e12
PEAK_FLOPS = {
    "TPU v4": 275 * _TERA,
    "TPU v5 lite": 197 * _TERA,
    "TPU v5e": 197 * _TERA,
    "TPU v5": 459 * _TERA,
    "TPU v5p": 459 * _TERA,
    "TPU v6 lite": 918 * _TERA,
    "TPU v6e": 918 * _TERA,
    "TPU7x": 2307 * _TERA,
    "NVIDIA A100": 312 * _TERA,
    "NVIDIA H100": 989 * _TERA,
    "NVIDIA H200": 989 * _TERA,
    "NVIDIA L4": 121 * _TERA,
    "NVIDIA B200": 2250 * _TERA,
}
"""Dense bfloat16 FLOPs per second of one device, by the start of its kind (the makers' data sheets)."""


def peak_flops(devices: Sequence[Any]) -> float | None:
    """FLOPs per second that the devices together could do; measured on CPU, None if the kind is unknown.

    The longest matching name wins ("TPU v5 lite" over "TPU v5").
    """
    if devices[0].platform == "cpu":
        return _measured_matmul_flops()
    names = [name for name in PEAK_FLOPS if devices[0].device_kind.startswith(name)]
    return PEAK_FLOPS[max(names, key=len)] * len(devices) if names else None


def _measured_matmul_flops(size: int = 1024, tries: int = 5) -> float:
    # All virtual CPU devices share the same cores, so one product measures the whole machine.
    square = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.dot)
    product(square, square).block_until_ready()
    best = float("inf")
    for _ in range(tries):
        start = time.perf_counter()
        product(square, square).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_memory_gib(devices: Sequence[Any]) -> float:
    """The most memory in use so far, in GiB: of the fullest device, or of this process on CPU."""
    stats = [d.memory_stats() or {} for d in devices if d.process_index == jax.process_index()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    if peaks:
        return max(peaks) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Meter:
    """Adds up seconds and tokens between two log records; what happens inside `pause` does not count as training.

    An update lasts from the end of the one before it (or of a pause) to its own end. The loop tells when an update
    ended, because it hears of it only while the next one runs.

    Args:
        flops_per_token: forward and backward; None leaves utilisation out.
        peak: FLOPs per second of all devices; None leaves utilisation out.
    """

    def __init__(self, *, flops_per_token: float | None = None, peak: float | None = None) -> None:
        self._flops, self._peak = flops_per_token, peak
        self._last = time.perf_counter()
        self._seconds = self._waited = 0.0
        self._tokens = self._trained = self._updates = 0
        self._all_seconds, self._all_updates = 0.0, 0

    @contextmanager
    def pause(self) -> Generator[None]:
        """Leave out what is no training (compiling, evaluating, saving); no update may be under way."""
        try:
            yield
        finally:
            self._last = time.perf_counter()

    def add(self, *, ended: float, waited: float, tokens: int, trained: int) -> None:
        """One finished update.

        Args:
            ended: `time.perf_counter()` when it was done.
            waited: seconds of it that went by waiting for its batch.
        """
        seconds = max(ended - self._last, 0.0)
        self._last = max(ended, self._last)
        self._seconds += seconds
        self._waited += min(waited, seconds)
        self._tokens += tokens
        self._trained += trained
        self._updates += 1
        self._all_seconds += seconds
        self._all_updates += 1

    @property
    def seconds_per_update(self) -> float:
        """Mean over this attempt."""
        return self._all_seconds / max(self._all_updates, 1)

    def read(self) -> dict[str, float]:
        """Speeds since the last call, and begin anew. Tokens per second count no padding."""
        seconds = max(self._seconds, 1e-9)
        out = {
            "seconds_per_update": seconds / max(self._updates, 1),
            "tokens_per_second": self._tokens / seconds,
            "trained_tokens_per_second": self._trained / seconds,
            "data_wait_percent": 100 * self._waited / seconds,
        }
        if self._flops and self._peak:
            out["mfu_percent"] = 100 * self._flops * self._tokens / seconds / self._peak
        self._seconds = self._waited = 0.0
        self._tokens = self._trained = self._updates = 0
        return {name: round(value, 6) for name, value in out.items()}
