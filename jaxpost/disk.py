"""Files that cannot be written or read, each told in one sentence that names the file. Imports nothing slow."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What is not Python's own writing says it in words only; the last is NumPy's.
_SIGNS = re.compile(r"No space left|Disk quota|File too large|\d+ requested and \d+ written")


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or a cause of it, is that of a disk, a quota or a limit on files.

    >>> is_full(OSError(errno.ENOSPC, "No space left on device")), is_full(ValueError("full"))
    (True, False)
    """
    while error is not None:
        if (isinstance(error, OSError) and error.errno in _FULL) or _SIGNS.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def told(error: BaseException) -> str:
    """The sentence for such an error, with the file where it is known.

    >>> told(OSError(errno.ENOSPC, "No space left on device", "a.jsonl"))
    'the disk is full, or a limit on it reached, while writing a.jsonl; free some space and run the same command again'
    """
    # A copy that fails names its source first.
    named = getattr(error, "filename2", None) or getattr(error, "filename", None)
    where = f", while writing {named}" if named else f" ({' '.join(str(error).split())[:200]})"
    return f"the disk is full, or a limit on it reached{where}; free some space and run the same command again"


@contextmanager
def writing(path: Path | str) -> Generator[None]:
    """Gives the error of a disk that is full inside this block the path: only opening a file names it by itself."""
    try:
        yield
    except OSError as error:
        if error.filename is None and is_full(error):
            error.filename = str(path)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises FileNotFoundError or ValueError naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no {path.name}; a Hugging Face model folder needs it")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as err:
        raise ValueError(f"{path} is not valid JSON: {err}") from err
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


class Through:
    """A file for `numpy.save` to write through Python: its own writing says nothing where the disk fills up last."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def write(self, data: bytes) -> int:
        """As the file's own."""
        return self._file.write(data)
