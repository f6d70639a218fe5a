"""Plain or conversational text of a row, as every format reads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpost.text.messages import Conversation, DataError, Message, parse_conversation

Text = str | Conversation
Tools = tuple[dict, ...] | None


def parse_text(value: Any, key: str, ignored: Counter[str] | None = None) -> Text:
    """Reads plain text or a list of messages. Raises: DataError naming the key."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping) and "role" in value:
        value = [value]
    if isinstance(value, Sequence):
        try:
            return parse_conversation(value, ignored)
        except DataError as error:
            raise DataError(f"{key}: {error}", kind=error.kind) from None
    raise DataError(f"{key} must be text or a list of messages, not {'null' if value is None else repr(value)[:80]}")


def same_kind(prompt: Text, value: Text) -> tuple[Text, Text]:
    """A plain prompt beside a conversational answer is that answer's user turn, and the reverse."""
    if isinstance(prompt, str) and not isinstance(value, str):
        return (Message(role="user", content=prompt),), value
    if not isinstance(prompt, str) and isinstance(value, str):
        return prompt, (Message(role="assistant", content=value),)
    return prompt, value


def is_empty(value: Text) -> bool:
    """Whether nothing is said: no text but spaces, and no call."""
    if isinstance(value, str):
        return not value.strip()
    return not any(turn.content.strip() or turn.tool_calls or turn.reasoning for turn in value)
