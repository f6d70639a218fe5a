"""Rows to cached tokens for supervised training: example by example, token ids and loss weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxpost.config import DataSection, SourceSection
from jaxpost.data.cache import Progress, SourceStats, prepare_sources
from jaxpost.data.encode import EncodeOptions
from jaxpost.text.tokenizer import Tokenizer


class Numbered:
    """Examples of several sources, numbered 0 .. len - 1 through the sources in order.

    Attributes:
      sizes: int64 [sources], examples of each.
      starts: int64 [sources + 1], where each source's examples begin, and the end.
    """

    def number(self, sizes: Sequence[int]) -> None:
        """Sets `sizes` and `starts`."""
        self.sizes = np.array(sizes, np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def locate(self, index: int) -> tuple[int, int]:
        """The source of an example, and its number there."""
        source = int(np.searchsorted(self.starts, index, side="right")) - 1
        return source, int(index - self.starts[source])


@dataclass
class TokenDataset(Numbered):
    """All sources' examples as token ids and loss weights."""

    tokens: list[np.ndarray]
    """Of each source: int32, examples one after another."""
    weights: list[np.ndarray]
    """Of each source: float32, weight of each token as a target."""
    offsets: list[np.ndarray]
    """Of each source: int64 [examples + 1]."""
    shares: tuple[float, ...] | None
    """Relative weights of the sources; None: by size."""
    stats: list[SourceStats]
    fingerprint: str

    def __post_init__(self) -> None:
        self.number([len(offsets) - 1 for offsets in self.offsets])
        self.lengths = np.concatenate([np.diff(offsets) for offsets in self.offsets]).astype(np.int32)

    def example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int32 [n] and weights float32 [n] of an example."""
        source, local = self.locate(index)
        start, end = self.offsets[source][local : local + 2]
        return self.tokens[source][start:end], self.weights[source][start:end]


def encode_options(section: DataSection) -> EncodeOptions:
    """The part of a data section that decides a row's tokens."""
    return EncodeOptions(
        mask=section.mask,
        seq_len=section.seq_len,
        system_prompt=section.system_prompt,
        on_long_row=section.on_long_row,
    )


def prepare(
    section: DataSection,
    sources: Sequence[SourceSection],
    tokenizer: Tokenizer,
    *,
    cache_dir: str | Path,
    report: Callable[[Progress], None] | None = None,
    rejected: str | Path | None = None,
) -> TokenDataset:
    """Tokenises sources, or reads them back from the cache.

    Args:
      section: mask, window, policies for bad and long rows, worker processes.
      sources: what to read (`section.train` or `section.eval`).
      cache_dir: where token files are kept.
      report: called about twice a second while rows are tokenised.
      rejected: file (JSON lines) that the rows left out as bad are written to; not made where there are none.
    Raises: DataError or FileNotFoundError, naming the file, the row and what to do.
    """
    prepared = prepare_sources(
        section, sources, tokenizer, encode_options(section), cache_dir=cache_dir, report=report, rejected=rejected
    )
    return TokenDataset(
        tokens=prepared.load("tokens", mapped=True),
        weights=prepared.load("weights", mapped=True),
        offsets=prepared.load("offsets"),
        shares=prepared.shares,
        stats=prepared.stats,
        fingerprint=prepared.fingerprint,
    )
