"""`jaxpost search-curve`: presets x budgets x seeds on the same prompts -> accuracy against tokens, with intervals."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxpost.assemble.search import search
from jaxpost.assemble.search_numbers import is_known, outcome_of
from jaxpost.assemble.search_policy import Engines
from jaxpost.config_search import SearchConfig
from jaxpost.eval.search import Outcome, Runs, compute_optimal, halves, markdown, point, share
from jaxpost.eval.statistics import Interval, bootstrap_mean, mean_share
from jaxpost.search.curves import Trial, fit

CURVE = "curve.jsonl"
Row = Mapping[str, Any]
Results = dict[tuple[str, int], list[Sequence[Row]]]
"""By method and budget: the rows of each seed."""


@dataclass(frozen=True)
class Curve:
    """What was measured, as text and as lines of curve.jsonl."""

    table: str
    lines: Sequence[Mapping[str, Any]]
    failed: int
    """Prompts without an answer, over all runs."""


def run_curve(
    configs: Mapping[str, SearchConfig],
    *,
    budgets: Sequence[int] | None,
    seeds: int,
    out: Path,
    engines: Engines | None = None,
    progress: Any = None,
) -> Curve:
    """Searches the same prompts with every configuration, budget and seed, and says what tokens buy.

    Beside the methods stand the compute-optimal curve (for each difficulty the best method within the budget, chosen
    on one half of the prompts and reported on the other, 2408.03314) and the fitted allocator (a fixed total spent
    where the marginal gain is greatest, fitted on one half and replayed on the other). Difficulty is what a
    configuration of kind `allocate` measured, if there is one; its probes' tokens are counted.

    Args:
      configs: by a name for errors; their run.name names them in the curve.
      budgets: tokens a prompt; None: each configuration's own.

    Raises:
      ValueError: configurations that ask different prompts, have one name or no budget, or prompts of which nobody
        knows what is right.
    """
    cells = _cells(configs, budgets, seeds)
    engines = engines or Engines()
    results: Results = {}
    for number, (name, config, budget, seed) in enumerate(cells, 1):
        folder = out / name / f"{budget}-{seed}"
        run = replace(config.run, dir=str(folder), name=name, seed=config.run.seed + seed)
        if progress is not None:
            print(f"[{number}/{len(cells)}] {name}, {budget} tokens a prompt, seed {seed}", file=progress, flush=True)
        wanted = replace(config, budget=budget, run=run)
        command = ["jaxpost", "search", str(folder / "config.yaml")]
        found = search(wanted, command=command, engines=engines, progress=progress)
        results.setdefault((name, budget), []).append(found.rows)
    kept = _common(results)
    table = [
        Runs(name, budget, [_outcomes(rows, kept) for rows in seeds_]) for (name, budget), seeds_ in results.items()
    ]
    levels, probes = _difficulty(results, kept)
    lines = [*_points(table), *_optimal(table, levels), *_fitted(table, levels, probes)]
    _write(out / CURVE, lines)
    failed = sum("error" in row for seeds_ in results.values() for rows in seeds_ for row in rows)
    return Curve("\n".join([markdown(table), "", *_told(lines)]), lines, failed)


def _cells(
    configs: Mapping[str, SearchConfig], budgets: Sequence[int] | None, seeds: int
) -> list[tuple[str, SearchConfig, int, int]]:
    """(name, configuration, budget, seed) of every run; those of one configuration follow each other."""
    if seeds < 1:
        raise ValueError(f"--seeds is {seeds}; at least 1")
    names = [config.run.name for config in configs.values()]
    if len(set(names)) < len(names):
        raise ValueError(f"the presets are named {', '.join(names)}; each needs a run.name of its own")
    out = []
    for preset, config in configs.items():
        wanted = budgets if budgets is not None else [config.budget]
        if None in wanted:
            raise ValueError(f"{preset} has no budget: say --budgets 256 1024 ...")
        if any(budget is not None and budget < 1 for budget in wanted):
            raise ValueError(f"--budgets {' '.join(map(str, wanted))}: a budget is at least 1 token")
        spent = sorted({budget for budget in wanted if budget is not None})
        out += [(config.run.name, config, budget, seed) for budget in spent for seed in range(seeds)]
    return out


def _common(results: Results) -> list[int]:
    """Numbers of the prompts of which it is known what is right, the same in all runs."""
    every = [rows for seeds in results.values() for rows in seeds]
    first = {row["index"]: (row["where"], json.dumps(row.get("gold"))) for row in every[0]}
    for rows in every[1:]:
        if {row["index"]: (row["where"], json.dumps(row.get("gold"))) for row in rows} != first:
            raise ValueError(
                "the presets ask different prompts, so their curves cannot be compared: give --prompts or --count"
            )
    known = [
        number for number in first if all(is_known(row) for rows in every for row in rows if row["index"] == number)
    ]
    if not known:
        raise ValueError("no prompt says what is right: rows of prompts need an `answer`, or presets a `gold` section")
    return known


def _outcomes(rows: Sequence[Row], kept: Sequence[int]) -> list[Outcome]:
    by_number = {row["index"]: row for row in rows}
    return [outcome_of(by_number[number]) for number in kept]


def _difficulty(results: Results, kept: Sequence[int]) -> tuple[list[float] | None, list[int]]:
    """Each prompt's difficulty and what measuring it cost, as the first run that measured all of them has it."""
    for seeds in results.values():
        by_number = {row["index"]: row for row in seeds[0] if "difficulty" in row}
        if all(number in by_number for number in kept):
            found = [by_number[number] for number in kept]
            return [float(row["difficulty"]) for row in found], [int(row["probe_tokens"]) for row in found]
    return None, [0] * len(kept)


