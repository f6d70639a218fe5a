"""Rows to token ids: convert, check and tokenise in chunks, in this process or in several.

A row may give several examples (a tree of messages, a task with many instances). What cannot be used raises, or is
counted and kept with its reason, as `on_bad_row` says.
"""

from __future__ import annotations

import tempfile
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from jaxpost.config import SourceSection
from jaxpost.data.convert import as_json, convert, is_linked, link_messages
from jaxpost.data.encode import Coding
from jaxpost.data.formats import Example, detect_format, parse_example, texts_of
from jaxpost.data.sources import Reader, Row
from jaxpost.text.chat import TemplateError
from jaxpost.text.messages import ODD, DataError, as_data_error
from jaxpost.text.tokenizer import Tokenizer

CHUNK = 256
_FORMAT_KEYS = frozenset({"prompt", "completion", "text", "messages", "chosen", "rejected", "completions"})


class Reject(NamedTuple):
    """A row left out: where it stood, why, and its text."""

    where: str
    kind: str
    reason: str
    row: str


@dataclass
class Counts:
    """What happened to rows, by name."""

    ignored: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    truncated_tokens: int = 0

    def add(self, other: Counts) -> None:
        """Adds another chunk's counts to these."""
        for name in ("ignored", "notes", "formats", "bad", "dropped"):
            getattr(self, name).update(getattr(other, name))
        self.truncated += other.truncated
        self.truncated_tokens += other.truncated_tokens


class Chunk(NamedTuple):
    """The examples of some rows, in order, and what was left out of them."""

    rows: int
    examples: list[Any]
    """What the coding made of them."""
    rejects: list[Reject]
    counts: Counts


def examples_of(row: Row, section: SourceSection, counts: Counts, kind: str | None = None) -> list[Example]:
    """The typed examples of a row. Columns renamed to a format's keys are taken as they are, without a converter.

    Args:
      kind: what judged rows are read as (`Coding.kind`).

    Raises: DataError.
    """
    return [parse_item(item, section, counts) for item in items_of(row, section, counts, kind)]


def items_of(row: Row, section: SourceSection, counts: Counts, kind: str | None) -> list[dict[str, Any]]:
    """The rows in one of the formats that a row gives. Raises: DataError."""
    if row.value is None:
        raise row.error or DataError("the row is empty")
    name = section.convert
    if name == "auto" and section.columns.keys() & _FORMAT_KEYS:
        name = "none"
    return convert(row.value, name, counts.ignored, kind)


def parse_item(item: Mapping[str, Any], section: SourceSection, counts: Counts) -> Example:
    """The typed example of a row in one of the formats. Raises: DataError."""
    name = detect_format(list(item)) if section.format == "auto" else section.format
    example = parse_example(item, name, counts.ignored)
    counts.formats[name] += 1
    return example


