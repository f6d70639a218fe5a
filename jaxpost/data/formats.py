"""The row formats of the ecosystem, as typed examples.

    language_modeling     text                              or messages
    prompt_only           prompt
    prompt_completion     prompt, completion
    preference            (prompt,) chosen, rejected
    ranking               prompt, completions, ranks or scores
    unpaired_preference   prompt, completion, label (true or false)
    scored                prompt, completion, score
    stepwise              prompt, completions [text], labels or first_error

Each text may be plain or conversational (a list of messages); `tools` may stand beside any of them. Supervised
fine-tuning trains on the first and the third; preference optimisation and reward models on the last five (`judged`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxpost.data.judged import (
    EXTRA,
    REQUIRED,
    Preference,
    Ranking,
    Scored,
    Stepwise,
    UnpairedPreference,
    parse_judged,
)
from jaxpost.data.texts import Text, Tools, parse_text, same_kind
from jaxpost.text.messages import DataError, Message, parse_tools


@dataclass(frozen=True, kw_only=True)
class LanguageModeling:
    """A whole text or conversation."""

    content: Text
    tools: Tools = None


@dataclass(frozen=True, kw_only=True)
class PromptOnly:
    """What a policy is asked."""

    prompt: Text
    tools: Tools = None


@dataclass(frozen=True, kw_only=True)
class PromptCompletion:
    """A prompt and its answer, of the same kind (both plain or both conversational)."""

    prompt: Text
    completion: Text
    tools: Tools = None


Example = (
    LanguageModeling | PromptOnly | PromptCompletion | Preference | Ranking | UnpairedPreference | Scored | Stepwise
)

FORMATS: dict[str, type] = {
    "language_modeling": LanguageModeling,
    "prompt_only": PromptOnly,
    "prompt_completion": PromptCompletion,
    "preference": Preference,
    "ranking": Ranking,
    "unpaired_preference": UnpairedPreference,
    "scored": Scored,
    "stepwise": Stepwise,
}
_REQUIRED: dict[str, tuple[set[str], ...]] = {
    "language_modeling": ({"text"}, {"messages"}),
    "prompt_only": ({"prompt"},),
    "prompt_completion": ({"prompt", "completion"},),
    **REQUIRED,
}
_USED = {
    name: set().union(*options) | EXTRA.get(name, set()) | {"prompt", "tools"} for name, options in _REQUIRED.items()
}
_USED["language_modeling"] = {"text", "messages", "tools"}
_DETECTION = (
    *("ranking", "preference", "stepwise", "scored", "unpaired_preference"),
    *("prompt_completion", "language_modeling", "prompt_only"),
)


def texts_of(example: Example) -> list[str]:
    """Every text of an example, for counting and searching."""
    out: list[str] = []

    def add(value: Any) -> None:
        if isinstance(value, str | Message):
            out.append(value if isinstance(value, str) else value.content)
        elif isinstance(value, tuple):
            for part in value:
                add(part)

    for key, value in vars(example).items():
        if key not in ("subset", "strength", "tools"):
            add(value)
    return out


def detect_format(columns: Sequence[str]) -> str:
    """The format that a row with these columns has: the one that uses the most specific of them.

    >>> detect_format(["prompt", "completion", "label"])
    'unpaired_preference'

    Raises: DataError that lists the formats.
    """
    present = set(columns)
    for name in _DETECTION:
        if any(required <= present for required in _REQUIRED[name]):
            return name
    raise DataError(
        f"no row format has the keys {', '.join(map(str, columns)) or '(none)'}; rename them with `columns` "
        "(for example {prompt: question, completion: answer}) to one of: "
        + "; ".join(f"{name}: {' or '.join(', '.join(sorted(keys)) for keys in _REQUIRED[name])}" for name in FORMATS)
    )


def parse_example(row: Mapping[str, Any], name: str, ignored: Counter[str] | None = None) -> Example:
    """Reads a row of a format. Columns that the format does not use are counted in `ignored`.

    >>> parse_example({"prompt": "2+2=", "completion": "4"}, "prompt_completion")
    PromptCompletion(prompt='2+2=', completion='4', tools=None)

    Raises: DataError naming the missing key or the wrong value.
    """
    options = _REQUIRED[name]
    if not any(required <= row.keys() for required in options):
        wanted = " or ".join(", ".join(sorted(required)) for required in options)
        raise DataError(f"a {name} row needs {wanted}; this row has {', '.join(map(str, row)) or 'no keys'}")
    tools = parse_tools(row.get("tools"))
    content_key = "messages" if row.get("messages") is not None or "text" not in row else "text"
    unread = {"text"} if content_key == "messages" else set()  # it is often the same conversation, rendered
    if ignored is not None:
        for key, value in row.items():
            if (key not in _USED[name] or key in unread) and value is not None:
                ignored[key] += 1

    def text(key: str) -> Text:
        return parse_text(row[key], key, ignored)

    if name == "language_modeling":
        content = text(content_key)
        if content_key == "messages" and isinstance(content, str):
            raise DataError("messages must be a list of messages, not text")
        return LanguageModeling(content=content, tools=tools)
    if name == "prompt_only":
        return PromptOnly(prompt=text("prompt"), tools=tools)
    if name == "prompt_completion":
        prompt, completion = same_kind(text("prompt"), text("completion"))
        return PromptCompletion(prompt=prompt, completion=completion, tools=tools)
    return parse_judged(row, name, text, tools)
