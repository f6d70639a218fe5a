"""One message type for every source of conversations.

A conversation is a tuple of `Message`. Whatever the source calls things (ShareGPT, OpenAI, typed content parts),
a row becomes this form once, here, and templates, masks and reports read only this form.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxpost.text import strict_json

ROLES = ("system", "user", "assistant", "tool")
"""Who may speak. `developer` is read as system, `function` as tool."""

_ROLE_ALIASES = {"developer": "system", "function": "tool", "prompter": "user", "human": "user", "gpt": "assistant"}
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_WEIGHT_KEYS = ("loss_weight", "weight", "train")
_WEIGHTS = (1.2e-38, 3.4e38)
_KNOWN_KEYS = frozenset(
    {"role", "content", "name", "tool_call_id", "tool_calls", "function_call", *_REASONING_KEYS, *_WEIGHT_KEYS}
)
_TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
_REASONING_PARTS = frozenset({"reasoning", "thinking"})
_CALL_PARTS = frozenset({"tool_call", "tool_calls", "function_call"})


class DataError(ValueError):
    """A row that cannot be used, with a sentence that says why and what to do.

    `kind` is the short name under which such rows are counted.
    """

    def __init__(self, message: str, *, kind: str = "format"):
        super().__init__(message)
        self.kind = kind


ODD = (TypeError, KeyError, AttributeError, IndexError, ValueError, OverflowError, RecursionError)
"""What a value of a shape that nobody thought of raises, deep in a reader or a template."""


def as_data_error(error: Exception) -> DataError:
    """The error as one of the row: one that is no sentence of ours stands in a sentence that says what to do."""
    if isinstance(error, DataError):
        return error
    reason = (str(error).splitlines() or [""])[0]
    told = f"{type(error).__name__}: {reason:.150}"
    found = DataError(f"something in it has a shape that cannot be read ({told}); mend it or leave it out")
    found.__cause__ = error
    return found


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A call that the assistant makes. `arguments` is the decoded object; a string only where it was no JSON."""

    name: str
    arguments: Any
    id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn. `weight` scales the loss of an assistant turn; None means that the source said nothing (1)."""

    role: str
    content: str = ""
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    tool_call_id: str | None = None
    weight: float | None = None


Conversation = tuple[Message, ...]


def _show(value: Any, limit: int = 80) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def parse_role(role: Any) -> str:
    """The canonical role of a name used by some source.

    >>> parse_role("developer")
    'system'
    """
    if not isinstance(role, str):
        raise DataError(f"a message's role is {_show(role)}, not text; known roles: {', '.join(ROLES)}", kind="role")
    known = _ROLE_ALIASES.get(role, role)
    if known not in ROLES:
        raise DataError(f"unknown role {role!r}; known roles: {', '.join(ROLES)}", kind="role")
    return known


def parse_tool_call(value: Any) -> tuple[ToolCall, ...]:
    """Reads a call written as JSON text, as {name, arguments}, as OpenAI's {function: {...}}, or a list of these.

    >>> parse_tool_call('{"name": "add", "arguments": "{\\\\"a\\\\": 1}"}')
    (ToolCall(name='add', arguments={'a': 1}, id=None),)
    """
    if isinstance(value, str):
        try:
            value = strict_json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError(f"a tool call is not valid JSON ({error}): {_show(value)}", kind="tool_call") from None
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(call for item in value for call in parse_tool_call(item))
    if not isinstance(value, Mapping):
        raise DataError(f"a tool call must be an object with name and arguments, not {_show(value)}", kind="tool_call")
    call_id = value.get("id")
    if isinstance(value.get("function"), Mapping):
        value = value["function"]
    name, arguments = value.get("name"), value.get("arguments", value.get("parameters"))
    if not isinstance(name, str) or not name:
        raise DataError(f"a tool call has no name: {_show(value)}", kind="tool_call")
    if isinstance(arguments, str):
        arguments = _arguments(name, arguments)
    return (ToolCall(name=name, arguments={} if arguments is None else arguments, id=call_id),)


def _arguments(name: str, text: str) -> Any:
    try:
        return strict_json.loads(text)
    except json.JSONDecodeError:
        return text  # some tools take free text, and that is what the model must write
    except (ValueError, RecursionError) as error:
        raise DataError(f"the arguments of a call of {name} cannot be read ({error})", kind="tool_call") from None


def parse_tools(value: Any) -> tuple[dict, ...] | None:
    """Tool definitions: a list of JSON schemas, or the same as JSON text. An empty list means no tools.

    >>> parse_tools('[{"name": "now", "parameters": {}}]')
    ({'name': 'now', 'parameters': {}},)
    """
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            value = strict_json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError(f"tools is not valid JSON ({error}): {_show(value)}", kind="tools") from None
    if value is None:
        return None
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, Sequence) or not all(isinstance(tool, str | Mapping) for tool in value):
        raise DataError(f"tools must be a list of tool definitions, not {_show(value)}", kind="tools")
    tools = tuple(_parse_tool(tool) for tool in value)
    return tools or None


def _parse_tool(tool: Any) -> dict:
    if isinstance(tool, str):
        try:
            tool = strict_json.loads(tool)
        except (ValueError, RecursionError) as error:
            raise DataError(f"a tool definition is not valid JSON ({error}): {_show(tool)}", kind="tools") from None
    body = (tool.get("function") or tool) if isinstance(tool, Mapping) else None
    if not isinstance(tool, Mapping) or not isinstance(body, Mapping) or not isinstance(body.get("name"), str):
        raise DataError(f"a tool definition has no name: {_show(tool)}", kind="tools")
    return dict(tool)


def _parse_weight(message: Mapping) -> float | None:
    """The weight that the keys agree on: what any of them takes out is out, whatever the others say."""
    given = {key: _weight(key, message[key]) for key in _WEIGHT_KEYS if message.get(key) is not None}
    sizes = {key: value for key, value in given.items() if key != "train" or value not in (0.0, 1.0)}
    if len(set(sizes.values())) > 1:
        told = " and ".join(f"{key} {value:g}" for key, value in sizes.items())
        raise DataError(f"a message has {told}, which differ; keep one of them", kind="weight")
    if 0.0 in given.values():
        return 0.0
    return next(iter((sizes or given).values()), None)


def _weight(key: str, value: Any) -> float:
    if not isinstance(value, bool | int | float) or not value >= 0:
        raise DataError(f"{key} of a message must be true, false or a number >= 0, not {_show(value)}", kind="weight")
    if value and not _WEIGHTS[0] <= value <= _WEIGHTS[1]:  # a weight must not become 0 or infinite on its way
        raise DataError(
            f"{key} of a message must be 0 or lie between {_WEIGHTS[0]:g} and {_WEIGHTS[1]:g} (32-bit numbers), not "
            f"{'a whole number of many digits' if isinstance(value, int) else value}",
            kind="weight",
        )
    return float(value)


def _parse_parts(parts: Sequence) -> tuple[str, str | None, tuple[ToolCall, ...]]:
    text, reasoning, calls = [], [], []
    for part in parts:
        if isinstance(part, str):
            text.append(part)
            continue
        if not isinstance(part, Mapping):
            raise DataError(f"a content part must be an object with a type, not {_show(part)}", kind="content")
        kind = part.get("type")
        if not isinstance(kind, str):
            raise DataError(f"a content part's type is {_show(kind)}, not text: {_show(part)}", kind="content")
        value = next((part[key] for key in ("value", kind, "text", "content") if part.get(key) is not None), None)
        if kind in _CALL_PARTS:
            calls.extend(parse_tool_call(part if value is None else value))
        elif kind in _TEXT_PARTS or kind in _REASONING_PARTS:
            if not isinstance(value, str):
                raise DataError(f"a content part of type {kind} has no text: {_show(part)}", kind="content")
            (text if kind in _TEXT_PARTS else reasoning).append(value)
        else:
            raise DataError(
                f"a content part of type {kind!r} cannot be read by a text model; known types: "
                f"{', '.join(sorted(_TEXT_PARTS | _REASONING_PARTS | _CALL_PARTS))}",
                kind="content",
            )
    return "".join(text), "\n".join(reasoning) if reasoning else None, tuple(calls)


def _reasoning(message: Mapping, found: str | None) -> str | None:
    """What a turn thought, which parts of its content or a key say; several must say the same."""
    for key in _REASONING_KEYS:
        value = message.get(key)
        if value is None:
            continue
        if not isinstance(value, str):
            raise DataError(f"{key} of a message must be text, not {_show(value)}", kind="content")
        if found and value and value != found:
            raise DataError(f"{key} of a message is not the reasoning that it has besides; keep one", kind="content")
        found = found or value
    return found


def parse_message(message: Any, ignored: Counter[str] | None = None) -> Message:
    """Reads a {role, content, ...} object; content may be text, typed parts, or null where there are tool calls.

    Keys that mean nothing here (an id, a time) are counted in `ignored`, never dropped in silence.

    >>> parse_message({"role": "assistant", "content": [{"type": "text", "text": "Hi"}], "train": False})
    Message(role='assistant', content='Hi', reasoning=None, tool_calls=(), name=None, tool_call_id=None, weight=0.0)

    Raises: DataError naming the role, key or part that is wrong.
    """
    if not isinstance(message, Mapping):
        raise DataError(f"a message must be an object with role and content, not {_show(message)}")
    if "role" not in message:
        raise DataError(f"a message has no role; its keys are {', '.join(map(str, message))}", kind="role")
    role = parse_role(message["role"])
    content = message.get("content")
    reasoning, calls = None, ()
    if isinstance(content, Sequence) and not isinstance(content, str):
        content, reasoning, calls = _parse_parts(content)
    for key in ("tool_calls", "function_call"):
        if message.get(key):
            calls += parse_tool_call(message[key])
    reasoning = _reasoning(message, reasoning)
    if content is None and role == "assistant" and (calls or reasoning is not None):
        content = ""
    if not isinstance(content, str):
        state = "no content" if content is None else f"content that is not text: {_show(content)}"
        raise DataError(f"a message of role {role} has {state}", kind="content")
    if role != "assistant" and (calls or reasoning is not None):
        raise DataError(f"a message of role {role} holds tool calls or reasoning; only assistant may", kind="role")
    for key, value in message.items():
        if key not in _KNOWN_KEYS and value not in (None, "", [], {}, ()):
            if key in ("refusal", "audio", "images", "image", "videos"):
                raise DataError(f"a message has {key!r}, which a text conversation cannot show", kind="content")
            if ignored is not None:
                ignored[f"messages[].{key}"] += 1
    name, call_id = message.get("name"), message.get("tool_call_id")
    return Message(
        role=role,
        content=content,
        reasoning=reasoning,
        tool_calls=calls,
        name=None if name is None else str(name),
        tool_call_id=None if call_id is None else str(call_id),
        weight=_parse_weight(message),
    )


def parse_conversation(messages: Any, ignored: Counter[str] | None = None) -> Conversation:
    """Reads a list of messages. The turn's number stands in every error.

    Raises: DataError.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise DataError(f"messages must be a list of {{role, content}}, not {_show(messages)}")
    if not messages:
        raise DataError("messages is an empty list")
    parsed = []
    for index, message in enumerate(messages):
        try:
            parsed.append(parse_message(message, ignored))
        except DataError as error:
            raise DataError(f"message {index}: {error}", kind=error.kind) from None
    return tuple(parsed)


def to_template(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates read them (Hugging Face's names); absent parts are absent keys.

    >>> to_template([Message(role="user", content="Hi")])
    [{'role': 'user', 'content': 'Hi'}]
    """
    out = []
    for message in messages:
        item: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.reasoning is not None:
            item["reasoning_content"] = message.reasoning
        if message.tool_calls:
            item["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                | ({"id": call.id} if call.id is not None else {})
                for call in message.tool_calls
            ]
        if message.name is not None:
            item["name"] = message.name
        if message.tool_call_id is not None:
            item["tool_call_id"] = message.tool_call_id
        out.append(item)
    return out
