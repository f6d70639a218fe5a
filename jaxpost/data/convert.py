"""Other people's row shapes, turned into the ecosystem's formats.

    openai     messages [{role, content, tool_calls ...}] (also under `conversations`), tools
    sharegpt   conversations [{from, value}], system, tools as JSON text
    alpaca     instruction, input, output (or response), system, history
    oasst      a tree of messages (prompt {text, role, replies}), or rows linked by a parent's id

Files of judged answers have converters of their own: `convert_judged` and `convert_steps`.
A converter gives one or several rows for one row; each says what it leaves out.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxpost.data.convert_judged import JUDGED_CONVERTERS, detect_judged
from jaxpost.data.convert_steps import STEP_CONVERTERS, detect_steps
from jaxpost.text.messages import DataError

Converter = Callable[[Mapping[str, Any], Counter[str]], list[dict[str, Any]]]

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}
_CALL_ROLES = ("function_call", "tool_call")


def detect_converter(row: Mapping[str, Any]) -> str:
    """The converter that a row needs; "none" where it already has the keys of a format.

    >>> detect_converter({"instruction": "Say hi", "output": "Hi"})
    'alpaca'
    """
    turns = row.get("conversations", row.get("conversation"))
    if isinstance(turns, Sequence) and not isinstance(turns, str) and turns and isinstance(turns[0], Mapping):
        return "sharegpt" if "from" in turns[0] else "openai"
    if "instruction" in row and {"output", "response", "instances", "chosen"} & row.keys():
        return "alpaca"
    if isinstance(row.get("prompt"), Mapping) and "replies" in row["prompt"]:
        return "oasst"
    if "messages" in row:
        return "openai"
    return "none"


def from_openai(row: Mapping[str, Any], ignored: Counter[str]) -> list[dict[str, Any]]:
    """messages, tools (or functions), and label where the last turn is judged good or bad."""
    out = dict(row)
    for key in ("conversations", "conversation"):
        if out.get(key) is not None and out.get("messages") is None:
            out["messages"] = out.pop(key)
    if not out.get("tools") and out.get("functions"):
        out["tools"] = out.pop("functions")
    return [_judged(out, ignored)]


def _beside(rest: Mapping[str, Any], new: Mapping[str, Any], ignored: Counter[str]) -> dict[str, Any]:
    """`new` in the place of what the rest has under the same keys, which is counted as not read."""
    ignored.update(key for key in new if rest.get(key) is not None)
    return {**rest, **new}


def _judged(row: dict[str, Any], ignored: Counter[str]) -> dict[str, Any]:
    """messages + label is an unpaired preference on the last turn; messages + chosen is a preference's prompt."""
    messages = row.get("messages")
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        return row
    rest = {key: value for key, value in row.items() if key != "messages"}
    if {"chosen", "rejected"} <= row.keys():
        both = [row[key] for key in ("chosen", "rejected")]
        if all(isinstance(answer, Mapping) for answer in both):
            sides = {"chosen": [row["chosen"]], "rejected": [row["rejected"]]}
            return {**_beside(rest, {"prompt": messages}, ignored), **sides}
        return row
    if isinstance(row.get("label"), bool) and len(messages) > 1:
        return _beside(rest, {"prompt": messages[:-1], "completion": messages[-1:]}, ignored)
    return row


def from_sharegpt(row: Mapping[str, Any], ignored: Counter[str]) -> list[dict[str, Any]]:
    """conversations [{from, value}] -> messages. function_call turns join the assistant turn they belong to."""
    key = "conversations" if row.get("conversations") is not None else "conversation"
    turns = row.get(key)
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise DataError(f"a ShareGPT row needs conversations, a list of {{from, value}}; it has {', '.join(row)}")
    messages = [_sharegpt_turn(turn, index, ignored) for index, turn in enumerate(turns)]
    first = messages[0] if messages and messages[0]["role"] == "system" else None
    if row.get("system") and first is None:
        messages.insert(0, {"role": "system", "content": row["system"]})
    elif row.get("system") and first is not None and first["content"] != row["system"]:
        raise DataError("the row's system is not what its system turn says; keep one of them")
    if row.get("messages") is not None and row["messages"] != messages:
        raise DataError(f"the row has {key} and messages, which differ; keep one of them")
    out = {k: v for k, v in row.items() if k not in (key, "system")}
    for answer in ("chosen", "rejected"):
        if isinstance(row.get(answer), Mapping) and "from" in row[answer]:
            out[answer] = _sharegpt_turn(row[answer], answer, ignored)
    out["messages"] = messages
    return [_judged(out, ignored)]


