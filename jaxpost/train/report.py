"""Keeps a run's folder readable: its README and its curves, rewritten as the run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from jaxpost.metrics.writers import read_metrics
from jaxpost.train.curves import draw_curves
from jaxpost.train.folder import RunFolder, readme
from jaxpost.train.job import SupervisedJob


def describe_run(job: SupervisedJob, folder: RunFolder, status: str, results: Mapping[str, float]) -> None:
    """Write README.md and curves.svg for how far the run has come."""
    if not folder.writes:
        return
    metrics = folder.path / "metrics.jsonl"
    if metrics.exists():
        folder.write("curves.svg", draw_curves(list(read_metrics(metrics)), title=folder.path.name))
    folder.write("README.md", readme(folder, command=job.command, status=status, results=results))


def plain_config(text: str) -> dict[str, Any]:
    """The configuration as nested dicts, for loggers that show it."""
    return yaml.safe_load(text) or {}
