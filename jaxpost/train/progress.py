"""What a run tells its user: one line that moves on a terminal, plain lines at intervals elsewhere."""

from __future__ import annotations

import io
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def short_number(value: float | int) -> str:
    """A number in few characters.

    >>> [short_number(x) for x in (0, 0.5, 12.345, 1234.5, 2.5e6, 1e-5, 1.2e12)]
    ['0', '0.5', '12.35', '1.23k', '2.5M', '1e-05', '1.2T']
    """
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.4g}"


def duration(seconds: float | int) -> str:
    """Hours, minutes, seconds, the two largest that are not zero.

    >>> [duration(s) for s in (4.2, 65, 3_700, 200_000)]
    ['4s', '1m05s', '1h01m', '2d07h']
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


class Progress:
    """Prints a run's progress, and keeps every permanent line in a log file.

    Args:
        total: updates of the whole run.
        log: file that permanent lines are appended to; None: none.
        enabled: False prints nothing (all processes but the first).
        stream: where to print; standard output by default.
        interval: seconds between plain lines where the output is no terminal.
    """

    def __init__(
        self,
        total: int,
        *,
        log: Path | None = None,
        enabled: bool = True,
        stream: io.TextIOBase | None = None,
        interval: float = 10.0,
    ) -> None:
        self.total = total
        self._enabled = enabled
        self._stream: Any = sys.stdout if stream is None else stream
        self._terminal = self._stream.isatty()
        self._interval = interval
        self._last = -float("inf")
        self._open_line = False
        self._log = open(log, "a", encoding="utf-8") if log and enabled else None  # noqa: SIM115 (closed by close())

    def say(self, text: str) -> None:
        """A permanent line."""
        if not self._enabled:
            return
        self._clear()
        print(text, file=self._stream, flush=True)
        self._keep(text)

    def note(self, text: str) -> None:
        """A line for the log only: somebody else shows it."""
        self._keep(text)

    def busy(self, text: str) -> None:
        """A passing remark (compiling, saving ...), shown on a terminal only."""
        if self._enabled and self._terminal:
            self._replace(text)

    def update(self, record: Mapping[str, Any], eta: float | int | None) -> None:
        """Show a training record; permanent when the output is no terminal, at most every `interval` seconds."""
        if not self._enabled:
            return
        line = self._line(record, eta)
        if self._terminal:
            bar = self._bar(int(record["step"]))
            fits = len(bar) + 2 + len(line) < shutil.get_terminal_size().columns
            self._replace(f"{bar}  {line}" if fits else line)
        now, last = time.monotonic(), record["step"] == self.total
        if now - self._last >= self._interval or last:
            self._last = now
            self._keep(line)
            if not self._terminal:
                print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """End the moving line and close the log."""
        if self._open_line:
            print(file=self._stream, flush=True)
            self._open_line = False
        if self._log:
            self._log.close()
            self._log = None

    def _line(self, record: Mapping[str, Any], eta: float | int | None) -> str:
        step, spent = int(record["step"]), record.get("time", {})
        parts = [f"step {step:>{len(str(self.total))}}/{self.total}"]
        if eta is not None and step < self.total:
            parts.append(f"eta {duration(eta)}")
        parts += [f"loss {record['loss']:.4f}"] if "loss" in record else []
        parts += [f"{label} {short_number(record[k])}" for k, label in _SHOWN if k in record]
        if record.get("skipped"):
            parts.append(f"SKIPPED {short_number(record['skipped'])}")
        if "tokens_per_second" in spent:
            parts.append(f"{short_number(spent['tokens_per_second'])} tok/s")
        if "mfu_percent" in spent:
            parts.append(f"mfu {spent['mfu_percent']:.0f}%")
        if spent.get("data_wait_percent", 0.0) >= 1.0:
            parts.append(f"waits for data {spent['data_wait_percent']:.0f}%")
        return "  ".join(parts)

    def _bar(self, step: int) -> str:
        done = round(12 * step / max(self.total, 1))
        return "█" * done + "░" * (12 - done)

    def _replace(self, line: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        print("\r\x1b[K" + line[:width], end="", file=self._stream, flush=True)
        self._open_line = True

    def _clear(self) -> None:
        if self._open_line:
            print("\r\x1b[K", end="", file=self._stream)
            self._open_line = False

    def _keep(self, text: str) -> None:
        if self._log:
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")
            self._log.flush()


_SHOWN = (
    ("rewards/accuracy", "accuracy"), ("rewards/margin", "margin"),
    ("reward", "reward"), ("answer_tokens", "tokens"), ("entropy", "entropy"), ("grad_norm", "grad"), ("lr", "lr"),
)  # fmt: skip