def _sharegpt_turn(turn: Any, index: int | str, ignored: Counter[str]) -> dict[str, Any]:
    if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
        raise DataError(f"conversations[{index}] must have from and value, not {turn!r:.80}")
    speaker, value = turn["from"], turn["value"]
    if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
        known = ", ".join(_SHAREGPT_ROLES)
        raise DataError(f"conversations[{index}]: unknown speaker {speaker!r:.80}; known: {known}", kind="role")
    message = {"role": _SHAREGPT_ROLES[speaker], "content": value}
    if speaker in _CALL_ROLES:
        message = {"role": "assistant", "content": None, "tool_calls": value}
    extra = {k: v for k, v in turn.items() if k not in ("from", "value") and v is not None}
    if "role" in extra and isinstance(extra["role"], str):
        extra["role"] = _SHAREGPT_ROLES.get(extra["role"], extra["role"])
    for name in message.keys() & extra.keys():
        if extra[name] != message[name]:
            raise DataError(f"conversations[{index}] says {name} beside from and value, and otherwise; keep one")
    return {**extra, **message}


def from_alpaca(row: Mapping[str, Any], ignored: Counter[str]) -> list[dict[str, Any]]:
    """instruction + input -> a user turn (a blank line between them), output -> an assistant turn.

    `instances` [{input, output}] gives a row each; `history` [[question, answer]] comes before.
    """
    instruction = row.get("instruction")
    if not isinstance(instruction, str):
        raise DataError(f"an Alpaca row needs instruction as text; it has {', '.join(row)}")
    used = {"instruction", "input", "output", "response", "system", "history", "instances", "chosen", "rejected"}
    rest = {key: value for key, value in row.items() if key not in used}
    if "instances" in row:
        if not isinstance(row["instances"], Sequence) or not row["instances"]:
            raise DataError("instances must be a list of {input, output} that is not empty")
        ignored.update(key for key in ("output", "response") if row.get(key) is not None)
        shared = {key: value for key, value in row.items() if key not in ("output", "response")}
        found = [_instance(instance, n, ignored) for n, instance in enumerate(row["instances"])]
        return [_alpaca_row({**shared, **instance}, rest, ignored) for instance in found]
    return [_alpaca_row(row, rest, ignored)]


def _instance(instance: Any, index: int, ignored: Counter[str]) -> dict[str, Any]:
    if not isinstance(instance, Mapping) or "output" not in instance:
        raise DataError(f"instances[{index}] must have input and output")
    used = ("input", "output")
    ignored.update(f"instances[].{key}" for key, value in instance.items() if key not in used and value is not None)
    return {key: instance[key] for key in used if key in instance}


def _alpaca_row(row: Mapping[str, Any], rest: dict[str, Any], ignored: Counter[str]) -> dict[str, Any]:
    given = row.get("input")
    if given is not None and not isinstance(given, str):
        raise DataError(f"input must be text, not {given!r:.80}")
    prompt: list[dict[str, Any]] = []
    if row.get("system"):
        prompt.append({"role": "system", "content": row["system"]})
    for pair in row.get("history") or ():
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise DataError(f"history must be a list of [question, answer], not {pair!r:.80}")
        prompt += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    text = row["instruction"] + ("\n\n" + given if given and given.strip() else "")
    prompt.append({"role": "user", "content": text})
    given = [row[key] for key in ("output", "response") if row.get(key) is not None]
    if {"chosen", "rejected"} <= row.keys():
        ignored.update(key for key in ("output", "response") if row.get(key) is not None)
        answers = {key: [{"role": "assistant", "content": row[key]}] for key in ("chosen", "rejected")}
        return _beside(rest, {"prompt": prompt, **answers}, ignored)
    if not given or not isinstance(given[0], str):
        raise DataError(f"an Alpaca row needs output (or response) as text; it has {', '.join(row)}")
    if given[0] != given[-1]:
        raise DataError("the row has output and response, which differ; keep one of them")
    return _beside(rest, {"prompt": prompt, "completion": [{"role": "assistant", "content": given[0]}]}, ignored)


def from_oasst(row: Mapping[str, Any], ignored: Counter[str]) -> list[dict[str, Any]]:
    """A conversation for each path through a tree that follows the best-ranked assistant reply at every step.

    Paths that part at a user's turn share their beginning; an assistant turn is trained in the first of them and
    only read in the others, so each is trained once. Replies ranked lower, and deleted ones, are counted.
    """
    root = row.get("prompt")
    if not isinstance(root, Mapping):
        raise DataError("an OpenAssistant tree needs prompt {text, role, replies}")
    rows = []
    seen: set[int] = set()
    for path in _paths(root, ignored):
        messages = []
        for node in path:
            message = {"role": node.get("role"), "content": node.get("text")}
            if message["role"] == "assistant":
                message["train"] = id(node) not in seen
                seen.add(id(node))
            messages.append(message)
        while messages and messages[-1]["role"] != "assistant":
            ignored["oasst: unanswered user turns"] += 1
            messages.pop()
        if any(message.get("train") for message in messages):
            rows.append({"messages": messages})
    if not rows:
        raise DataError("the tree has no assistant reply", kind="empty_mask")
    return rows


