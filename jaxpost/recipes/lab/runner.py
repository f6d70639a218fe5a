"""Runs the cells of a comparison: each is an ordinary run of the online loop, in a folder of its own."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxpost import config_io
from jaxpost.assemble.answer import keep_programs
from jaxpost.assemble.rl import train
from jaxpost.config_check_rl import check_rl
from jaxpost.config_io import ConfigError
from jaxpost.config_rl import RLConfig
from jaxpost.recipes.lab.comparison import Cell, run_cells, summarise, table, write_table
from jaxpost.recipes.lab.methods import COMPARED, Budget, lab_config, load_method, title_of
from jaxpost.recipes.lab.model import Lab, Recipe, make_lab, read_rows


def compare(
    methods: Sequence[str],
    *,
    seeds: int = 5,
    budget: Budget | None = None,
    folder: Path,
    recipe: Recipe | None = None,
    flags: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> str:
    """Runs what is missing of methods x seeds on the lab's model, and writes the table.

    Args:
      methods: names of the lab's methods or paths of presets; the others are compared with the first.
      seeds: 0 .. seeds - 1, of problems and noise.
      folder: of runs and tables; cells in it are kept.
      flags: settings for every method, as on the command line.

    Returns:
      The table as Markdown.

    Raises:
      ConfigError: no such method, or two of one name. ValueError: the folder is another comparison's.
    """
    budget, folder = budget or Budget(), Path(folder)
    presets = {title_of(name): load_method(name) for name in methods}
    if len(presets) < len(methods):
        raise ConfigError(f"two of the methods have one name: {', '.join(map(title_of, methods))}")
    if seeds < 1:
        raise ConfigError(f"--seeds {seeds}: at least one is needed")
    lab = make_lab(recipe, say=say)
    keep_programs()

    def configured(method: str, seed: int, place: Path) -> RLConfig:
        return lab_config(presets[method], lab, budget, name=method, seed=seed, folder=place / "run", flags=flags)

    settings = {method: config_io.dump(check_rl(configured(method, 0, Path()))) for method in presets}
    identity = {"lab": lab.recipe.fingerprint, "methods": settings}

    def run(method: str, seed: int, place: Path) -> Cell:
        return run_cell(method, configured(method, seed, place), lab)

    cells = run_cells(list(presets), range(seeds), run, folder, identity=identity, say=say)
    text = table(summarise(cells, COMPARED), title=_title(lab, budget, seeds))
    write_table(folder, summarise(cells, COMPARED), text, identity)
    return text


def _title(lab: Lab, budget: Budget, seeds: int) -> str:
    return (
        f"Lab {lab.recipe.fingerprint}: {seeds} seeds, {budget.samples} samples a run ({budget.prompts} prompts x "
        f"{budget.group} a step), {budget.minibatches} updates a pass, Adam at {budget.lr:g}; accuracy on "
        f"{lab.recipe.held_out} unseen problems, greedy; ± is half of a 95% t-interval over seeds."
    )


def run_cell(method: str, config: RLConfig, lab: Lab) -> Cell:
    """One run, to its end, and what its folder says of it.

    Raises:
      KeyboardInterrupt: a signal stopped it; everything is saved.
    """
    began = time.perf_counter()
    result = train(config, command=("jaxpost", "lab", "compare", method))
    if result.stopped:
        raise KeyboardInterrupt(result.stopped)
    return read_cell(method, config.run.seed, Path(config.run.dir), lab, seconds=time.perf_counter() - began)


def read_cell(method: str, seed: int, folder: Path, lab: Lab, *, seconds: float) -> Cell:
    """A finished run's cell, from its metrics and its last evaluation's answers."""
    records = _lines(folder / "metrics.jsonl")
    evaluations = [r for r in records if r["kind"] == "eval"]
    steps = [r for r in records if r["kind"] == "train"]
    names = [key.partition("/")[0] for key in evaluations[0] if key.endswith("/accuracy")]
    before, after = ({name: float(r[f"{name}/accuracy"]) for name in names} for r in (evaluations[0], evaluations[-1]))
    return Cell(
        method,
        seed,
        before,
        after,
        samples=int(sum(r["samples"] for r in steps)),
        tokens=round(sum(r["samples"] * r["answer_tokens"] for r in steps)),
        steps=int(evaluations[-1]["step"]),
        seconds=round(seconds, 1),
        tasks=_by_task(folder, evaluations[-1]["step"], lab),
    )


def _by_task(folder: Path, step: int, lab: Lab) -> dict[str, float]:
    task_of = {row["prompt"]: row["task"] for row in read_rows(lab.held_out)}
    scores: dict[str, list[float]] = {task: [] for task in lab.recipe.tasks}
    for row in _lines(folder / "samples.jsonl"):
        if row["kind"] == "eval" and row["step"] == step and row["eval"] == COMPARED:
            scores[task_of[row["prompt"]]].append(row["score"])
    return {task: sum(found) / len(found) for task, found in scores.items() if found}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
