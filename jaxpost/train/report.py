"""Keeps a run's folder readable: its README and its curves, rewritten as the run goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from jaxpost.metrics.writers import read_metrics
from jaxpost.train.curves import draw_curves
from jaxpost.train.folder import RunFolder, readme
from jaxpost.train.job import Job

_ANSWERS = 4
"""Held-out problems whose answers are shown, where there are many."""


def describe_run(job: Job, folder: RunFolder, status: str, results: Mapping[str, float]) -> None:
    """Write README.md and curves.svg for how far the run has come."""
    if not folder.writes:
        return
    metrics = folder.path / "metrics.jsonl"
    if metrics.exists():
        folder.write("curves.svg", draw_curves(list(read_metrics(metrics)), title=folder.path.name))
    folder.write("README.md", readme(folder, command=job.command, status=status, results=results))


def before_and_after(folder: Path) -> list[str]:
    """What training changed, as lines for the console: the first and last evaluation, and the answers of both.

    Read from the run's files, so it is the same however often the run was interrupted.
    """
    metrics, answers = folder / "metrics.jsonl", folder / "samples.jsonl"
    evals = [r for r in read_metrics(metrics) if r.get("kind") == "eval"] if metrics.exists() else []
    samples = [json.loads(line) for line in answers.read_bytes().splitlines()] if answers.exists() else []
    lines = []
    if len(evals) > 1:
        first, last = evals[0], evals[-1]
        for name in (n for n in last if n == "loss" or n.endswith("/loss")):
            if name in first and not name.startswith("best/"):
                lines.append(f"held-out {name}: {first[name]:.4f} before, {last[name]:.4f} after")
        for name in (n.removesuffix("/accuracy") for n in last if n.endswith("/accuracy")):
            lines += _accuracy(name, first, last)
    shown = [s for s in samples if s.get("kind", "eval") == "eval"]
    names = list(dict.fromkeys(s.get("eval") for s in shown))[:1]
    steps = sorted({s["step"] for s in shown if s.get("eval") in names})
    if len(steps) > 1:
        kept = [s for s in shown if s.get("eval") in names and not s.get("sample")]
        first_answers, last_answers = ([s for s in kept if s["step"] == step] for step in (steps[0], steps[-1]))
        pairs = list(zip(first_answers, last_answers, strict=False))
        for before, after in pairs[: _ANSWERS if names[0] else None]:
            lines += [f"> {one_line(before['prompt'])}", *_answers((("before", before), ("after", after)))]
    return lines


def _accuracy(name: str, first: Mapping[str, Any], last: Mapping[str, Any]) -> list[str]:
    """One evaluation's accuracy before and after, with intervals, and what several samples reach."""
    if f"{name}/accuracy" not in first:
        return []
    if f"{name}/low" not in first:  # of pairs: a mean without items
        before, after = (100 * r[f"{name}/accuracy"] for r in (first, last))
        return [f"held-out {name}/accuracy: {before:.1f}% before, {after:.1f}% after"]
    told = lambda r: (  # noqa: E731
        f"{100 * r[f'{name}/accuracy']:.1f}% [{100 * r[f'{name}/low']:.1f}, {100 * r[f'{name}/high']:.1f}]"
    )
    line = f"{name}: {told(first)} right before, {told(last)} after, of {int(last[f'{name}/items'])}"
    keys = [k for k in last if k.startswith(f"{name}/") and "@" in k and not k.endswith("pass@1") and k in first]
    more = [f"{k.partition('/')[2]} {100 * first[k]:.1f}% -> {100 * last[k]:.1f}%" for k in keys]
    return ["; ".join([line, *more])]


def _answers(pairs: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    return [f"  {label + ':':<8}{one_line(sample['text'])}" for label, sample in pairs]


def one_line(text: str) -> str:
    """Model text for a console: line breaks and control characters shown, so that it cannot move the cursor.

    >>> one_line("a" + chr(10) + "b" + chr(27) + "[2J")
    'a b?[2J'
    """
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def plain_config(text: str) -> dict[str, Any]:
    """The configuration as nested dicts, for loggers that show it."""
    return yaml.safe_load(text) or {}
