"""What stops a run before its end: signals, and updates that go wrong again and again."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Mapping
from types import FrameType
from typing import Any

from jaxpost.config import GuardSection


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message names the step, the metric and what to do."""


ALIKE = (
    "its batch holds nothing that the loss compares, such as right and wrong answers; a larger train.batch_size holds "
    "more of both"
)
"""Of an update whose batch has answers, but none that count."""


class StopSignals:
    """Turns the first SIGTERM or SIGINT into a request that the loop sees; a second one kills as usual.

    Signals are only caught in the main thread; elsewhere (a notebook's worker, a server) nothing is changed.

    Example:
        >>> import os, signal
        >>> with StopSignals() as signals:
        ...     os.kill(os.getpid(), signal.SIGTERM)
        ...     signals.received
        'SIGTERM'
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        # Not print: a handler may interrupt one that is half done.
        text = f"\n{self.received}: finishing this update and saving; a second one kills at once.\n"
        os.write(2, text.encode())
        for each in self._previous:
            signal.signal(each, signal.SIG_DFL)

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)


def check_step(metrics: Mapping[str, float], step: int, skips: int, guard: GuardSection, *, trained: int = 0) -> int:
    """Count consecutive skipped updates; stop when the guard says so.

    Args:
        metrics: of update `step` (counted from 1): `skipped` 0 or 1, its reasons `empty`, `nonfinite`, `spike`.
        skips: consecutive skipped updates before this one.
        trained: tokens of the batch that have weight. Where there are some, an `empty` update is one whose answers the
            loss cannot compare (all of one kind), which another batch's may be.

    Returns:
        Consecutive skipped updates after this one.

    Raises:
        TrainingStopped: at a batch without a trained token; at the first update that is not finite under
            on_nonfinite "stop"; after `max_skips` skipped ones in a row.

    >>> check_step({"loss": 1.0, "skipped": 0.0}, 7, 3, GuardSection())
    0
    """
    if not metrics.get("skipped"):
        return 0
    skips += 1
    if metrics.get("empty") and not trained:
        raise TrainingStopped(
            f"Update {step}: no token of its batch is trained (every weight is 0). See the masks with "
            "`jaxpost data inspect`; data.mask and data.seq_len decide them."
        )
    bad = ", ".join(
        f"{name} = {metrics[name]}" for name in ("loss", "grad_norm") if not math.isfinite(metrics.get(name, 0.0))
    )
    if metrics.get("empty"):
        bad = ALIKE
    elif bad and guard.on_nonfinite == "stop":
        raise TrainingStopped(
            f"Update {step}: {bad}. train.guard.on_nonfinite is 'stop', so the run ends here; the parameters are "
            f"those of update {step - 1}. {_ADVICE}"
        )
    if skips >= guard.max_skips:
        why = (
            bad
            or f"gradient norm {metrics.get('grad_norm', math.nan):.4g}, over train.guard.spike_factor times its mean"
        )
        raise TrainingStopped(
            f"{skips} updates in a row were skipped (train.guard.max_skips), the last at step {step}: {why}. "
            f"The parameters are those of update {step - skips}." + (f" {_ADVICE}" if bad is not ALIKE else "")
        )
    return skips


_ADVICE = (
    "The usual causes: a learning rate that is too high (lower optim.lr, lengthen optim.schedule.warmup) or too "
    "little precision (model.compute_dtype float32). Resume from an earlier checkpoint by deleting later ones."
)
