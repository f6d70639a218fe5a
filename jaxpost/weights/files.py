"""Safetensors files: read a slice at a time from a folder of shards, written a tensor at a time.

Layout of a file: 8 bytes length of the header (little endian), a JSON header {name: dtype, shape, data_offsets},
then the tensors' bytes, C order, without gaps (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import uuid
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxpost import disk

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class TensorInfo(NamedTuple):
    """Name, shape and dtype of one stored tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Size of the stored values."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class Checkpoint:
    """The tensors of a model folder, single-file or sharded; nothing is read until a slice is asked for.

    Raises FileNotFoundError for a folder without safetensors or with a shard missing, ValueError for a
    damaged file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files, listed = _locate(folder)
        self._open = {path: _open(path) for path in files}
        self._file_of = {name: path for path, file in self._open.items() for name in file.keys()}  # noqa: SIM118
        if gone := sorted(set(listed) - set(self._file_of)):
            raise ValueError(f"{folder / INDEX} lists {gone[0]} in {listed[gone[0]]}, but that file has no such tensor")

    @property
    def names(self) -> frozenset[str]:
        """Every tensor of the folder."""
        return frozenset(self._file_of)

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._file_of[name]

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of a tensor, from the header. Raises ValueError for a dtype that is not read."""
        stored = self._open[self._file_of[name]].get_slice(name)
        kind = stored.get_dtype()
        if kind not in DTYPES:
            raise ValueError(f"{self._file_of[name]}: {name} has dtype {kind}; only {', '.join(DTYPES)} are read")
        return TensorInfo(name, tuple(stored.get_shape()), DTYPES[kind])

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Copy one rectangular part of a tensor out of its file."""
        return self._open[self._file_of[name]].get_slice(name)[index]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as err:
        raise ValueError(f"{path} is not a readable safetensors file ({err}); download or export it again") from err


def _locate(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The safetensors files of a model folder, and what its index says ({} without one)."""
    if (folder / INDEX).is_file():
        listed = _weight_map(folder / INDEX)
        files = [folder / name for name in sorted(set(listed.values()))]
        for path in files:
            if not path.is_file():
                raise FileNotFoundError(
                    f"{folder / INDEX} names {path.name}, which is not in the folder; copy it there"
                )
        return files, listed
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], {}
    if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
        raise FileNotFoundError(
            f"{folder} holds its weights as pickle (.bin or .pth), which can run code and is never read; "
            "save the model as safetensors"
        )
    raise FileNotFoundError(f"{folder} holds neither {SINGLE} nor {INDEX}; a model folder needs one of them")


def _weight_map(path: Path) -> dict[str, str]:
    listed = disk.read_json(path).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise ValueError(f"{path} has no weight_map from tensors to files; download or export the model again")
    return listed


def write_checkpoint(
    folder: Path,
    tensors: Sequence[TensorInfo],
    fetch: Callable[[TensorInfo], np.ndarray],
    *,
    max_shard_bytes: int,
    write: bool = True,
) -> None:
    """Write tensors as one or several safetensors files, with an index for several.

    `fetch` is called once for each tensor, in order, and its result is written before the next call, so one
    tensor is in memory at a time. With `write` false everything but the writing happens (processes that only
    take part in gathering).
    """
    shards = _split(tensors, max_shard_bytes)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = [SINGLE] if len(shards) == 1 else names
    for name, shard in zip(names, shards, strict=True):
        if write:
            with open(folder / name, "wb") as file:
                file.write(_header(shard))
                for info in shard:
                    file.write(_bytes(fetch(info), info))
                file.flush()
                os.fsync(file.fileno())
        else:
            for info in shard:
                fetch(info)
    if write and len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(info.nbytes for info in tensors)},
            "weight_map": {info.name: name for name, shard in zip(names, shards, strict=True) for info in shard},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2))


def _split(tensors: Sequence[TensorInfo], max_shard_bytes: int) -> list[list[TensorInfo]]:
    shards: list[list[TensorInfo]] = [[]]
    size = 0
    for info in tensors:
        if shards[-1] and size + info.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(info)
        size += info.nbytes
    return shards


def _header(tensors: Sequence[TensorInfo]) -> bytes:
    kinds = {dtype: name for name, dtype in DTYPES.items()}
    # transformers refuses a file whose metadata does not say which framework's layout it has.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for info in tensors:
        end = start + info.nbytes
        header[info.name] = {"dtype": kinds[info.dtype], "shape": list(info.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the values start 8-aligned
    return struct.pack("<Q", len(text)) + text


def _bytes(array: np.ndarray, info: TensorInfo) -> memoryview:
    if array.shape != info.shape or array.dtype != info.dtype:
        raise ValueError(f"{info.name} is {array.dtype}{array.shape}, announced as {info.dtype}{info.shape}")
    # Bytes of a strided view would be those of another matrix.
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


@contextmanager
def replaced_folder(folder: Path, *, overwrite: bool) -> Generator[Path, None, None]:
    """A new empty folder beside `folder` that takes its place when the block ends, and vanishes if it fails.

    Whoever looks at `folder` sees the old content or the whole new content, never a part.
    Raises FileExistsError if `folder` exists and is not to be overwritten.
    """
    if folder.exists() and not overwrite:
        raise FileExistsError(f"{folder} exists already; remove it or choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unique = uuid.uuid4().hex[:8]
    new, old = (folder.parent / f".{folder.name}.{state}-{unique}" for state in ("new", "old"))
    new.mkdir()
    try:
        with disk.writing(folder):
            yield new
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)
