"""JSON in which no key of an object stands twice: Python's own reader keeps the last and drops the others."""

from __future__ import annotations

import json
from typing import Any


class RepeatedKey(ValueError):
    """A key that stands twice in one object."""


def loads(text: str) -> Any:
    """The value of a JSON text.

    >>> loads('{"a": [1]}')
    {'a': [1]}

    Raises: RepeatedKey, and what json.loads raises: ValueError, RecursionError.
    """
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        where = f"an object with the keys {', '.join(made)}"
        raise RepeatedKey(f"the key {twice!r:.80} stands twice in {where:.160}; keep one of them")
    return made
