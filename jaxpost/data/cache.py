"""Sources to arrays on disk: read, convert, check, encode, and count all that was left out.

Each source is encoded once and kept as plain .npy files under a key made of the source's bytes, the tokenizer and
the options; the second start reads them back. Counts are kept with them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpost import disk
from jaxpost.config import DataSection, SourceSection
from jaxpost.data.encode import Coding
from jaxpost.data.sources import Reader, open_source
from jaxpost.data.tokenise import Counts, Reject, encoded_chunks
from jaxpost.text.messages import DataError
from jaxpost.text.tokenizer import Tokenizer


class Progress(NamedTuple):
    """How far a source's tokenisation is. `fraction` and `seconds_left` are None where the size is not known."""

    source: str
    rows: int
    fraction: float | None
    seconds_left: float | None

    def __str__(self) -> str:
        done = "" if self.fraction is None else f" ({self.fraction:.0%}, {self.seconds_left:.0f} s left)"
        return f"tokenising {self.source}: {self.rows} rows{done}"


@dataclass
class SourceStats:
    """Counts of one source. Tokens are those kept; `bad` and `dropped` say why rows are missing."""

    name: str
    rows: int = 0
    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    truncated: int = 0
    truncated_tokens: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    """Rows left out under on_bad_row: skip, by kind of error."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Rows left out by on_long_row, or whose trained tokens all lay beyond the window."""
    formats: dict[str, int] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)
    """Columns and message keys that nothing reads."""
    notes: dict[str, int] = field(default_factory=dict)


class Prepared(NamedTuple):
    """What is on disk of some sources, in their order."""

    folders: list[Path]
    stats: list[SourceStats]
    shares: tuple[float, ...] | None
    """Relative weights of the sources; None: by size."""
    fingerprint: str

    def load(self, name: str, *, mapped: bool = False) -> list[np.ndarray]:
        """An array of each source; `mapped`: read from disk as it is used."""
        mode = "r" if mapped else None
        return [np.load(folder / f"{name}.npy", mmap_mode=mode, allow_pickle=False) for folder in self.folders]


def prepare_sources(
    section: DataSection,
    sources: Sequence[SourceSection],
    tokenizer: Tokenizer,
    coding: Coding,
    *,
    cache_dir: str | Path,
    report: Callable[[Progress], None] | None = None,
    rejected: str | Path | None = None,
) -> Prepared:
    """Encodes sources, or finds them in the cache.

    Args:
      section: policy for bad rows, worker processes.
      coding: what becomes of an example; its `repr` is part of the key.
      cache_dir: where arrays are kept.
      report: called about twice a second while rows are read.
      rejected: file (JSON lines) that the rows left out as bad are written to; not made where there are none.
    Raises: DataError or FileNotFoundError, naming the file, the row and what to do.
    """
    if not sources:
        raise DataError("no data: give at least one source (data.train)")
    given = [source.weight for source in sources]
    if any(weight is not None for weight in given) and any(weight is None or weight <= 0 for weight in given):
        raise DataError("give every source a weight > 0, or none of them one")
    parts = [_prepare_source(section, source, tokenizer, coding, Path(cache_dir), report) for source in sources]
    folders = [folder for folder, _, _ in parts]
    if rejected is not None:
        _gather_rejected(parts, Path(rejected))
    digest = hashlib.sha256(repr(([folder.name for folder in folders], given)).encode())
    shares = None if given[0] is None else tuple(float(weight) for weight in given if weight is not None)
    return Prepared(folders, [stats for _, stats, _ in parts], shares, digest.hexdigest())


def _prepare_source(
    section: DataSection,
    source: SourceSection,
    tokenizer: Tokenizer,
    coding: Coding,
    cache_dir: Path,
    report: Callable[[Progress], None] | None,
) -> tuple[Path, SourceStats, list[str]]:
    """Where a source's arrays are, its counts, and the names of its files."""
    reader = open_source(source)
    read = {k: v for k, v in asdict(source).items() if k not in ("path", "weight", "split", "subset")}
    key = repr((_code(), reader.digest(), sorted(read.items()), coding, section.on_bad_row, tokenizer.fingerprint))
    folder = cache_dir / hashlib.sha256(key.encode()).hexdigest()[:32]
    if not (folder / "stats.json").is_file():
        _tokenise(reader, tokenizer, coding, section, folder, report)
    stats = SourceStats(**json.loads((folder / "stats.json").read_text(encoding="utf-8")))
    stats.name = source.path
    return folder, stats, _names(reader)


