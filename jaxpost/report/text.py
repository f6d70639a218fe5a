"""Text that others wrote, made safe to look at, and numbers made short."""

from __future__ import annotations

import math
from html import escape
from typing import Any

MOST = 4000
"""Characters of a text that are kept."""

_BIDI = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_UNSEEN = (0x200B, 0x2028, 0x2029, 0x2060, 0xFEFF, *range(0x80, 0xA0))
_SHOWN: dict[int, str] = (
    {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"}
    | {0x7F: "\u2421"}
    | {code: f"\u27e8U+{code:04X}\u27e9" for code in (*_BIDI, *_UNSEEN)}
    | dict.fromkeys(range(0xD800, 0xE000), "\ufffd")
)


def clean(text: Any, most: int | None = MOST) -> str:
    """A text with what cannot be seen made visible: control and bidirectional characters, lone surrogates.

    Args:
      most: characters that are kept; the rest is counted. None: all.

    Example:
      >>> clean("a" + chr(27) + "[2J" + chr(0x202E) + "b"), clean("abcdef", most=2)
      ('a\u241b[2J\u27e8U+202E\u27e9b', 'ab \u2026 (4 more characters)')
    """
    if isinstance(text, list):  # messages
        parts = [f"{m.get('role', '')}: {m.get('content', '')}" if isinstance(m, dict) else str(m) for m in text]
        text = "\n".join(parts)
    whole = "" if text is None else str(text)
    cut = whole if most is None or len(whole) <= most else whole[:most]
    rest = f" \u2026 ({len(whole) - len(cut):,} more characters)" if len(cut) < len(whole) else ""
    return cut.translate(_SHOWN) + rest


def html(text: Any, most: int | None = MOST) -> str:
    """`clean`, and escaped for HTML's text and attributes.

    >>> html("</script><b>")
    '&lt;/script&gt;&lt;b&gt;'
    """
    return escape(clean(text, most), quote=True)


def number(value: Any) -> float | None:
    """A value of a file as a number; None where it is none (absent, a word, NaN).

    >>> number(2), number("inf"), number("nan"), number(True), number(None)
    (2.0, inf, None, 1.0, None)
    """
    if isinstance(value, str) and value not in ("inf", "-inf"):
        return None
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return None if math.isnan(found) else found


def of_reward(key: str) -> bool:
    """Whether an evaluation's key is of a column of its reward, whose name may be any: accuracy, loss, items.

    >>> of_reward("held_out/reward/accuracy"), of_reward("reward/accuracy")
    (True, False)
    """
    return "/reward/" in key


def percent(value: float | int, digits: int = 1) -> str:
    """A share.

    >>> percent(0.1406), percent(float("nan"))
    ('14.1%', '–')
    """
    return f"{100 * value:.{digits}f}%" if math.isfinite(value) else "–"


def p_value(p: float | int) -> str:
    """A p value as it is printed.

    >>> p_value(0.0312), p_value(3e-14), p_value(1.0)
    ('p = 0.031', 'p = 3e-14', 'p = 1')
    """
    shown = f"{p:.2g}" if p >= 1e-3 else f"{p:.0e}".replace("e-0", "e-")
    return f"p = {shown}" if p > 0 else "p < 1e-300"
