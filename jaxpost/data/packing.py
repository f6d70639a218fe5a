"""The global plan: which examples stand in which row of which batch, from their lengths and a seed alone.

Training. An epoch is a shuffled list of bins (rows of at most `seq_len` tokens); the epochs' bins follow each other
without end, and batch k is bins k*B .. k*B + B - 1 of that stream. So batch k is a pure function of (seed, k), any
number of hosts resumes from an integer, nothing is lost at the end of an epoch (its last bins share a batch with
the next epoch's first), and a data set smaller than a batch works.

Mixtures. With shares p_s an epoch still has about as many examples as all sources together, of which source s
gives floor(p_s N (e+1)) - floor(p_s N e) in epoch e: the shares of examples are exact in the long run. Every source
runs through its own shuffled passes, so none of its examples comes again before all others came. Without shares
every example comes exactly once an epoch.

Packing is best-fit decreasing: from the longest example to the shortest, each goes into the fullest bin that has
room. Which of several examples of equal length goes where, and the order of bins, are shuffled by (seed, epoch).

Evaluation. Every example exactly once and in order; the last batch is filled up with empty bins.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from jaxpost.text.messages import DataError


def best_fit_decreasing(sorted_lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Bin number of each length, for lengths that do not increase, and the number of bins.

    The free sizes that exist are the bits of one integer, so the fullest bin with room for n is found by a shift.

    >>> best_fit_decreasing(np.array([6, 5, 4, 3]), 10)
    (array([0, 1, 0, 1]), 2)
    """
    bins = np.empty(len(sorted_lengths), np.int64)
    free: dict[int, list[int]] = {}
    mask, count = 0, 0
    for index, length in enumerate(sorted_lengths.tolist()):
        above = mask >> length
        if above:
            room = length + (above & -above).bit_length() - 1
            chosen = free[room].pop()
            if not free[room]:
                mask ^= 1 << room
        else:
            room, chosen = capacity, count
            count += 1
        bins[index] = chosen
        rest = room - length
        if rest > 0:
            free.setdefault(rest, []).append(chosen)
            mask |= 1 << rest
    return bins, count


def _rng(*numbers: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([n & 0xFFFFFFFF for n in numbers])))