def encode_rows(
    rows: Sequence[Row], section: SourceSection, tokenizer: Tokenizer, coding: Coding, on_bad_row: str
) -> Chunk:
    """Tokenises some rows. Raises: DataError with the place of the row, unless bad rows are skipped."""
    counts = Counts()
    rejects: list[tuple[int, Reject]] = []
    pieced: list[Any] = []
    origin: list[tuple[int, Mapping[str, Any]]] = []

    def reject(number: int, found: Exception, item: Mapping[str, Any] | None = None) -> None:
        row, error = rows[number], as_data_error(found)
        if on_bad_row == "error":
            raise DataError(f"{row.where}: {error}", kind=error.kind) from error.__cause__
        counts.bad[error.kind] += 1
        text = row.raw or as_json(item or row.value or {})
        rejects.append((number, Reject(row.where, error.kind, str(error), text)))

    for number, row in enumerate(rows):
        try:
            items = items_of(row, section, counts, coding.kind)
        except ODD as error:
            reject(number, error)
            continue
        special = False
        for item in items:  # of a row that gives several examples, the good ones are kept
            try:
                example = parse_item(item, section, counts)
                found = coding.split(example, tokenizer, counts.notes)
            except TemplateError:
                raise
            except ODD as error:
                reject(number, error, item)
                continue
            special |= any(tokenizer.holds_special(text) for text in texts_of(example))
            dropped = Counter(part for part in found if isinstance(part, str))
            counts.dropped.update(dropped)
            for reason in dropped:  # the row stands there once, however many of its pairs are ties
                rejects.append((number, Reject(rows[number].where, "dropped", reason, as_json(item))))
            found = [part for part in found if not isinstance(part, str)]
            pieced += found
            origin += [(number, item)] * len(found)
        if special:
            counts.notes["rows whose own text holds special tokens, which are read as such"] += 1
    kept = []
    named: set[tuple[int, str]] = set()
    for (number, item), encoded in zip(origin, coding.encode(pieced, tokenizer), strict=True):
        if isinstance(encoded, DataError):
            reject(number, encoded)
        elif isinstance(encoded, str):
            counts.dropped[encoded] += 1
            if (number, encoded) not in named:
                rejects.append((number, Reject(rows[number].where, "dropped", encoded, as_json(item))))
            named.add((number, encoded))
        else:
            counts.truncated += encoded.cut > 0
            counts.truncated_tokens += encoded.cut
            kept.append(encoded)
    in_order = [rejected for _, rejected in sorted(rejects, key=lambda item: item[0])]
    return Chunk(len(rows), kept, in_order, counts)


def read_chunks(reader: Reader) -> Iterator[list[Row]]:
    """A source's rows, some at a time; rows that are single linked messages are joined into trees first."""
    rows = reader.rows()
    first = list(islice(rows, 1))
    linked = first and first[0].value is not None and is_linked(first[0].value)
    if linked and reader.section.convert in ("auto", "oasst"):
        rows = iter([Row(f"{reader.name}: tree {n}", tree) for n, tree in enumerate(_trees([*first, *rows]))])
        first = []
    while chunk := first + list(islice(rows, CHUNK - len(first))):
        first = []
        yield chunk


def _trees(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Linked messages as trees. Raises: DataError: one bad row would break the tree that it belongs to."""
    for row in rows:
        if row.error is not None:
            raise DataError(f"{row.where}: {row.error}", kind=row.error.kind)
    return link_messages([row.value for row in rows if row.value is not None], [row.where for row in rows])


_worker: dict[str, Any] = {}


def _start_worker(folder: str, chat_template: str | None, args: tuple) -> None:
    from jaxpost.text.tokenizer import load_tokenizer

    _worker["args"] = (load_tokenizer(folder, chat_template=chat_template), *args)


def _work(rows: list[Row]) -> Chunk:
    tokenizer, section, coding, on_bad_row = _worker["args"]
    return encode_rows(rows, section, tokenizer, coding, on_bad_row)


def encoded_chunks(
    reader: Reader, tokenizer: Tokenizer, coding: Coding, on_bad_row: str, workers: int
) -> Iterator[Chunk]:
    """A source's examples in order, whatever the number of worker processes (0: in this one)."""
    if workers == 0:
        for rows in read_chunks(reader):
            yield encode_rows(rows, reader.section, tokenizer, coding, on_bad_row)
        return
    import multiprocessing

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        context = multiprocessing.get_context("spawn")  # a fork would copy the locks of JAX's threads
        args = (folder, tokenizer.chat_request, (reader.section, coding, on_bad_row))
        with context.Pool(workers, _start_worker, args) as pool:
            waiting: deque = deque()
            for rows in read_chunks(reader):
                waiting.append(pool.apply_async(_work, (rows,)))
                if len(waiting) > 2 * workers:  # bounded: the file is not read far ahead of its tokens
                    yield waiting.popleft().get()
            while waiting:
                yield waiting.popleft().get()
