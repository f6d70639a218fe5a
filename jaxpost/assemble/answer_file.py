"""Files of prompts, and files of answers that the same command goes on with."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxpost.text import strict_json
from jaxpost.text.console import as_line
from jaxpost.text.messages import parse_tools

Bare = str | Sequence[Mapping[str, Any]]
"""A text, or the messages of a conversation."""


@dataclass(frozen=True)
class Tooled:
    """A prompt, and definitions of the tools that the model may call."""

    prompt: Bare
    tools: tuple[Mapping[str, Any], ...]


Prompt = Bare | Tooled

Done = dict[tuple[int, int], dict[str, Any]]
"""(prompt, sample) -> row of the answer."""

_KEYS = ("prompt", "messages", "tools", "sampling")
_BEGIN = b'{"index": '
"""Of every row of answers."""


def parts(prompt: Prompt) -> tuple[Bare, tuple[Mapping[str, Any], ...] | None]:
    """The text or messages of a prompt, and its tools.

    >>> parts("Hi")
    ('Hi', None)
    """
    return (prompt.prompt, prompt.tools) if isinstance(prompt, Tooled) else (prompt, None)


def read_prompts(path: Path, notes: Any = None) -> tuple[list[Prompt], list[Any]]:
    """The prompts of a file with sampling parameters of their own: one a line, or JSONL rows.

    A row has "prompt" or "messages", and may have "tools", and "sampling": parameters by name that go before the
    command's, as they stand there: `generate` tells those that cannot be met in the row's answer. A key that is null is
    absent.

    Args:
      notes: a text stream where to say which keys of the rows nothing reads.

    Raises:
      ValueError: a malformed row, a file that is not UTF-8, one without prompts; names file and line.
    """
    lines = _lines(path)
    if path.suffix.lower() not in (".jsonl", ".ndjson", ".json"):
        found = [line for line in lines if line.strip()]
        return list(found), [{}] * len(found)
    prompts: list[Prompt] = []
    own: list[Any] = []
    unread: Counter[str] = Counter()
    for number, line in enumerate(lines, 1):
        if line.strip():
            row = _row(line, f"{path}, line {number}")
            prompts.append(_prompt(row, f"{path}, line {number}"))
            own.append(row.get("sampling", {}))
            unread.update(key for key in row if key not in _KEYS)
    if unread and notes is not None:
        told = ", ".join(f"{key!r} ({count} row{'s' if count > 1 else ''})" for key, count in unread.items())
        print(f"{path}: nothing reads {told}; a row may have {', '.join(_KEYS)}", file=notes)
    return prompts, own


def _row(line: str, where: str) -> dict[str, Any]:
    """The keys of a row that are not null."""
    try:
        row = strict_json.loads(line)
    except (ValueError, RecursionError) as error:
        if isinstance(error, strict_json.RepeatedKey):
            raise ValueError(f"{where}: {error}") from None
        why = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise ValueError(f"{where}: not JSON, of which each line is a row ({why})") from None
    return {key: value for key, value in row.items() if value is not None} if isinstance(row, dict) else {}


def _prompt(row: Mapping[str, Any], where: str) -> Prompt:
    if "prompt" in row and "messages" in row:
        raise ValueError(f'{where}: a row has "prompt" or "messages", not both: leave one of them out')
    found = row.get("messages", row.get("prompt"))
    if not isinstance(found, str | list):
        raise ValueError(f'{where}: a row needs "prompt" (a text or messages) or "messages"')
    if isinstance(found, list) and not all(isinstance(turn, dict) for turn in found):
        raise ValueError(f'{where}: a message is {{"role": "user", "content": "..."}}, not {found!r}')
    try:
        tools = parse_tools(row.get("tools"))
    except ValueError as error:
        raise ValueError(f'{where}: "tools": {error}') from None
    return Tooled(found, tools) if tools else found


def _lines(path: Path) -> list[str]:
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = raw[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {number}: not UTF-8 ({error.reason}); save the file in that encoding") from None
    # Not splitlines: JSON may hold its other line breaks, as U+2028, as they are.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if not any(line.strip() for line in lines):
        raise ValueError(f"{path} holds no prompt: write one a line")
    return lines


def digest(settings: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that two sets of settings share only if they are the same.

    Example:
      >>> digest({"seed": 0, "model": "a"}) == digest({"model": "a", "seed": 0}) != digest({"model": "a", "seed": 1})
      True
    """
    told = json.dumps({name: repr(value) for name, value in settings.items()}, sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:12]


def identity(model: str) -> list[Any]:
    """What tells a model from another: its name, and of a folder when its weights were written."""
    files = sorted(Path(model).glob("*.safetensors"))
    return [model, *((file.name, file.stat().st_mtime_ns) for file in files)]


def finished(out: Path, prompts: Sequence[Prompt], settings: Sequence[str]) -> Done:
    """Answers that a file holds already; a torn last line is cut off.

    Rows that failed are made again, whatever was asked then: the prompt or its parameters may have been mended since.

    Args:
      settings: what decides each prompt's answers, as `digest` tells it. A row that tells none is taken as it is.

    Raises:
      ValueError: what is no file of answers to these prompts; it stays as it is.
    """
    found: Done = {}
    for number, line in enumerate(whole_lines(out, _BEGIN, "jaxpost generate"), 1):
        try:
            row = json.loads(line)
            key, prompt, failed = (row["index"], row["sample"]), row["prompt"], "error" in row
            if any(isinstance(part, bool) or not isinstance(part, int) for part in key):
                raise ValueError("no numbers of a prompt and a sample")
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"{out}, line {number}: not an answer of `jaxpost generate`; name another file") from None
        if failed:
            continue
        if not 0 <= key[0] < len(prompts) or prompt != parts(prompts[key[0]])[0]:
            raise ValueError(f"{out}, line {number}: answers another prompt than number {key[0]}; name another file")
        if row.get("settings", settings[key[0]]) != settings[key[0]]:
            told = f"{out}, line {number}: answered by another model, or with other parameters, than are asked for now"
            raise ValueError(f"{told}; name another file, or remove this one")
        found[key] = row
    if out.exists():
        write_all(out, list(found.values()))
    return found


def whole_lines(out: Path, begin: bytes, command: str) -> list[bytes]:
    """The lines of a file of rows, without a torn last one; none where there is no file.

    Args:
      begin: of every row, by which a torn one is known: any other text is somebody's, and must not be cut off.
      command: what wrote the rows.

    Raises:
      ValueError: an end that is no row's beginning; what is no file, as /dev/null, for it would be replaced by one.
    """
    if not out.exists():
        return []
    if not out.is_file():
        raise ValueError(f"{out} is no regular file; rows are kept, and gone on with, in one: name a file")
    *lines, torn = out.read_bytes().split(b"\n")
    if torn[: len(begin)] != begin[: len(torn)]:
        told = f"{out}, line {len(lines) + 1}: not the beginning of a row of `{command}`"
        raise ValueError(f"{told}; name another file, or end the line if it is a whole row")
    return lines


def write_all(out: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replaces the file at once, so that an interruption leaves the old one; where it is a link, what that leads to."""
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    part.write_text("".join(as_line(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(part, out)


class Appending:
    """The output file opened at its end, or None."""

    def __init__(self, out: Path | None):
        self._out, self._file = out, None

    def __enter__(self) -> Any:
        if self._out is not None:
            self._out.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._out.open("a", encoding="utf-8")
        return self._file

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
