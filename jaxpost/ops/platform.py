"""The one place where the machine decides how something is computed. It never changes what is computed.

Everything that differs between CPU, GPU and TPU is a field of `Choices`; models and losses read it at trace
time and hold no platform test of their own. A program compiled on one machine for another (ahead-of-time
compilation for a TPU) says so with `target`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

import jax

Platform = Literal["cpu", "gpu", "tpu"]
ATTENTION_RESIDUALS = "attention"
"""Checkpoint name of what attention kernels keep for their backward pass."""

Remat = Literal["auto", "none", "dots", "full"]


@dataclass(frozen=True, kw_only=True)
class Choices:
    """How one platform computes."""

    attention: str
    """What `impl="auto"` means in `ops.attention`."""
    remat: Remat
    """What `remat="auto"` means in `models.transformer`: recompute nothing, all but matrix products, or layers."""
    float32_products: bool
    """Ask for float32 results of low-precision products and round afterwards (TPU and GPU accumulate in float32
    anyway; a CPU has fast kernels only for this form)."""
    query_block: int
    """Queries that the xla attention handles at one time once a row has more than twice as many."""
    splash_block: int = 512
    """Largest tile of the splash kernel, in tokens; a power of two from 128."""


CHOICES: dict[Platform, Choices] = {
    "cpu": Choices(attention="xla", remat="dots", float32_products=True, query_block=512),
    "gpu": Choices(attention="xla", remat="dots", float32_products=False, query_block=1024),
    "tpu": Choices(attention="splash", remat="full", float32_products=False, query_block=1024),
}

_target: ContextVar[Platform | None] = ContextVar("jaxpost_platform", default=None)


@contextmanager
def target(platform: Platform) -> Iterator[None]:
    """Trace for `platform` instead of this process's own backend.

    Example:
        >>> with target("tpu"):
        ...     choices().remat
        'full'
    """
    token = _target.set(platform)
    try:
        yield
    finally:
        _target.reset(token)


def current() -> Platform:
    """The platform that programs are being traced for."""
    chosen = _target.get()
    if chosen is not None:
        return chosen
    backend = jax.default_backend()
    return backend if backend in CHOICES else "gpu"  # ty: ignore[invalid-return-type]


def choices() -> Choices:
    """The current platform's choices."""
    return CHOICES[current()]
