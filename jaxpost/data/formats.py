"""The row formats of the ecosystem, as typed examples.

    language_modeling     text                              or messages
    prompt_only           prompt
    prompt_completion     prompt, completion
    preference            (prompt,) chosen, rejected
    unpaired_preference   prompt, completion, label (true or false)
    stepwise              prompt, completions [text], labels [true or false]

Each text may be plain or conversational (a list of messages); `tools` may stand beside any of them. Supervised
fine-tuning trains on the first and the third; all are read, checked and shown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxpost.text.messages import Conversation, DataError, Message, parse_conversation, parse_tools

Text = str | Conversation
Tools = tuple[dict, ...] | None


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


@dataclass(frozen=True, kw_only=True)
class Preference:
    """Two answers, of which the first is better. The common beginning is the prompt where the row gave none."""

    prompt: Text
    chosen: Text
    rejected: Text
    tools: Tools = None


@dataclass(frozen=True, kw_only=True)
class UnpairedPreference:
    """An answer that is good (True) or bad (False)."""

    prompt: Text
    completion: Text
    label: bool
    tools: Tools = None


@dataclass(frozen=True, kw_only=True)
class Stepwise:
    """An answer in steps, each right (True) or wrong (False)."""

    prompt: Text
    completions: tuple[str, ...]
    labels: tuple[bool, ...]
    tools: Tools = None


Example = LanguageModeling | PromptOnly | PromptCompletion | Preference | UnpairedPreference | Stepwise

FORMATS: dict[str, type] = {
    "language_modeling": LanguageModeling,
    "prompt_only": PromptOnly,
    "prompt_completion": PromptCompletion,
    "preference": Preference,
    "unpaired_preference": UnpairedPreference,
    "stepwise": Stepwise,
}
_REQUIRED = {
    "language_modeling": ({"text"}, {"messages"}),
    "prompt_only": ({"prompt"},),
    "prompt_completion": ({"prompt", "completion"},),
    "preference": ({"chosen", "rejected"},),
    "unpaired_preference": ({"prompt", "completion", "label"},),
    "stepwise": ({"prompt", "completions", "labels"},),
}
_USED = {name: set().union(*options) | {"prompt", "tools"} for name, options in _REQUIRED.items()}
_USED["language_modeling"] = {"text", "messages", "tools"}
_DETECTION = ("preference", "stepwise", "unpaired_preference", "prompt_completion", "language_modeling", "prompt_only")


def texts_of(example: Example) -> list[str]:
    """Every text of an example, for counting and searching."""
    out = []
    for value in vars(example).values():
        if isinstance(value, str):
            out.append(value)
        elif isinstance(value, tuple):
            out += [v.content if isinstance(v, Message) else v for v in value if isinstance(v, Message | str)]
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
    if ignored is not None:
        for key, value in row.items():
            if key not in _USED[name] and value is not None:
                ignored[key] += 1

    def text(key: str) -> Text:
        return parse_text(row[key], key, ignored)

    if name == "language_modeling":
        content = text("messages") if "messages" in row else text("text")
        if "messages" in row and isinstance(content, str):
            raise DataError("messages must be a list of messages, not text")
        return LanguageModeling(content=content, tools=tools)
    if name == "prompt_only":
        return PromptOnly(prompt=text("prompt"), tools=tools)
    if name == "prompt_completion":
        prompt, completion = _same_kind(text("prompt"), text("completion"))
        return PromptCompletion(prompt=prompt, completion=completion, tools=tools)
    if name == "preference":
        return _preference(text("prompt") if row.get("prompt") else None, text("chosen"), text("rejected"), tools)
    if name == "unpaired_preference":
        prompt, completion = _same_kind(text("prompt"), text("completion"))
        return UnpairedPreference(
            prompt=prompt, completion=completion, label=_label(row["label"], "label"), tools=tools
        )
    return _stepwise(text("prompt"), row["completions"], row["labels"], tools)


def _same_kind(prompt: Text, value: Text) -> tuple[Text, Text]:
    """A plain prompt beside a conversational answer is that answer's user turn, and the reverse."""
    if isinstance(prompt, str) and not isinstance(value, str):
        return (Message(role="user", content=prompt),), value
    if not isinstance(prompt, str) and isinstance(value, str):
        return prompt, (Message(role="assistant", content=value),)
    return prompt, value


def _label(value: Any, key: str) -> bool:
    if isinstance(value, bool) or value in (0, 1):
        return bool(value)
    raise DataError(
        f"{key} must be true or false, not {value!r:.80}; if the column means something else, set the source's format"
    )


def _preference(prompt: Text | None, chosen: Text, rejected: Text, tools: Tools) -> Preference:
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise DataError("chosen and rejected must both be text or both be messages")
    if prompt is not None:
        prompt, chosen = _same_kind(prompt, chosen)
        prompt, rejected = _same_kind(prompt, rejected)
        # Some files repeat the prompt at the head of both answers.
        if not isinstance(prompt, str) and chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    else:
        shared = _common_prefix(chosen, rejected)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not chosen or not rejected or chosen == rejected:
        raise DataError("one of chosen and rejected has nothing that the other lacks, so neither is better")
    return Preference(prompt=prompt, chosen=chosen, rejected=rejected, tools=tools)


def _common_prefix(a: Text, b: Text) -> int:
    """Turns or characters that both begin with; of plain texts, up to the start of the word where they part."""
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    if isinstance(a, str) and isinstance(b, str):
        while n > 0 and not a[n - 1].isspace():
            n -= 1
        while n > 0 and a[n - 1] == " ":
            n -= 1
    return n


def _stepwise(prompt: Text, completions: Any, labels: Any, tools: Tools) -> Stepwise:
    if not isinstance(completions, Sequence) or isinstance(completions, str):
        raise DataError(f"completions must be a list of steps, not {completions!r:.80}")
    if not isinstance(labels, Sequence) or isinstance(labels, str) or len(labels) != len(completions):
        raise DataError(f"labels must be a list with one entry for each of the {len(completions)} completions")
    for index, step in enumerate(completions):
        if not isinstance(step, str):
            raise DataError(f"completions[{index}] must be text, not {step!r:.80}")
    checked = tuple(_label(label, f"labels[{index}]") for index, label in enumerate(labels))
    return Stepwise(prompt=prompt, completions=tuple(completions), labels=checked, tools=tools)
