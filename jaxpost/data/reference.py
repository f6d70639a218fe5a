"""Numbers that a reference policy gave each answer's tokens, kept beside the tokenised data; one pass can be resumed.

A file `<key>.npy` holds float32 numbers of all answers' tokens, group after group. Until the pass is over, its parts
lie in `<key>.parts/`, each written beside and renamed, so that a killed process loses at most the part it was at.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpost import disk


class GroupLogprobs(Sequence[np.ndarray]):
    """One array per group: its answers' tokens, one answer after another.

    Example:
      >>> found = GroupLogprobs(np.arange(5, dtype=np.float32), np.array([0, 2, 5]))
      >>> len(found), found[1].tolist()
      (2, [2.0, 3.0, 4.0])
    """

    def __init__(self, values: np.ndarray, offsets: np.ndarray):
        if len(values) != offsets[-1]:
            raise ValueError(f"{len(values)} log-probabilities do not fit {offsets[-1]} tokens of answers")
        self.values, self.offsets = values, offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: Any) -> Any:
        """float32 of the group's tokens."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"group {index} of {len(self)}")
        return self.values[self.offsets[index] : self.offsets[index + 1]]


class Part(NamedTuple):
    """What one batch of the pass gave: groups and their numbers, one group after another."""

    groups: np.ndarray
    values: np.ndarray


class ReferenceCache:
    """A pass over a data set whose results stay on disk.

    Args:
      folder: of the cache.
      key: changes with the data, the model and all else that changes a number.
      offsets: [groups + 1], tokens of answers before each group.
    """

    def __init__(self, folder: Path, key: str, offsets: np.ndarray):
        self.file = folder / f"{key}.npy"
        self.parts = folder / f"{key}.parts"
        self.offsets = offsets

    def read(self) -> GroupLogprobs | None:
        """What was computed before; None if it was not, or not to its end."""
        if not self.file.is_file():
            return None
        values = np.load(self.file, mmap_mode="r", allow_pickle=False)
        return GroupLogprobs(values, self.offsets)

    def batches_done(self, plan: str) -> int:
        """Batches of an interrupted pass that need not be computed again.

        Args:
          plan: how the pass is cut into batches; parts of another plan are thrown away.
        """
        note = self.parts / "plan.json"
        if not note.is_file() or json.loads(note.read_text(encoding="utf-8")) != plan:
            shutil.rmtree(self.parts, ignore_errors=True)
            self.parts.mkdir(parents=True)
            _replace(note, lambda file: file.write(json.dumps(plan).encode()))
        done = 0
        while (self.parts / f"{done}.npz").is_file():
            done += 1
        return done

    def add(self, index: int, part: Part) -> None:
        """Keep batch `index` of the pass."""
        _replace(self.parts / f"{index}.npz", lambda file: np.savez(file, groups=part.groups, values=part.values))

    def finish(self, parts: Iterable[Part]) -> GroupLogprobs:
        """Join parts into the file.

        Raises:
          ValueError: the parts do not hold every group.
        """
        values = np.full(int(self.offsets[-1]), np.nan, np.float32)
        for part in parts:
            at = 0
            for group in part.groups:
                start, end = self.offsets[group : group + 2]
                values[start:end] = part.values[at : at + end - start]
                at += int(end - start)
        if np.isnan(values).any():
            raise ValueError(f"{self.parts}: {int(np.isnan(values).sum())} tokens have no finite log-probability")
        _replace(self.file, lambda file: np.save(disk.Through(file), values, allow_pickle=False))
        shutil.rmtree(self.parts, ignore_errors=True)
        found = self.read()
        assert found is not None
        return found

    def stored(self, count: int) -> Iterator[Part]:
        """The parts of the first `count` batches."""
        for index in range(count):
            with np.load(self.parts / f"{index}.npz", allow_pickle=False) as found:
                yield Part(found["groups"], found["values"])


def file_hash(path: Path, memory: Path) -> str:
    """sha256 of a file's bytes, remembered in the folder `memory` by its path, size, number and times of change.

    Copies and archives set the time of modification as they like, the other time of change (ctime) they cannot.

    Example:
      >>> folder = Path(tempfile.mkdtemp())
      >>> _ = (folder / "a").write_text("hello")
      >>> file_hash(folder / "a", folder / "memory")[:8], len(list((folder / "memory").iterdir()))
      ('2cf24dba', 1)
    """
    facts = path.stat()
    name = str(path.resolve())
    about = [name, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino]
    note = memory / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"
    if note.is_file():
        told = json.loads(note.read_text(encoding="utf-8"))
        if told["about"] == about:
            return told["sha256"]
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    _replace(note, lambda file: file.write(json.dumps({"about": about, "sha256": found}).encode()))
    return found


def _replace(path: Path, write: Callable[[Any], Any]) -> None:
    """Writes a file beside and renames it, so that no half of it is ever seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(prefix=".draft-", dir=path.parent)
    try:
        with disk.writing(path), os.fdopen(handle, "wb") as file:
            write(file)
        os.replace(draft, path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise
