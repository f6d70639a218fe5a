"""Where a run is: the host's half of a checkpoint, kept as JSON beside the arrays."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxpost.checkpoint import CheckpointMismatch
from jaxpost.train.folder import config_changes

_REASONS = ("empty", "nonfinite", "spike")
_COUNTED = (*_REASONS, "skipped", "skips", "consecutive_skips")
"""Metrics of a step that are counts, which a mean would hide."""


@dataclass
class Position:
    """Counters of a run after `step` updates. All of it is restored, so a resumed run logs what it would have."""

    step: int = 0
    """Updates done: also the index of the next batch."""
    tokens: int = 0
    tokens_trained: int = 0
    skipped: int = 0
    skips: int = 0
    """Consecutive skipped updates."""
    evaluated: int = -1
    """Step of the last complete evaluation."""
    window: dict[str, float] = field(default_factory=dict)
    """Sums of the metrics since the last log record, over updates that were not skipped."""
    window_counts: list[int] = field(default_factory=lambda: [0, 0])
    """Updates since the last log record: [applied, skipped]."""
    window_reasons: dict[str, int] = field(default_factory=dict)
    """Why those were skipped: empty, nonfinite or spike -> how often."""
    results: dict[str, float] = field(default_factory=dict)
    """The last evaluation and the best one."""
    files: dict[str, int] = field(default_factory=dict)
    """Lengths in bytes of the files that a resumed run cuts back."""
    loop: dict[str, Any] = field(default_factory=dict)
    """What a loop keeps beside: plain JSON."""
    identity: dict[str, str] = field(default_factory=dict)
    config: str = ""

    def add(self, metrics: Mapping[str, float], *, tokens: int, trained: int) -> None:
        """One finished update."""
        self.tokens += tokens
        self.tokens_trained += trained
        skipped = bool(metrics.get("skipped"))
        self.skipped += skipped
        self.window_counts[skipped] += 1
        for name in _REASONS:
            if metrics.get(name):
                self.window_reasons[name] = self.window_reasons.get(name, 0) + 1
        for name, value in metrics.items():
            if not skipped and name not in _COUNTED:
                self.window[name] = self.window.get(name, 0.0) + value

    def close_window(self) -> dict[str, float]:
        """Means over the updates since the last call (not the skipped ones), and running counts."""
        applied, skipped = self.window_counts
        means = {name: total / applied for name, total in self.window.items()} if applied else {"loss": math.nan}
        counts = {"skipped": skipped, **{f"skipped/{name}": count for name, count in self.window_reasons.items()}}
        self.window, self.window_counts, self.window_reasons = {}, [0, 0], {}
        return {**means, **counts, "tokens": self.tokens, "tokens_trained": self.tokens_trained}

    def keep_best(self, record: dict[str, Any]) -> None:
        """Remember an evaluation, and add the best loss so far to its record."""
        losses = [name for name in record if name == "loss" or name.endswith("/loss")]
        for name in losses:
            best = self.results.get(f"best/{name}", math.inf)
            if record[name] < best:
                self.results |= {f"best/{name}": record[name], f"best/{name}_step": float(record["step"])}
        numbers = {name: value for name, value in record.items() if name not in ("step", "kind")}
        self.results |= {f"eval/{name}": value for name, value in numbers.items()}
        record |= {name: value for name, value in self.results.items() if name.startswith("best/")}

    def to_meta(self) -> dict[str, Any]:
        """As JSON; floats as text, which keeps every bit, and NaN and infinity too."""
        meta = dict(vars(self))
        meta["window"] = {name: repr(value) for name, value in self.window.items()}
        meta["results"] = {name: repr(value) for name, value in self.results.items()}
        meta["config_hash"] = hashlib.sha256(self.config.encode()).hexdigest()[:16]
        return meta

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any], *, identity: Mapping[str, str], config: str) -> Position:
        """The position a checkpoint was saved at, under this run's identity and configuration."""
        names = ("step", "tokens", "tokens_trained", "skipped", "skips", "evaluated")
        return cls(
            **{name: int(meta[name]) for name in names},
            window={name: float(value) for name, value in meta["window"].items()},
            window_counts=[int(n) for n in meta["window_counts"]],
            window_reasons={name: int(n) for name, n in meta["window_reasons"].items()},
            results={name: float(value) for name, value in meta["results"].items()},
            files={name: int(n) for name, n in meta["files"].items()},
            loop=dict(meta["loop"]),
            identity=dict(identity),
            config=config,
        )


def check_same_run(
    meta: Mapping[str, Any], *, identity: Mapping[str, str], config_text: str, allow_changed: bool
) -> None:
    """Refuse to go on from a checkpoint that was trained under other settings or on other data.

    Raises:
        CheckpointMismatch: shows every difference, and what to do.
    """
    if allow_changed:
        return
    changes = config_changes(meta["config"], config_text)
    old: Mapping[str, str] = meta["identity"]
    changes += [
        f"{name}: fingerprint {old.get(name, '(absent)')} -> {identity.get(name, '(absent)')} (its content changed)"
        for name in sorted(old.keys() | identity.keys())
        if old.get(name) != identity.get(name)
    ]
    if changes:
        raise CheckpointMismatch(
            f"The checkpoint of step {meta['step']} was trained with other settings:\n  "
            + "\n  ".join(changes)
            + "\nTo start a new run, choose another --run.name. To go on under the new settings, add "
            "--run.allow-changed-config (the result will be neither run's)."
        )
