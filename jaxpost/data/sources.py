"""Rows from files, `datasets` folders and the hub, each with the place that it came from.

Nothing is executed: JSON is parsed, Parquet and Arrow are read by their libraries, hub scripts are never run.
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple
from zlib import error as ZlibError

from etils import epath

from jaxpost.config import SourceSection
from jaxpost.text import strict_json
from jaxpost.text.messages import DataError

_DAMAGED = (EOFError, OSError, ZlibError)
"""What reading a file that is cut or damaged raises."""
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")


class Row(NamedTuple):
    """One row: where it is (`file:line`), its content, or the error that reading it gave (with the raw text)."""

    where: str
    value: dict[str, Any] | None
    error: DataError | None = None
    raw: str = ""


@dataclass
class Reader:
    """The rows of one source. `fraction` is how much of it has been read, for progress (None: not known)."""

    section: SourceSection
    files: tuple[epath.Path, ...] = ()
    table: Any = None
    fraction: float | None = None
    _sizes: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The source's name in reports."""
        return self.section.path

    def digest(self) -> str:
        """A hash of the source's bytes (of a `datasets` source: its own fingerprint)."""
        out = hashlib.sha256()
        if self.table is not None:
            out.update(str(self.table._fingerprint).encode())
        for path in self.files:
            out.update(path.name.encode())
            with path.open("rb") as stream:
                while block := stream.read(1 << 20):
                    out.update(block)
        return out.hexdigest()

    def rows(self) -> Iterator[Row]:
        """All rows, from `skip` up to `limit`, with columns renamed; malformed lines count as rows."""
        stop = None if self.section.limit is None else self.section.skip + self.section.limit
        for index, row in enumerate(self._all()):
            if stop is not None and index >= stop:
                return
            if index >= self.section.skip:
                yield rename(row, self.section.columns)

    def _all(self) -> Iterator[Row]:
        if self.table is not None:
            total = len(self.table)
            for index, value in enumerate(self.table):
                self.fraction = (index + 1) / total
                yield Row(f"{self.name}[{self.section.split}] row {index}", without_filling(value))
            return
        for number, path in enumerate(self.files):
            size = max(1, path.stat().length)
            read = {".parquet": _parquet_rows, ".json": _json_rows}.get(path.suffix, _jsonl_rows)
            if path.name.endswith(".json.gz"):
                read = _json_rows
            with path.open("rb") as stream:
                for row in read(path, stream):
                    self.fraction = (number + min(1.0, stream.tell() / size)) / len(self.files)
                    yield row


