"""Where metrics go: a JSONL file always; TensorBoard, Weights & Biases or trackio when chosen.

A record is a flat-ish dict with an int "step", a string "kind" ("train", "eval" ...) and numbers. Whatever
depends on the clock sits under "time", so that two runs can be compared by dropping that one key.
"""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

Record = Mapping[str, Any]


@runtime_checkable
class Writer(Protocol):
    """Receives every record of a run, in order."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


def to_json(record: Record) -> str:
    """One line of valid JSON; numbers that JSON lacks become the strings "nan", "inf", "-inf", and what else it lacks
    (dates, decimals, bytes of a table) its text.

    >>> to_json({"step": 1, "loss": float("nan"), "time": {"s": 0.5}})
    '{"step": 1, "loss": "nan", "time": {"s": 0.5}}'
    """
    plain = _plain(record)
    line = json.dumps(plain, ensure_ascii=False, allow_nan=False)
    # Half of a surrogate pair, as cut texts have it, has no UTF-8; JSON's escape of it is fine.
    return line if _encodable(line) else json.dumps(plain, ensure_ascii=True, allow_nan=False)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if value is None or isinstance(value, str | int | float):
        return value
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)  # arrays; a table's dates, decimals ...


class JsonlFile:
    """An append-only file of JSON lines that can be cut back to a remembered length.

    Args:
        path: the file; made if missing.
        length: bytes to keep of what is there (a checkpoint's `sync()`); None keeps whole lines only, so
            that a line torn by a crash goes.

    Raises:
        ValueError: the file is shorter than `length`, so lines that the checkpoint counts on are lost.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
        >>> first = JsonlFile(path)
        >>> first.write({"step": 1}); kept = first.sync(); first.write({"step": 2}); first.close()
        >>> JsonlFile(path, kept).close(); path.read_text()
        '{"step": 1}\\n'
    """

    def __init__(self, path: Path, length: int | None = None) -> None:
        self.path = Path(path)
        self._file = open(self.path, "a+b")  # noqa: SIM115 (closed by close())
        size = self._file.seek(0, os.SEEK_END)
        if length is None:
            length = _whole_lines(self._file, size)
        if length > size:
            self._file.close()
            raise ValueError(
                f"{self.path} has {size} bytes, but the checkpoint was saved when it had {length}: the file was "
                "changed or only partly copied. Restore it, or start a new run with --run.name."
            )
        self._file.truncate(length)

    def write(self, record: Record) -> None:
        try:
            self._file.write((to_json(record) + "\n").encode())
            self._file.flush()
        except OSError as error:
            why = f"{error.strerror} while writing {self.path}; mend that and run the same command to resume"
            raise OSError(error.errno, why) from error

    def sync(self) -> int:
        """Force everything to the disk; returns the length in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        self._file.close()


def _whole_lines(file: Any, size: int) -> int:
    file.seek(0)
    end = 0
    while chunk := file.read(1 << 20):
        if (last := chunk.rfind(b"\n")) >= 0:
            end = file.tell() - len(chunk) + last + 1
    return min(end, size)


_NUMBERS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def from_json(line: bytes | str) -> dict[str, Any]:
    """The record of a line of metrics.jsonl, "nan" and "inf" back as numbers.

    Raises:
        ValueError: no JSON object.

    Example:
        >>> from_json('{"step": 1, "loss": "inf"}')
        {'step': 1, 'loss': inf}
    """
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError(f"a record is a JSON object, not {line[:80]!r}")
    return {k: _NUMBERS.get(v, v) if isinstance(v, str) and k != "kind" else v for k, v in record.items()}


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Records of metrics.jsonl; a torn last line is left out."""
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield from_json(line)


def scalars(record: Record, prefix: str = "") -> dict[str, float]:
    """The numbers of a record under slash-joined names, for the loggers that draw them.

    >>> scalars({"step": 3, "kind": "train", "loss": 2.0, "time": {"seconds": 0.5}})
    {'train/loss': 2.0, 'train/time/seconds': 0.5}
    """
    head = prefix or f"{record.get('kind', 'train')}/"
    found: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            found |= scalars(value, f"{head}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and (prefix or name != "step"):
            found[head + name] = float(value)
    return found


class TensorBoardWriter:
    """Scalars for TensorBoard under `<run>/tensorboard` (package tensorboardX)."""

    def __init__(self, folder: Path, *, start_step: int = 0) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ModuleNotFoundError as error:
            raise _not_installed("tensorboard", "tensorboardX") from error
        # purge_step hides what an interrupted attempt drew past the checkpoint.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step or None)

    def write(self, record: Record) -> None:
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, int(record["step"]))

    def close(self) -> None:
        self._writer.close()


class TrackerWriter:
    """Scalars for Weights & Biases or trackio, which share one interface (`init`, `log`, `finish`)."""

    def __init__(self, kind: str, folder: Path, *, name: str, config: Mapping[str, Any]) -> None:
        try:
            tracker: Any = importlib.import_module(kind)
        except ModuleNotFoundError as error:
            raise _not_installed(kind, kind) from error
        self._tracker = tracker
        options: dict[str, Any] = {"project": "jaxpost", "name": name, "config": dict(config), "resume": "allow"}
        if kind == "wandb":
            options |= {"id": _run_id(folder / "wandb-id.txt", name), "dir": str(folder)}
        tracker.init(**options)

    def write(self, record: Record) -> None:
        self._tracker.log(scalars(record), step=int(record["step"]))

    def close(self) -> None:
        self._tracker.finish()


def _run_id(path: Path, name: str) -> str:
    # One identity for all attempts of a run, so that a resumed run goes on in the same chart.
    if not path.exists():
        path.write_text(f"{name}-{os.urandom(4).hex()}")
    return path.read_text().strip()


def _not_installed(kind: str, package: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f"run.loggers has '{kind}', but the package {package} is not installed: pip install 'jaxpost[{kind}]'."
    )


def open_writers(
    kinds: Iterable[str], folder: Path, *, name: str, config: Mapping[str, Any], start_step: int = 0
) -> list[Writer]:
    """The chosen loggers beside the console and metrics.jsonl.

    Args:
        kinds: any of "tensorboard", "wandb", "trackio".
        folder: the run's folder.
        start_step: the step that the run (re)starts from.

    Raises:
        ModuleNotFoundError: a logger's package is not installed; says what to install.
        ValueError: an unknown kind.
    """
    writers: list[Writer] = []
    for kind in kinds:
        if kind == "tensorboard":
            writers.append(TensorBoardWriter(folder, start_step=start_step))
        elif kind in ("wandb", "trackio"):
            writers.append(TrackerWriter(kind, folder, name=name, config=config))
        else:
            raise ValueError(f"run.loggers has '{kind}'; it may have tensorboard, wandb or trackio.")
    return writers
