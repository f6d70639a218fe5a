"""The one place where the machine decides how something is computed. It never changes what is computed.

Everything that differs between CPU, GPU and TPU is a field of `Choices`; models and losses read it at trace
time and hold no platform test of their own. A program compiled on one machine for another (ahead-of-time
compilation for a TPU) says so with `target`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

import jax

Platform = Literal["cpu", "gpu", "tpu"]
LINEAR_OUTPUT = "linear"
"""Checkpoint name of a projection's result."""
ATTENTION_RESIDUALS = "attention"
"""Checkpoint name of what attention keeps for its backward pass: its result and the softmax's normaliser."""

Remat = Literal["auto", "none", "dots", "full"]


@dataclass(frozen=True, kw_only=True)
class PanelRule:
    """Panels of a kernel: measured with 8 rows on 2 threads."""

    widths: tuple[int, ...] = (64, 32)
    """Columns of a panel: the first of these that gives at least `least` panels."""
    least: int = 12
    groups: int = 16
    """Most products that a kernel becomes. XLA's executor gives work away from nine steps that are ready on."""
    threads: int = 4
    """Beyond so many a whole product uses them better."""


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
    update_kernels: bool
    """Form a layer's W0 + s A B in float32 steps with many tokens, instead of adding a second product's result:
    saves passes over memory, a CPU's bottleneck."""
    unrolled_decode: bool
    """Decode layer by layer from weights of their own: a scan's copy of each layer's slice costs more than products
    with few rows, at the price of a second copy of the weights and a longer compilation."""
    bfloat16_as_bits: bool
    """Keep bfloat16 arrays that are sliced or written into as unsigned integers (`ops.bits`)."""
    chunk_tokens: int
    """Tokens per device whose logits a loss holds at one time: on a CPU freshly written memory is the bottleneck,
    elsewhere products with few rows."""
    causal_chunk: int
    """Smallest number of queries for which the xla attention leaves out the keys that none of them may see."""
    causal_chunks: int = 8
    """Most such chunks: each is a program of its own."""
    sparse_chunk: int | None = None
    """Tokens of a chunk where rows share prefixes: pairs of chunks that see nothing of each other are left out. None:
    they are computed."""
    kept_logits: int = 0
    """Most bytes of logits that are kept for the backward pass of `ops.logprobs.token_stats`, not computed twice."""
    query_block: int = 256
    """Most queries whose scores the xla attention holds at one time."""
    staged_update: bool = False
    """Store an optimiser's moments before the parameters' change is formed from them: where loops over the same arrays
    stay apart, both would otherwise read the old moments, which are copied to be kept."""
    paged_kernel: bool = False
    """One query a row reads its pages by JAX's kernel, where that fits: a loop over pages is a chain of small steps."""
    panels: PanelRule | None = None
    """How the kernels that decoding reads are cut into panels (`ops.linear.Panels`); None: they stay whole."""
    row_parts: int = 1
    """Parts in which one row alone reads a whole kernel: threads share a product that XLA would not split, and each
    reads neighbouring memory."""
    row_buckets: tuple[int, ...] = (1,)
    """Rows that a batch of the engine may have; beyond the last, its multiples by powers of two. Each is a program, so
    where compiling is slow and rows are cheap there are few."""
    splash_block: int = 512
    """Largest tile of the splash kernel, in tokens; a power of two from 128."""


CHOICES: dict[Platform, Choices] = {
    "cpu": Choices(
        attention="xla",
        remat="dots",
        float32_products=True,
        update_kernels=True,
        unrolled_decode=True,
        bfloat16_as_bits=True,
        chunk_tokens=256,
        kept_logits=2**28,
        causal_chunk=64,
        staged_update=True,
        sparse_chunk=64,
        panels=PanelRule(),
        row_parts=8,
        row_buckets=(1, 8, 16, 32),
    ),
    "gpu": Choices(
        attention="xla",
        remat="dots",
        float32_products=False,
        update_kernels=False,
        unrolled_decode=False,
        bfloat16_as_bits=False,
        chunk_tokens=1024,
        causal_chunk=512,
    ),
    "tpu": Choices(
        attention="splash",
        remat="full",
        float32_products=False,
        update_kernels=False,
        unrolled_decode=False,
        bfloat16_as_bits=False,
        chunk_tokens=1024,
        causal_chunk=512,
        paged_kernel=True,
    ),
}


def threads() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
    return backend if backend in CHOICES else "gpu"


def choices() -> Choices:
    """The current platform's choices."""
    return CHOICES[current()]
