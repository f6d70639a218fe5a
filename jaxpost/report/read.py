"""A run's folder, read as it stands: in progress, with a torn last line, or with files missing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from jaxpost.metrics.writers import from_json
from jaxpost.report.text import clean, number

NAME = 80
"""Characters of a name that are kept."""


@dataclass(frozen=True)
class Sample:
    """A line of samples.jsonl. Texts are cleaned and cut (`text.clean`)."""

    step: int
    source: str
    """The evaluation's name; "rollout", or "sample" of a supervised run."""
    example: str
    sample: int
    prompt: str
    text: str
    answer: str
    rewards: Mapping[str, float | None]
    reward: float | None
    """The reward or the evaluation's score; None: unscored."""
    advantage: float | None
    finish: str
    tokens: int | None
    version: int | None

    @property
    def right(self) -> bool:
        """Whether it has the full score, 1."""
        return self.reward is not None and self.reward >= 1.0

    @property
    def truncated(self) -> bool:
        """Cut off by the limit of tokens, or of turns."""
        return self.finish in ("length", "turns")


@dataclass(frozen=True)
class Run:
    """What a folder holds."""

    folder: Path
    config_text: str
    config: Mapping[str, Any]
    starts: list[dict[str, Any]]
    """environment.json: one entry for each start."""
    records: list[dict[str, Any]]
    samples: list[Sample]
    alarms: list[dict[str, Any]]
    notices: list[str] = field(default_factory=list)
    """What could not be read."""

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def train(self) -> list[dict[str, Any]]:
        return [r for r in self.records if r.get("kind") == "train"]

    @property
    def evals(self) -> list[dict[str, Any]]:
        return [r for r in self.records if r.get("kind") == "eval"]

    def setting(self, key: str) -> Any:
        """A value of the configuration by its dotted key; None where it has none."""
        found: Any = self.config
        for part in key.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        return found


def read_run(folder: Path) -> Run:
    """Read everything that a report shows.

    Raises:
      FileNotFoundError: no folder, or one without metrics.jsonl.
    """
    folder = Path(folder)
    if not (folder / "metrics.jsonl").is_file():
        what = "holds no metrics.jsonl" if folder.is_dir() else "does not exist"
        raise FileNotFoundError(f"{folder} {what}: give the folder of a run, such as runs/demo")
    notices: list[str] = []
    config_text = _text(folder / "config.yaml")
    config = _parsed(folder / "config.yaml", config_text, yaml.safe_load, dict, notices)
    starts = _parsed(folder / "environment.json", _text(folder / "environment.json"), json.loads, list, notices)
    records = _lines(folder / "metrics.jsonl", from_json, notices)
    samples = [_sample(row) for row in _lines(folder / "samples.jsonl", json.loads, notices)]
    alarms = _lines(folder / "alarms.jsonl", json.loads, notices)
    starts = [start for start in starts if isinstance(start, dict)]
    return Run(folder, config_text, config, starts, records, samples, alarms, notices)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _parsed(path: Path, text: str, parse: Any, kind: type, notices: list[str]) -> Any:
    try:
        found = parse(text) if text else kind()
    except (ValueError, yaml.YAMLError) as error:
        notices.append(f"{path.name} cannot be read: {error}")
        return kind()
    return found if isinstance(found, kind) else kind()


def _lines(path: Path, parse: Any, notices: list[str]) -> list[dict[str, Any]]:
    """The lines that hold an object with a step; of the others, notices."""
    found: list[dict[str, Any]] = []
    bad: list[int] = []
    if not path.is_file():
        return found
    with open(path, "rb") as file:
        for index, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                notices.append(f"{path.name} ends in the middle of line {index}, which is left out.")
                break
            try:
                row = parse(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                found.append(row)
            else:
                bad.append(index)
    if bad:
        where = ", ".join(map(str, bad[:5])) + (" ..." if len(bad) > 5 else "")
        notices.append(f"{path.name}: {len(bad)} lines cannot be read and are left out (line {where}).")
    return found


def _sample(row: Mapping[str, Any]) -> Sample:
    kind = row.get("kind", "sample")
    rewards = row.get("rewards")
    return Sample(
        step=row["step"],
        source=clean(row.get("eval", "eval") if kind == "eval" else kind, NAME),
        example=clean(row.get("example", row.get("prompt", "")), 200),
        sample=_whole(row.get("sample")) or 0,
        prompt=clean(row.get("prompt")),
        text=clean(row.get("text")),
        answer=clean(row.get("answer")),
        rewards={clean(k, NAME): number(v) for k, v in rewards.items()} if isinstance(rewards, Mapping) else {},
        reward=number(row.get("score") if kind == "eval" else row.get("reward")),
        advantage=number(row.get("advantage")),
        finish=clean(row.get("finish"), NAME),
        tokens=_whole(row.get("tokens")),
        version=_whole(row.get("version")),
    )


def _whole(value: Any) -> int | None:
    found = number(value)
    return None if found is None or abs(found) > 1e15 else int(found)
