"""Who holds which page: reference counts on the host, decided before any device program runs.

Rows share pages by holding the same numbers. A page that several rows hold is never written: before a row writes
into one, it gets a copy of its own. Sliding-window blocks have pages of their own, given back behind the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


class OutOfPages(RuntimeError):
    """The pool cannot hold what was asked for; nothing was changed.

    Attributes:
        shard: whose pool.
    """

    def __init__(self, told: str, shard: int = 0):
        super().__init__(told)
        self.shard = shard


@dataclass
class PagedRow:
    """One sequence's pages; `stored` tokens of it have their keys and values written."""

    stored: int = 0
    full: list[int] = field(default_factory=list)
    window: list[int] = field(default_factory=list)
    """0 where the window has passed."""
    shard: int = 0
    """Whose pages: each part of the rows has pools, and numbers, of its own."""


class Pool:
    """Pages 1 .. count - 1 with the number of rows that hold each; page 0 is nobody's.

    Example:
        >>> pool = Pool("full", 3)
        >>> pool.take(2), pool.free
        ([1, 2], 0)
    """

    def __init__(self, name: str, count: int):
        self.name, self.count = name, count
        self.holders = np.zeros(count, np.int32)
        self._free = list(range(count - 1, 0, -1))
        self.most = 0
        """Pages that were ever held at one time."""

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` pages, each held once."""
        if count > self.free:
            raise OutOfPages(f"{count} {self.name} pages are needed and {self.free} of {self.count - 1} are free")
        pages = [self._free.pop() for _ in range(count)]
        self.holders[pages] += 1
        self.most = max(self.most, self.count - 1 - self.free)
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """One more holder of each page; 0 is skipped."""
        for page in pages:
            if page:
                self.holders[page] += 1

    def give_back(self, pages: Sequence[int]) -> None:
        """One holder fewer of each page; those without any are free again."""
        for page in pages:
            if not page:
                continue
            if self.holders[page] <= 0:
                raise ValueError(f"{self.name} page {page} is given back, but nobody holds it")
            self.holders[page] -= 1
            if self.holders[page] == 0:
                self._free.append(page)


@dataclass(frozen=True)
class Copies:
    """Pages to copy on the device before the next write: page source[i] to page target[i]."""

    full: tuple[tuple[int, int], ...] = ()
    window: tuple[tuple[int, int], ...] = ()


class PageBook:
    """Reserves, shares and gives back pages.

    Args:
        pages, window_pages: of the full and the window pools, page 0 included.
        page_size: tokens of a page.
        full, window: whether the model has full blocks, and the width of its sliding windows (the largest) or None.
        shard: which part of the rows' pools these are.

    Example:
        >>> book = PageBook(pages=4, window_pages=1, page_size=4)
        >>> row = PagedRow()
        >>> _ = book.reserve([row], [6])
        >>> book.advance(row, 6)
        >>> twin = book.fork(row)
        >>> book.reserve([twin], [1]).full, twin.full, row.full
        (((2, 3),), [1, 3], [1, 2])
    """

    def __init__(
        self,
        *,
        pages: int,
        window_pages: int,
        page_size: int,
        full: bool = True,
        window: int | None = None,
        shard: int = 0,
    ):
        self.page_size, self.window, self.shard = page_size, window, shard
        self.has_full = full
        self.full, self.windowed = Pool("full", pages), Pool("window", window_pages)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.page_size)

    @property
    def free(self) -> int:
        """Pages that may still be taken, in the pool that has fewer."""
        pools = [self.full] * self.has_full + [self.windowed] * (self.window is not None)
        return min(pool.free for pool in pools)

    def reserve(self, rows: Sequence[PagedRow], counts: Sequence[int]) -> Copies:
        """Makes room for `counts[i]` more tokens of row i, and a page of its own wherever it will write.

        Returns:
            what must be copied on the device first.

        Raises:
            OutOfPages: not all of it fits; no row has changed.
        """
        self.check(rows, counts)
        ends = [row.stored + count for row, count in zip(rows, counts, strict=True)]
        full = self._extend(self.full, [r.full for r in rows], rows, ends) if self.has_full else ()
        window = ()
        if self.window is not None:
            window = self._extend(self.windowed, [r.window for r in rows], rows, ends)
        return Copies(full, window)

    def check(self, rows: Sequence[PagedRow], counts: Sequence[int]) -> None:
        """Raises OutOfPages where `reserve` would; changes nothing."""
        ends = [row.stored + count for row, count in zip(rows, counts, strict=True)]
        needs = [self._need(self.full, [r.full for r in rows], rows, ends)] if self.has_full else []
        if self.window is not None:
            needs.append(self._need(self.windowed, [r.window for r in rows], rows, ends))
        for pool, need in zip([self.full] * self.has_full + [self.windowed], needs, strict=False):
            if need > pool.free:
                raise OutOfPages(
                    f"{need} {pool.name} pages are needed for {len(rows)} rows and {pool.free} of {pool.count - 1} "
                    "are free",
                    self.shard,
                )

    def _need(self, pool: Pool, tables: list[list[int]], rows: Sequence[PagedRow], ends: list[int]) -> int:
        held = pool.holders.copy()
        need = 0
        for table, row, end in zip(tables, rows, ends, strict=True):
            need += max(0, self.pages_for(end) - len(table))
            for number in self._written(table, row, end):
                # Of several rows that share a page the last to write keeps it.
                if held[table[number]] > 1:
                    held[table[number]] -= 1
                    need += 1
        return need

    def _extend(
        self, pool: Pool, tables: list[list[int]], rows: Sequence[PagedRow], ends: list[int]
    ) -> tuple[tuple[int, int], ...]:
        copies = []
        for table, row, end in zip(tables, rows, ends, strict=True):
            for number in self._written(table, row, end):
                old = table[number]
                if pool.holders[old] > 1:
                    [table[number]] = pool.take(1)
                    pool.give_back([old])
                    copies.append((old, table[number]))
            table.extend(pool.take(max(0, self.pages_for(end) - len(table))))
        return tuple(copies)

    def _written(self, table: list[int], row: PagedRow, end: int) -> range:
        """Numbers of the pages held already into which tokens [stored, end) will be written."""
        return range(row.stored // self.page_size, min(len(table), self.pages_for(end)))

    def advance(self, row: PagedRow, count: int) -> None:
        """`count` tokens were written; window pages that no later token sees are given back."""
        row.stored += count
        if self.window is not None:
            # One token more than the next one sees: the last token can always be taken back.
            passed = max(0, row.stored - self.window) // self.page_size
            for number in range(min(passed, len(row.window))):
                if row.window[number]:
                    self.windowed.give_back([row.window[number]])
                    row.window[number] = 0

    def trim(self, row: PagedRow) -> None:
        """Gives back pages reserved past the tokens that were written."""
        keep = self.pages_for(row.stored)
        self.full.give_back(row.full[keep:])
        self.windowed.give_back(row.window[keep:])
        del row.full[keep:], row.window[keep:]

    def fork(self, row: PagedRow) -> PagedRow:
        """A second row that shares every page; nothing is copied until one of them writes."""
        self.full.share(row.full)
        self.windowed.share(row.window)
        return PagedRow(row.stored, list(row.full), list(row.window), row.shard)

    def release(self, row: PagedRow) -> None:
        """Gives back all of a row's pages."""
        self.full.give_back(row.full)
        self.windowed.give_back(row.window)
        row.full, row.window, row.stored = [], [], 0
