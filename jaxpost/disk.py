"""A full disk, told in one sentence. Imports nothing slow: the command line asks it about any error."""

from __future__ import annotations

import errno
import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

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


class Through:
    """A file for `numpy.save` to write through Python: its own writing says nothing where the disk fills up last."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def write(self, data: bytes) -> int:
        """As the file's own."""
        return self._file.write(data)
