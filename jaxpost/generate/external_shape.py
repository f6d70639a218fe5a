"""The shape of an answer in the words that an OpenAI-compatible server knows, and whether its answers keep to it.

Servers leave out of account what they do not know, without a word: so every answer is looked at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from jaxpost.generate.grammar import Constraint

_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
    "number": (int, float),
    "integer": (int, float),
}


def in_words_of(server: str | None, constraint: Constraint, *, chat: bool) -> dict[str, Any]:
    """What a request says, beside its other keys, so that the answer keeps to a constraint.

    A JSON schema is OpenAI's `response_format`, but sglang's and llama.cpp's `json_schema` where a text is continued;
    a regex and a choice are vLLM's `structured_outputs`, sglang's `regex`, and for a choice llama.cpp's `grammar`.

    Args:
      server: "vllm", "sglang" or "llamacpp", which they call the owner of their models; any other is asked as vLLM is.
      chat: the request holds messages.

    Raises:
      ValueError: the server has no word for it.

    Example:
      >>> in_words_of("vllm", Constraint(choice=["yes", "no"]), chat=True)
      {'structured_outputs': {'choice': ['yes', 'no']}}
      >>> in_words_of("llamacpp", Constraint(choice=["yes", "no"]), chat=True)
      {'grammar': 'root ::= "yes" | "no"'}
    """
    if constraint.json is not None:
        text = str(constraint.json)
        if not chat and server == "sglang":
            return {"json_schema": text}
        if not chat and server == "llamacpp":
            return {"json_schema": json.loads(text)}
        asked = {"name": "answer", "schema": json.loads(text), "strict": True}
        return {"response_format": {"type": "json_schema", "json_schema": asked}}
    if server == "llamacpp":
        if constraint.choice is None:
            raise ValueError(
                "llama.cpp's server knows choices and JSON schemas, no regular expressions: give one of those"
            )
        return {"grammar": "root ::= " + " | ".join(f'"{_quoted(text)}"' for text in constraint.choice)}
    if server == "sglang":
        if constraint.choice is None:
            return {"regex": constraint.regex}
        return {"regex": f"({'|'.join(map(_plain, constraint.choice))})"}
    return {"structured_outputs": {constraint.kind: list(constraint.choice) if constraint.choice else constraint.regex}}


def check(constraint: Constraint) -> None:
    """Makes sure that answers can be held against a constraint, before a server is asked for any.

    Raises:
      ValueError: what is no regular expression of Python's, or no JSON schema; named.

    Example:
      >>> check(Constraint(regex="[0-9]+"))
    """
    if constraint.regex is not None:
        try:
            re.compile(constraint.regex)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{constraint} cannot be used: {error}") from None
    if constraint.json is not None and (wrong := _malformed(json.loads(str(constraint.json)))) is not None:
        raise ValueError(f"{constraint} cannot be used: {wrong}")


def fault(constraint: Constraint, text: str) -> str | None:
    """Why a whole answer does not keep to a constraint; None where it does.

    Of a JSON schema `type`, `enum`, `const`, `properties`, `required`, `additionalProperties: false` and `items` count.

    Example:
      >>> fault(Constraint(choice=["yes", "no"]), "Yes!") is None
      False
    """
    if constraint.json is not None:
        try:
            answer = json.loads(text, parse_constant=_no_number)
            wrong = _wrong(json.loads(str(constraint.json)), answer, "the answer")
        except (ValueError, RecursionError):
            wrong = "it is not JSON"
        kept = wrong is None
    else:
        wrong = None
        kept = text in constraint.choice if constraint.choice else bool(re.fullmatch(constraint.regex or "", text))
    if kept:
        return None
    said = "" if wrong is None else f" ({wrong})"
    return f"the server's answer does not keep to {constraint}{said}, as if it did not know what that is"


def _wrong(schema: Any, value: Any, where: str) -> str | None:
    """The first thing that is not as a JSON schema has it."""
    if not isinstance(schema, Mapping):
        return f"{where} may not be" if schema is False else None
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is(kind, value) for kind in kinds):
        return f"{where} is not of type {' or '.join(kinds)}"
    choices = [schema["enum"]] if "enum" in schema else []
    choices += [[schema["const"]]] if "const" in schema else []
    if not all(any(_equal(value, other) for other in allowed) for allowed in choices):
        return f"{where} is none of the values allowed"
    found: list[str | None] = []
    if isinstance(value, dict):
        named = schema.get("properties", {})
        found += [f"{where} lacks {name!r}" for name in schema.get("required", []) if name not in value]
        if schema.get("additionalProperties") is False and "patternProperties" not in schema:
            found += [f"{where} has {name!r}" for name in value if name not in named]
        found += [_wrong(named[name], part, name) for name, part in value.items() if name in named]
    if isinstance(value, list) and isinstance(schema.get("items"), Mapping) and "prefixItems" not in schema:
        found += [_wrong(schema["items"], part, f"{where}[{i}]") for i, part in enumerate(value)]
    return next((wrong for wrong in found if wrong is not None), None)


def _is(kind: str, value: Any) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    whole = kind != "integer" or not isinstance(value, float) or value.is_integer()
    return whole and isinstance(value, _TYPES.get(kind, object))


def _equal(one: Any, other: Any) -> bool:
    """As JSON's values are: true is not 1, though Python's is."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[name], other[name]) for name in one)
    return bool(one == other)


def _no_number(word: str) -> None:
    """Raises: ValueError, for Python reads NaN and Infinity, which are not JSON."""
    raise ValueError(f"{word} is not JSON")


def _malformed(schema: Any) -> str | None:
    """Which of the keywords that `fault` reads has a value that it cannot have."""
    if isinstance(schema, bool):
        return None
    if not isinstance(schema, Mapping):
        return f"{json.dumps(schema)[:200]} is no schema"
    kinds, parts = schema.get("type", []), schema.get("properties", {})
    texts = {"type": [kinds] if isinstance(kinds, str) else kinds, "required": schema.get("required", [])}
    for name, value in texts.items():
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            return f'"{name}" is {json.dumps(schema[name])[:200]}'
    if not isinstance(schema.get("enum", []), list):
        return f'"enum" is {json.dumps(schema["enum"])[:200]}; write a list'
    if not isinstance(parts, Mapping):
        return f'"properties" is {json.dumps(parts)[:200]}; write names and schemas in braces'
    below = [*parts.values(), *([schema["items"]] if isinstance(schema.get("items"), Mapping) else [])]
    return next((wrong for part in below if (wrong := _malformed(part)) is not None), None)


def _quoted(text: str) -> str:
    """As it stands between quotes in llama.cpp's grammars."""
    return "".join(f"\\x{ord(c):02x}" if c < " " or c in '"\\\x7f' else c for c in text)


def _plain(text: str) -> str:
    """As a regular expression that matches it alone."""
    return re.sub(r"([\\^$.|?*+()\[\]{}])", r"\\\1", text)
