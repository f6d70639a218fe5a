"""JSON in which no key of an object stands twice: Python's own reader keeps the last and drops the others.

Nor is it nested deeper than DEEPEST: how deep Python can go differs by its version and by who called, so that a file
would be read here and refused there.
"""

from __future__ import annotations

import json
from typing import Any

DEEPEST = 200


class RepeatedKey(ValueError):
    """A key that stands twice in one object."""


def loads(text: str) -> Any:
    """The value of a JSON text.

    >>> loads('{"a": [1]}')
    {'a': [1]}

    Raises: RepeatedKey; RecursionError for what is nested more than 200 levels deep; ValueError as json.loads.
    """
    value = json.loads(text, object_pairs_hook=_once)
    if text.count("[") + text.count("{") > DEEPEST and isinstance(value, dict | list):
        _refuse_deep(value)
    return value


def _refuse_deep(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST):
        inner = (part for parts in level for part in (parts.values() if isinstance(parts, dict) else parts))
        level = [part for part in inner if isinstance(part, dict | list)]
        if not level:
            return
    raise RecursionError(f"nested more than {DEEPEST} levels deep")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        where = f"an object with the keys {', '.join(made)}"
        raise RepeatedKey(f"the key {twice!r:.80} stands twice in {where:.160}; keep one of them")
    return made