def rename(row: Row, columns: Mapping[str, str]) -> Row:
    """Applies `columns`: {our key: the file's key}, or {our key: "text with {keys} of the file"}.

    >>> rename(Row("f:1", {"q": "2+2", "a": "4"}), {"prompt": "q", "completion": "It is {a}."}).value
    {'prompt': '2+2', 'completion': 'It is 4.'}
    """
    if not columns or row.value is None:
        return row
    taken, new = set(), {}
    for ours, theirs in columns.items():
        keys = [theirs]
        if "{" in theirs and theirs not in row.value:
            keys = [name for _, name, _, _ in Formatter().parse(theirs) if name is not None]
        missing = [key for key in keys if key not in row.value]
        if missing:
            near = difflib.get_close_matches(missing[0], list(map(str, row.value)), 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            message = (
                f"columns maps {ours} to {missing[0]!r}, which the row lacks (it has {', '.join(row.value)}){hint}"
            )
            return Row(row.where, None, DataError(message), json.dumps(row.value, default=str))
        taken.update(keys)
        new[ours] = row.value[theirs] if keys == [theirs] else _fill(theirs, row.value)
    rest = {key: value for key, value in row.value.items() if key not in taken and key not in new}
    return Row(row.where, {**rest, **new})


def _fill(template: str, values: Mapping[str, Any]) -> str:
    """Puts whole columns into a text: names only, no attributes, indices or format codes."""
    parts = []
    for literal, name, _, _ in Formatter().parse(template):
        parts.append(literal)
        if name is not None:
            parts.append("" if values[name] is None else str(values[name]))
    return "".join(parts)


def _jsonl_rows(path: epath.Path, stream: Any) -> Iterator[Row]:
    lines = gzip.GzipFile(fileobj=stream) if path.name.endswith(".gz") else stream
    number = 0
    try:
        for number, line in enumerate(lines, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield parse_line(line, f"{path}:{number}")
    except _DAMAGED as error:
        raise DataError(f"{path}: reading stopped after line {number}: {error}; the file is damaged") from None


def parse_line(line: bytes, where: str) -> Row:
    """One JSON line; an error names what is wrong with it.

    >>> parse_line(b'{"text": "Hi"}', "a.jsonl:1").value
    {'text': 'Hi'}
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"not UTF-8 (byte {error.start} of the line); save the file as UTF-8"
        return Row(where, None, DataError(message, kind="encoding"), line.decode("utf-8", "replace"))
    text = text.rstrip("\r\n")
    try:
        value = strict_json.loads(text)
    except json.JSONDecodeError as error:
        message = f"not valid JSON: {error.msg} at column {error.colno}"
        return Row(where, None, DataError(message, kind="malformed"), text)
    except strict_json.RepeatedKey as error:
        return Row(where, None, DataError(str(error), kind="malformed"), text)
    except RecursionError:
        return Row(
            where, None, DataError(f"nested too deep (over {strict_json.DEEPEST} levels)", kind="malformed"), text
        )
    except ValueError:  # Python reads no whole number of more than some thousand digits
        return Row(where, None, DataError("a number has too many digits to be read", kind="malformed"), text)
    if not isinstance(value, dict):
        message = f"a row must be a JSON object, not {type(value).__name__}"
        return Row(where, None, DataError(message, kind="malformed"), text)
    return _whole_characters(Row(where, value)) if "\\u" in text else Row(where, value)


def _whole_characters(row: Row) -> Row:
    """The row, or the error that a text of it holds half a character, which no tokenizer reads and no file can hold."""
    try:
        json.dumps(row.value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        message = (
            f"a text holds half of a character (\\u{ord(error.object[error.start]):x} without its other half), as "
            "where a text was cut inside an emoji; take it out"
        )
        return Row(row.where, None, DataError(message, kind="encoding"), json.dumps(row.value))
    return row


def _json_rows(path: epath.Path, stream: Any) -> Iterator[Row]:
    data = stream.read()
    try:
        data = gzip.decompress(data) if path.name.endswith(".gz") else data
        value = strict_json.loads(data.decode("utf-8-sig"))
    except _DAMAGED as error:
        raise DataError(f"{path}: {error}; the file is damaged", kind="malformed") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start}); save the file as UTF-8", kind="encoding") from None
    except (json.JSONDecodeError, strict_json.RepeatedKey) as error:
        repeated = isinstance(error, strict_json.RepeatedKey)
        lines = data.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{") if repeated else error.msg == "Extra data"
        if lines:
            yield from _jsonl_rows(path, io.BytesIO(data if not path.name.endswith(".gz") else gzip.compress(data)))
            return
        raise DataError(f"{path}: {'' if repeated else 'not valid JSON: '}{error}", kind="malformed") from None
    except (RecursionError, ValueError):
        message = f"{path}: nested too deep (over {strict_json.DEEPEST} levels), or a number of too many digits"
        raise DataError(message, kind="malformed") from None
    if not isinstance(value, list):
        raise DataError(f"{path}: a .json file must hold a list of rows, not {type(value).__name__}", kind="malformed")
    for index, item in enumerate(value):
        where = f"{path}: row {index}"
        if isinstance(item, dict):
            yield _whole_characters(Row(where, item))
        else:
            error = DataError(f"a row must be a JSON object, not {type(item).__name__}", kind="malformed")
            yield Row(where, None, error, json.dumps(item))


def _parquet_rows(path: epath.Path, stream: Any) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(stream)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a Parquet file: {error}", kind="malformed") from None
    names = file.schema_arrow.names
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path}: the column {twice!r} stands twice; rename or take out one of them", kind="malformed")
    index = 0
    try:
        for batch in file.iter_batches(batch_size=1024):
            for row in _batch_rows(batch, path, index):
                yield row
                index += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: reading stopped after row {index}: {error}; the file is damaged") from None


def _batch_rows(batch: Any, path: epath.Path, first: int) -> Iterator[Row]:
    """A batch's rows; where a text is no UTF-8 its row alone is bad."""
    try:
        values = batch.to_pylist()
    except ValueError:
        values = None
    for n in range(batch.num_rows):
        where = f"{path}: row {first + n}"
        try:
            value = _cells(batch.slice(n, 1)) if values is None else values[n]
        except DataError as error:
            yield Row(where, None, error)
        else:
            yield Row(where, without_filling(value))


def _cells(batch: Any) -> dict[str, Any]:
    """The only row of a batch. Raises: DataError naming the column."""
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column.to_pylist()[0]
        except UnicodeDecodeError:
            raise DataError(f"{name} is not UTF-8; write the file with that encoding", kind="encoding") from None
        except ValueError as error:
            raise DataError(f"{name} cannot be read: {error}", kind="malformed") from None
    return row


def without_filling(row: dict[str, Any]) -> dict[str, Any]:
    """Takes out the nulls that a table puts in for keys that other rows' objects have (tool arguments, parts).

    >>> without_filling({"text": None, "calls": [{"a": 1, "b": None}]})
    {'text': None, 'calls': [{'a': 1}]}
    """

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items() if item is not None}
        return [clean(item) for item in value] if isinstance(value, list) else value

    return {key: clean(value) for key, value in row.items()}


def open_source(section: SourceSection) -> Reader:
    """Finds a source: a file, a glob, a `datasets` folder, or a hub id, in that order.

    Raises: FileNotFoundError with the nearest existing name; DataError where a folder is no data set.
    """
    text = section.path
    path = epath.Path(os.path.expanduser(text))
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise DataError(f"{path}: cannot tell the kind of file; known endings: {', '.join(SUFFIXES)}")
        return Reader(section, (path,))
    if path.is_dir():
        return Reader(section, table=_from_disk(path, section))
    if any(c in text for c in "*?["):
        files = _glob(path)
        if not files:
            raise FileNotFoundError(f"no file matches {text}{_nearest(path)}")
        return Reader(section, files)
    if text.endswith(SUFFIXES) or text.startswith((".", "/", "~")) or "://" in text or text.count("/") > 1:
        raise FileNotFoundError(f"no data file {text}{_nearest(path)}")
    return Reader(section, table=_from_hub(section, path))


def _glob(path: epath.Path) -> tuple[epath.Path, ...]:
    parts = path.parts
    fixed = next(i for i, part in enumerate(parts) if any(c in part for c in "*?["))
    root = epath.Path(*parts[:fixed]) if fixed else epath.Path()
    found = root.glob(str(epath.Path(*parts[fixed:]))) if root.is_dir() else ()
    return tuple(sorted(p for p in found if p.name.endswith(SUFFIXES) and p.is_file()))


def _nearest(path: epath.Path) -> str:
    """The nearest existing name, as the end of a sentence."""
    folder = path.parent
    if not folder.is_dir():
        while not folder.is_dir() and folder != folder.parent:
            folder = folder.parent
        return f" (the folder {path.parent} does not exist; {folder} does)"
    names = sorted(p.name for p in folder.iterdir())
    stems = {name.split(".")[0]: name for name in names}  # the common ending would make all names alike
    near = difflib.get_close_matches(path.name.split(".")[0], stems, 1, cutoff=0.5)
    if near:
        return f"; did you mean {folder / stems[near[0]]}?"
    data = [name for name in names if name.endswith(SUFFIXES)]
    return f"; {folder} holds {', '.join(data[:5])}{' ...' if len(data) > 5 else ''}" if data else ""


def _from_disk(path: epath.Path, section: SourceSection) -> Any:
    import datasets

    if (path / "dataset_dict.json").is_file():
        splits: Any = datasets.load_from_disk(str(path))
        if section.split not in splits:
            raise DataError(f"{path} has no split {section.split!r}; it has {', '.join(splits)}")
        return splits[section.split]
    if (path / "state.json").is_file():
        return datasets.load_from_disk(str(path))
    files = sorted(p.name for p in path.iterdir() if p.name.endswith(SUFFIXES))
    hint = f"; to read its files give a glob, such as {path}/*{Path(files[0]).suffix}" if files else ""
    raise DataError(f"{path} is a folder, but not one that datasets.save_to_disk wrote{hint}")


def _from_hub(section: SourceSection, path: epath.Path) -> Any:
    import datasets

    try:
        return datasets.load_dataset(section.path, name=section.subset, split=section.split)
    except Exception as error:  # the libraries below raise some twenty kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileNotFoundError(
            f"{section.path} is no local file or folder{_nearest(path)}, and the hub gave no data set of that name: "
            f"{reason}"
        ) from None
