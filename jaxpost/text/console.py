"""Text of models and of strangers, as a terminal may show it."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from typing import Any

_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that change the direction of the text around them, and so what a reader takes it to say."""


def visible(text: str) -> str:
    r"""The text with control characters written out, but for line breaks and tabs, so that a terminal obeys none.

    >>> print(visible("a\x1b[2J\nb\r\ud800"))
    a\x1b[2J
    b\r\ud800
    """
    return "".join(c if c in "\n\t" or not _obeyed(c) else repr(c)[1:-1] for c in text)


def as_line(row: Mapping[str, Any], encoding: str = "utf-8") -> str:
    r"""A row as one line of JSON, in its own letters unless the encoding lacks one, as UTF-8 half a surrogate pair.

    >>> print(as_line({"text": "\u00e9"}), as_line({"text": "\u00e9\ud800"}))
    {"text": "é"} {"text": "\u00e9\ud800"}
    """
    line = json.dumps(row, ensure_ascii=False)
    return line if line.encode(encoding, "replace").decode(encoding) == line else json.dumps(row)


def writable(text: str, encoding: str) -> str:
    r"""The text with the letters that an encoding lacks written out, so that printing it cannot fail.

    >>> print(writable("a\ud800\u00e9", "ascii"))
    a\ud800\xe9
    """
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _obeyed(letter: str) -> bool:
    # Half a surrogate pair cannot be written at all.
    return letter in _TURNING or unicodedata.category(letter) in ("Cc", "Cs")