@dataclass
class Plan:
    """Rows of an endless stream of batches (training), or of one ordered pass (`endless` False).

    Attributes:
      lengths: int [examples].
      starts: int [sources + 1], where each source's examples begin.
      shares: per source, exact; None: every example once an epoch.
    """

    lengths: np.ndarray
    starts: np.ndarray
    shares: tuple[Fraction, ...] | None
    seq_len: int
    batch_size: int
    packing: bool
    seed: int
    endless: bool
    _rows: int | None = None
    _firsts: list[int] = field(default_factory=lambda: [0])
    _epochs: dict[int, list[np.ndarray]] = field(default_factory=dict)
    _pattern: tuple[np.ndarray, int] | None = None
    _lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def rows_per_epoch(self) -> int:
        """Bins of the first epoch (of all, but for mixtures, where epochs differ a little)."""
        if self._rows is None:
            self._rows = len(self.epoch(0))
        return self._rows

    @property
    def num_batches_per_epoch(self) -> int:
        """Batches that hold one epoch, rounded up."""
        return -(-self.rows_per_epoch // self.batch_size)

    def num_steps(self, epochs: float | int) -> int:
        """Batches that hold so many epochs, rounded up, at least 1."""
        return max(1, -int(-epochs * self.rows_per_epoch // self.batch_size))

    @property
    def efficiency(self) -> float:
        """Share of the first epoch's positions that hold tokens."""
        used = sum(int(self.lengths[row].sum()) for row in self.epoch(0))
        return used / (self.rows_per_epoch * self.seq_len)

    def draws(self, epoch: int) -> np.ndarray:
        """Examples of an epoch, before they are packed; in a mixture one may stand there twice."""
        if not self.endless:
            return np.arange(len(self.lengths))
        if self.shares is None:
            return np.arange(len(self.lengths))
        total, out = len(self.lengths), []
        for source, share in enumerate(self.shares):
            size = int(self.starts[source + 1] - self.starts[source])
            first, last = int(share * total * epoch), int(share * total * (epoch + 1))
            for turn in range(first // size, -(-last // size) if last > first else first // size):
                order = _rng(self.seed, 1, source, turn).permutation(size) + self.starts[source]
                out.append(order[max(0, first - turn * size) : last - turn * size])
        return np.concatenate(out) if out else np.zeros(0, np.int64)

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """The bins of an epoch in order; each is an array of examples."""
        with self._lock:
            rows = self._epochs.pop(epoch, None)
            self._epochs[epoch] = self._pack(epoch) if rows is None else rows
            while len(self._epochs) > 2:  # a batch may hold rows of two epochs
                self._epochs.pop(next(iter(self._epochs)))
            return self._epochs[epoch]

    def _pack(self, epoch: int) -> list[np.ndarray]:
        examples = self.draws(epoch)
        if not self.endless:
            return _next_fit(self.lengths, self.seq_len) if self.packing else list(examples[:, None])
        rng = _rng(self.seed, 0, epoch)
        examples = rng.permutation(examples)
        if not self.packing:
            return list(examples[:, None])
        examples = examples[np.argsort(-self.lengths[examples], kind="stable")]
        if self.shares is None:
            # The same multiset of lengths gives the same bins, so they are found once for all epochs.
            self._pattern = self._pattern or best_fit_decreasing(self.lengths[examples], self.seq_len)
            bins, count = self._pattern
        else:
            bins, count = best_fit_decreasing(self.lengths[examples], self.seq_len)
        place = rng.permutation(count)[bins]
        sizes = np.bincount(place, minlength=count)
        return np.split(examples[np.argsort(place, kind="stable")], np.cumsum(sizes)[:-1])

    def row(self, number: int) -> np.ndarray:
        """Examples in a row of the stream; empty beyond the end of an ordered pass."""
        if not self.endless:
            rows = self.epoch(0)
            return rows[number] if number < len(rows) else np.zeros(0, np.int64)
        epoch, within = self.locate(number)
        return self.epoch(epoch)[within]

    def locate(self, number: int) -> tuple[int, int]:
        """Epoch and position in it of a row of the stream."""
        if self.shares is None:
            return divmod(number, self.rows_per_epoch)
        with self._lock:
            while self._firsts[-1] <= number:
                self._firsts.append(self._firsts[-1] + len(self.epoch(len(self._firsts) - 1)))
        epoch = int(np.searchsorted(self._firsts, number, side="right")) - 1
        return epoch, number - self._firsts[epoch]

    def batch(self, k: int) -> list[np.ndarray]:
        """The B rows of batch k, each an array of examples."""
        return [self.row(number) for number in range(k * self.batch_size, (k + 1) * self.batch_size)]


def _next_fit(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    rows, used, begin = [], 0, 0
    for index, length in enumerate(lengths.tolist()):
        if used and used + length > capacity:
            rows.append(np.arange(begin, index))
            used, begin = 0, index
        used += length
    return [*rows, np.arange(begin, len(lengths))]


def make_plan(
    lengths: np.ndarray,
    *,
    seq_len: int,
    batch_size: int,
    packing: bool = True,
    seed: int = 0,
    endless: bool = True,
    starts: Sequence[int] | np.ndarray | None = None,
    shares: Sequence[float] | None = None,
) -> Plan:
    """The plan of a data set.

    Args:
      lengths: tokens of each example, 1 .. seq_len.
      seq_len: tokens of a row.
      batch_size: rows of a batch, over all processes.
      packing: several examples a row, or one.
      endless: shuffled epochs without end (training), or one ordered pass (evaluation).
      starts: where each source's examples begin, and the end; needed with `shares`.
      shares: relative weights of the sources' examples; None: by size. Evaluation reads all of every source.
    Raises: DataError for an empty data set or a length that does not fit.

    >>> plan = make_plan(np.array([3, 3, 2]), seq_len=5, batch_size=2)
    >>> plan.num_batches_per_epoch, [sorted(row.tolist()) for row in sorted(plan.batch(0), key=len)]
    (1, [[0], [1, 2]])
    """
    lengths = np.asarray(lengths)
    if lengths.size == 0:
        raise DataError("the data set has no examples")
    if lengths.min() < 1 or lengths.max() > seq_len:
        raise DataError(f"example lengths must be 1 to {seq_len}; they are {lengths.min()} to {lengths.max()}")
    starts = np.asarray([0, len(lengths)] if starts is None else starts, np.int64)
    exact = None
    if shares is not None and endless:
        weights = [Fraction(share).limit_denominator(10**6) for share in shares]
        if len(weights) != len(starts) - 1 or min(weights) <= 0:
            raise DataError("shares must be one number > 0 for each source")
        exact = tuple(weight / sum(weights) for weight in weights)
    return Plan(lengths, starts, exact, seq_len, batch_size, packing, seed, endless)