def _points(table: Sequence[Runs]) -> list[dict[str, Any]]:
    out = []
    for runs in sorted(table, key=lambda runs: (runs.method, runs.budget)):
        found = point(runs)
        line: dict[str, Any] = {"method": runs.method, "kind": "method", "budget": runs.budget}
        line |= {"accuracy": _listed(found.accuracy), "tokens": _listed(found.tokens), "any": _listed(found.any)}
        line |= {"prompts": found.prompts, "seeds": found.seeds, "failed": found.failed}
        out.append(line | {"by_seed": [round(x, 6) for x in found.by_seed]})
    return out


def _optimal(table: Sequence[Runs], levels: Sequence[float] | None) -> list[dict[str, Any]]:
    """The compute-optimal curve, where there is something to choose from."""
    if len(table) < 2 or len(table[0].right) < 4:
        return []
    bins = None if levels is None else _terciles(levels)
    return [
        {
            **{"method": "compute-optimal", "kind": "optimal", "budget": best.budget},
            **{"accuracy": _listed(best.accuracy), "tokens": _listed(best.tokens)},
            "chosen": [list(names) for names in best.chosen],
        }
        for best in compute_optimal(table, bins=bins)
    ]


def _terciles(levels: Sequence[float]) -> np.ndarray:
    """Bins 0, 1, 2 of difficulty with equally many prompts, as far as they differ."""
    cuts = np.unique(np.quantile(np.asarray(levels), [1 / 3, 2 / 3]))
    return np.searchsorted(cuts, np.asarray(levels), side="right")


def _fitted(table: Sequence[Runs], levels: Sequence[float] | None, probes: Sequence[int]) -> list[dict[str, Any]]:
    """The fitted allocator, replayed: fitted on one half of the prompts, spending a total on the other."""
    count = len(table[0].right)
    if len(table) < 2 or count < 4:
        return []
    by_cell = {(runs.method, runs.budget): runs for runs in table}
    hardness = [0.5] * count if levels is None else list(levels)
    first, second = halves(count)
    out = []
    for budget in sorted({runs.budget for runs in table}):
        right, tokens = np.zeros(count), np.asarray(probes, np.float64).copy()
        chosen: dict[str, int] = {}
        for fitted_on, reported in ((first, second), (second, first)):
            trials = [
                Trial(hardness[i], runs.method, runs.budget, round(float(runs.tokens[i])), float(runs.right[i]))
                for runs in table
                for i in fitted_on
            ]
            total = budget * len(reported) - int(np.asarray(probes)[reported].sum())
            plan = fit(trials).plan([hardness[i] for i in reported], max(total, 0))
            for i, level in zip(reported, plan.choices, strict=True):
                name = f"{level.method}@{level.budget}" if level.budget else "nothing"
                chosen[name] = chosen.get(name, 0) + 1
                if level.budget:
                    runs = by_cell[level.method, level.budget]
                    right[i], tokens[i] = runs.right[i], tokens[i] + runs.tokens[i]
        line: dict[str, Any] = {"method": "fitted allocator", "kind": "allocator", "budget": budget}
        line |= {"accuracy": _listed(mean_share(right)), "tokens": _listed(bootstrap_mean(tokens))}
        out.append(line | {"chosen": chosen})
    return out


def _told(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """The compute-optimal curve and the allocator in lines."""
    out = []
    for line in lines:
        if line["kind"] != "method":
            accuracy = share(Interval(*line["accuracy"]))
            out.append(f"{line['method']} at {line['budget']}: {accuracy}, {line['tokens'][0]:.0f} tokens a prompt")
    return out


def _listed(found: Interval) -> list[float]:
    return [round(float(x), 6) for x in found]


def _write(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.tmp")
    part.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    os.replace(part, path)
