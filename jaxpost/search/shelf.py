"""Texts that an engine holds between calls, one a node: what trees cost in pages, and who gives way when they run out.

A node's text shares every page with its parent's but the last, partial one. A node without a text is read again from
its tokens: never wrong, only slower.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxpost.generate.engine import Engine
from jaxpost.generate.layout import Text
from jaxpost.generate.pages import OutOfPages
from jaxpost.models.pages import page_bytes
from jaxpost.search.tree import Node

Key = Any


def key_of(node: Node) -> Key:
    """Names a node before it exists: its parent and its number; a root is its own name."""
    return node if node.parent is None else (node.parent, node.number)


@dataclass
class Traffic:
    """What was read, in tokens."""

    read: int = 0
    """For the first time: prompts and given pieces."""
    again: int = 0
    """Of texts whose pages had gone, or never were kept."""
    evicted: int = 0
    """Texts whose pages had to go."""


class Shelf:
    """Texts by key, the least recently used first.

    Args:
        rows: most texts that go through the model together.
    """

    def __init__(self, rows: int):
        self.rows, self.traffic = rows, Traffic()
        self._engine: Engine | None = None
        self._texts: OrderedDict[Key, Text] = OrderedDict()

    def __len__(self) -> int:
        return len(self._texts)

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("the shelf has no engine yet")
        return self._engine

    def use(self, engine: Engine) -> None:
        """Keeps texts of this engine from now on; those of another are gone with its pages."""
        if engine is not self._engine:
            self._engine = engine
            self._texts.clear()

    def get(self, key: Key) -> Text | None:
        """The text of a key, which is now the last to go."""
        text = self._texts.get(key)
        if text is not None:
            self._texts.move_to_end(key)
        return text

    def put(self, key: Key, text: Text) -> None:
        self.drop([key])
        self._texts[key] = text

    def drop(self, keys: Iterable[Key]) -> None:
        """Gives pages back."""
        for key in keys:
            text = self._texts.pop(key, None)
            if text is not None:
                self.engine.release([text])

    def spare(self, shard: int, but: Collection[Key] = ()) -> bool:
        """Gives back pages of the texts that were used longest ago; False if there are none but `but`."""
        book = self.engine.books[shard]
        wanted = book.free + max(1, book.full.count // 32)
        gone = [key for key, text in self._texts.items() if text.pages.shard == shard and key not in but]
        for number, key in enumerate(gone):
            if book.free >= wanted:
                return number > 0
            self.drop([key])
            self.traffic.evicted += 1
        return bool(gone)

    def in_parts(
        self, items: Sequence[Any], work: Callable[[Sequence[Any]], Sequence[Any]], keys: Callable[[Any], Key]
    ) -> list[Any]:
        """work(items) in parts that fit the cache; a sentence for an item that does not fit alone."""
        out: list[Any] = []
        size = self.rows
        while len(out) < len(items):
            part = items[len(out) : len(out) + size]
            try:
                out += work(part)
            except OutOfPages as error:
                if self.spare(error.shard, {keys(item) for item in part}):
                    continue
                if len(part) == 1:
                    out.append(f"a text does not fit the cache ({error}): raise cache_tokens")
                size = max(1, len(part) // 2)
        return out

    @property
    def pages(self) -> int:
        """Pages that anybody holds now."""
        return sum(_pool(book).count - 1 - book.free for book in self.engine.books)

    @property
    def most_pages(self) -> int:
        """Pages that anybody ever held at one time."""
        return sum(_pool(book).most for book in self.engine.books)

    def page_mib(self, dtype: Any) -> float:
        """MiB of a page of all layers."""
        engine = self.engine
        window = not engine.book.has_full
        return page_bytes(engine.model.config, page_size=engine.page_size, dtype=dtype, window=window) / 2**20


def _pool(book: Any) -> Any:
    return book.full if book.has_full else book.windowed
