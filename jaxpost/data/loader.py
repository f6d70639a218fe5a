"""Batches of a data set by number: batch k is a pure function of the data, the seed and k.

Each process makes only its own rows of the global batch, those that its devices hold (`sharding.local_rows`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np

from jaxpost.data.cache import SourceStats
from jaxpost.data.dataset import TokenDataset
from jaxpost.data.packing import Plan, make_plan
from jaxpost.data.prefetch import prefetched
from jaxpost.text.messages import DataError
from jaxpost.types import TokenBatch

ENDLESS = 2**31 - 1


@runtime_checkable
class Planned(Protocol):
    """What batches are planned and counted by: an AnswerDataset or a TokenDataset."""

    stats: list[SourceStats]
    fingerprint: str

    def __len__(self) -> int: ...


D = TypeVar("D", bound=Planned)
B = TypeVar("B")


@dataclass
class RowSource(Generic[D, B]):
    """Reads `plan` over `dataset`: the batches of one process.

    Attributes:
      pad_id: fills the rest of each row (segment 0, weight 0).
      rows: which rows of the global batch this process makes, ascending; None: all.
      prefetch: batches made ahead in `iterate`.
    """

    dataset: D
    plan: Plan
    pad_id: int = 0
    rows: Sequence[int] | np.ndarray | None = None
    prefetch: int = 4

    def __post_init__(self) -> None:
        size = self.plan.batch_size
        self.rows = np.arange(size) if self.rows is None else np.asarray(self.rows)
        if self.rows.size == 0 or self.rows.min() < 0 or self.rows.max() >= size:
            raise DataError(f"a process's rows must lie in 0 .. {size - 1}, got {self.rows.tolist()}")

    @property
    def num_batches_per_epoch(self) -> int:
        """Batches of one epoch, rounded up; of an evaluation plan, exactly all its batches."""
        return self.plan.num_batches_per_epoch

    def num_steps(self, epochs: float | int) -> int:
        """Optimiser steps that see so many epochs."""
        return self.plan.num_steps(epochs)

    @property
    def fingerprint(self) -> str:
        """Changes with anything that would change a batch; a resumed run compares it."""
        plan = self.plan
        parts = (self.dataset.fingerprint, plan.seq_len, plan.batch_size, plan.packing, plan.seed, plan.endless)
        return hashlib.sha256(repr((parts, plan.shares, self.pad_id)).encode()).hexdigest()

    @property
    def stats(self) -> dict[str, Any]:
        """Counts for logs and reports: examples, tokens, rows left out, packing efficiency."""
        sources = self.dataset.stats
        return {
            "examples": len(self.dataset),
            "tokens": sum(s.tokens for s in sources),
            "trained_tokens": sum(s.trained_tokens for s in sources),
            "truncated": sum(s.truncated for s in sources),
            "dropped": sum(sum(s.dropped.values()) for s in sources),
            "bad": sum(sum(s.bad.values()) for s in sources),
            "rows_per_epoch": self.plan.rows_per_epoch,
            "batches_per_epoch": self.num_batches_per_epoch,
            "packing_efficiency": self.plan.efficiency,
        }

    def numbers(self, k: int) -> np.ndarray:
        """int64: this process's rows of batch k, by their number in the plan's stream of rows."""
        return k * self.plan.batch_size + np.asarray(self.rows, np.int64)

    def batch(self, k: int) -> B:
        """Batch k: numpy arrays of this process's rows."""
        raise TypeError(f"{type(self).__name__} does not say what a batch is")

    def iterate(self, start: int = 0) -> Iterator[B]:
        """batch(start), batch(start + 1) ...: without end in training, all that remain in evaluation."""
        stop = ENDLESS if self.plan.endless else self.num_batches_per_epoch
        return prefetched(self.batch, start, stop, ahead=self.prefetch)


@dataclass
class BatchSource(RowSource[TokenDataset, TokenBatch]):
    """Batches for supervised training."""

    def batch(self, k: int) -> TokenBatch:
        """Batch k: numpy arrays of this process's rows.

        Row r of batch k has row id k * B + r (wrapped to int32), whichever process holds it.
        """
        numbers = self.numbers(k)
        plan, rows, width = self.plan, len(numbers), self.plan.seq_len
        tokens = np.full((rows, width), self.pad_id, np.int32)
        positions, segments = np.zeros((2, rows, width), np.int32)
        weights = np.zeros((rows, width), np.float32)
        for r in range(rows):
            at = 0
            for segment, example in enumerate(plan.row(int(numbers[r])).tolist(), 1):
                ids, of_ids = self.dataset.example(example)
                end = at + len(ids)
                tokens[r, at:end], weights[r, at:end] = ids, of_ids
                positions[r, at:end], segments[r, at:end] = np.arange(len(ids)), segment
                at = end
        arrays: Any = (tokens, positions, segments, weights, numbers.astype(np.int32))
        return TokenBatch(*arrays)


def make_source(
    dataset: TokenDataset,
    *,
    seq_len: int,
    batch_size: int,
    packing: bool = True,
    seed: int = 0,
    endless: bool = True,
    pad_id: int = 0,
    rows: Sequence[int] | np.ndarray | None = None,
    prefetch: int = 4,
) -> BatchSource:
    """Plans a data set and reads it: `endless` True for training, False for one ordered pass of evaluation."""
    plan = make_plan(
        dataset.lengths,
        seq_len=seq_len,
        batch_size=batch_size,
        packing=packing,
        seed=seed,
        endless=endless,
        starts=dataset.starts,
        shares=dataset.shares,
    )
    return BatchSource(dataset, plan, pad_id, rows, prefetch)