@cache
def _code() -> str:
    """A hash of the code that makes tokens of rows, so that no cache outlives a change of it."""
    digest = hashlib.sha256()
    for package in (Path(__file__).parent, Path(__file__).parent.parent / "text"):
        for path in sorted((*package.rglob("*.py"), *package.rglob("*.jinja"))):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _tokenise(
    reader: Reader,
    tokenizer: Tokenizer,
    coding: Coding,
    section: DataSection,
    folder: Path,
    report: Callable[[Progress], None] | None,
) -> None:
    counts, examples, rejects, rows = Counts(), [], [], 0
    began = told = time.monotonic()
    for chunk in encoded_chunks(reader, tokenizer, coding, section.on_bad_row, section.workers):
        rows += chunk.rows
        examples += chunk.examples
        rejects += chunk.rejects
        counts.add(chunk.counts)
        now = time.monotonic()
        if report is not None and now - told > 0.5:
            told, part = now, reader.fraction
            left = None if not part else (now - began) * (1 - part) / part
            report(Progress(reader.name, rows, part, left))
    if rows == 0:
        raise DataError(f"{reader.name} holds no rows")
    if not examples:
        why = ", ".join(f"{n} {kind}" for kind, n in {**counts.bad, **counts.dropped}.items())
        hint = f"; the first: {rejects[0].where}: {rejects[0].reason}" if rejects else ""
        raise DataError(f"{reader.name}: none of its {rows} rows can be trained on ({why}){hint}")
    if report is not None:
        report(Progress(reader.name, rows, 1.0, 0.0))
    arrays = coding.arrays(examples)
    stats = SourceStats(
        name=reader.name,
        rows=rows,
        examples=len(examples),
        tokens=len(arrays["tokens"]),
        trained_tokens=int((arrays["weights"] > 0).sum()),
        truncated=counts.truncated,
        truncated_tokens=counts.truncated_tokens,
        **{k: dict(+getattr(counts, k)) for k in ("bad", "dropped", "formats", "ignored", "notes")},
    )
    _write(folder, arrays, stats, [_placed(reject, _names(reader)) for reject in rejects])


def _write(folder: Path, arrays: dict[str, np.ndarray], stats: SourceStats, rejects: Sequence[dict[str, Any]]) -> None:
    """Writes beside the folder and renames, so that a killed process leaves no half of a cache."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=folder.parent))
    try:
        with disk.writing(folder):
            for name, array in arrays.items():
                with (draft / f"{name}.npy").open("wb") as file:
                    np.save(disk.Through(file), array, allow_pickle=False)
            with (draft / "rejected.jsonl").open("w", encoding="utf-8") as stream:
                for reject in rejects:
                    stream.write(json.dumps(reject, ensure_ascii=False) + "\n")
            (draft / "stats.json").write_text(json.dumps(asdict(stats)), encoding="utf-8")
        try:
            os.replace(draft, folder)
        except OSError:
            if not (folder / "stats.json").is_file():  # no other process was first: the folder is damaged
                shutil.rmtree(folder)
                os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _names(reader: Reader) -> list[str]:
    """What the place of a row may begin with: nothing of these, the source, or one of its files."""
    return ["", reader.name, *map(str, reader.files)]


def _placed(reject: Reject, names: Sequence[str]) -> dict[str, Any]:
    """A row left out, with its place after the name in `names`: the same bytes may be read again from elsewhere.

    >>> _placed(Reject("b/x.jsonl:3", "role", "why", "{}"), ["*/x.jsonl", "a/x.jsonl", "b/x.jsonl"])
    {'where': ':3', 'kind': 'role', 'reason': 'why', 'row': '{}', 'name': 2}
    """
    fits = [number for number, name in enumerate(names) if reject.where.startswith(name)]
    number = max(fits, key=lambda fit: len(names[fit]))
    return reject._asdict() | {"where": reject.where[len(names[number]) :], "name": number}


def _gather_rejected(parts: Sequence[tuple[Path, SourceStats, list[str]]], target: Path) -> None:
    """Joins the rows that sources left out, under the names that the sources have now."""
    lines = []
    for folder, _, names in parts:
        with (folder / "rejected.jsonl").open(encoding="utf-8", newline="\n") as stream:
            for reject in map(json.loads, stream):
                reject["where"] = names[reject.pop("name")] + reject["where"]
                lines.append(json.dumps(reject, ensure_ascii=False) + "\n")
    if lines:
        target.parent.mkdir(parents=True, exist_ok=True)
        with disk.writing(target):
            target.write_text("".join(lines), encoding="utf-8")