def _paths(node: Mapping[str, Any], ignored: Counter[str]) -> Iterator[list[Mapping[str, Any]]]:
    """Root-to-leaf paths: all user turns, but of assistant replies only the best (lowest rank, else the first)."""
    replies = node.get("replies") or []
    if not isinstance(replies, list | tuple) or not all(isinstance(reply, Mapping) for reply in replies):
        raise DataError(f"replies must be a list of messages, not {replies!r:.80}")
    kept = [reply for reply in replies if not reply.get("deleted")]
    ignored["oasst: deleted messages"] += len(replies) - len(kept)
    answers = [reply for reply in kept if reply.get("role") == "assistant"]
    if len(answers) > 1:
        best = min(answers, key=_rank)
        ignored["oasst: replies ranked lower"] += len(answers) - 1
        kept = [best, *(reply for reply in kept if reply.get("role") != "assistant")]
    if not kept:
        yield [node]
    for reply in kept:
        for path in _paths(reply, ignored):
            yield [node, *path]


def _rank(reply: Mapping[str, Any]) -> tuple[bool, int | float]:
    """By which replies are sorted; those without a rank come last."""
    rank = reply.get("rank")
    if rank is not None and not isinstance(rank, int | float):
        raise DataError(f"the rank of a reply is {rank!r:.80}; it must be a number or null")
    return rank is None, rank or 0


_ID_KEYS = (("message_id", "parent_id"), ("user_message_id", "parent_message_id"))


def is_linked(row: Mapping[str, Any]) -> bool:
    """Whether a row is one message of a tree whose other messages are other rows."""
    return {"text", "role"} <= row.keys() and any({a, b} <= row.keys() for a, b in _ID_KEYS)


def link_messages(rows: Sequence[Mapping[str, Any]], places: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Joins rows that are single messages into trees, by their parents' ids, in the order of the roots.

    Args:
      places: where each row stands, for errors.

    Raises: DataError where an id is missing, no row's, or there twice, and where parents go round in a circle.
    """
    own, parent = next(keys for keys in _ID_KEYS if set(keys) <= rows[0].keys())
    for number, row in enumerate(rows):
        where = f"{places[number]}: " if places else ""
        if not isinstance(row.get(own), str | int):
            raise DataError(f"{where}{own} must be a text or a number, not {row.get(own)!r:.80}")
        if not isinstance(row.get(parent, ...), str | int | None):
            found = f"not {row[parent]!r:.80}" if parent in row else "but the row has none"
            raise DataError(f"{where}{parent} must be a text, a number, or null where a tree begins, {found}")
    nodes = {row[own]: {**row, "replies": []} for row in rows}
    if len(nodes) != len(rows):
        twice = [key for key, n in Counter(row[own] for row in rows).items() if n > 1]
        raise DataError(f"{own} {twice[0]!r} stands in {len(rows) - len(nodes) + 1} rows; ids must be unique")
    roots = []
    for node in nodes.values():
        if node[parent] is None:
            roots.append(node)
        elif node[parent] in nodes:
            nodes[node[parent]]["replies"].append(node)
        else:
            raise DataError(f"the message {node[own]!r} names a parent {node[parent]!r} that no row has")
    reached, waiting = set(), list(roots)
    while waiting:
        node = waiting.pop()
        reached.add(node[own])
        waiting += node["replies"]
    if lost := [key for key in nodes if key not in reached]:
        number = next(n for n, row in enumerate(rows) if row[own] == lost[0])
        where = f"{places[number]}: " if places else ""
        raise DataError(f"{where}the parents of the message {lost[0]!r} go round in a circle; one of them must be null")
    return [{"prompt": root} for root in roots]


CONVERTERS: dict[str, Converter] = {
    "openai": from_openai,
    "sharegpt": from_sharegpt,
    "alpaca": from_alpaca,
    "oasst": from_oasst,
    "none": lambda row, ignored: [dict(row)],
}


def convert(row: Mapping[str, Any], name: str, ignored: Counter[str], kind: str | None = None) -> list[dict[str, Any]]:
    """Rows in one of the ecosystem's formats.

    Args:
      name: whose row it is; "auto" recognises the shape from the keys.
      kind: what judged rows are wanted for; None: rows for supervised training are wanted.
    """
    if name == "auto":
        name = (kind and (detect_judged(row) or detect_steps(row))) or detect_converter(row)
    judged = JUDGED_CONVERTERS | STEP_CONVERTERS
    if name in judged and (kind is not None or name not in CONVERTERS):
        try:
            return judged[name](row, ignored, kind or "pairs")
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"the row is not as {name} rows are ({reason}); set the source's convert") from None
    return CONVERTERS[name](row, ignored)


def as_json(row: Mapping[str, Any]) -> str:
    """A row as one line of JSON, for the file of rejected rows."""
    try:
        return json.dumps(row, ensure_ascii=False, default=str)
    except RecursionError:  # its keys tell which row it was
        return json.dumps(dict.fromkeys(row, "nested too deep to be shown"), ensure_ascii=False)
