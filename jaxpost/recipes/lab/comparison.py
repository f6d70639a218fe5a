"""Methods on the lab's model: equal samples for each, several seeds, one table. Knows nothing of how a cell is run."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from jaxpost.recipes.lab.statistics import Mean, over_seeds, paired
from jaxpost.train.progress import duration

RESULT = "result.json"


@dataclass(frozen=True)
class Cell:
    """One method with one seed, finished."""

    method: str
    seed: int
    before: dict[str, float]
    """Shares of right answers to the held-out problems, by evaluation."""
    after: dict[str, float]
    samples: int
    """Drawn, whether trained on or not."""
    tokens: int
    """Of these samples."""
    steps: int
    seconds: float
    tasks: dict[str, float] = field(default_factory=dict)
    """After training, by task, of the first evaluation."""


C = TypeVar("C")
"""What a finished cell says: a dataclass of plain values."""
RunCell = Callable[[str, int, Path], C]
"""(method, seed, folder) -> the finished cell; goes on where an interrupted one stopped."""


def run_cells(
    methods: Sequence[str],
    seeds: Sequence[int],
    run: RunCell[C],
    folder: Path,
    *,
    identity: Mapping[str, Any],
    kind: Callable[..., C] = Cell,  # ty: ignore[invalid-parameter-default]
    say: Callable[[str], None] = print,
) -> list[C]:
    """Every method with every seed, seed by seed, so that an interrupted comparison has whole seeds.

    A cell that `folder` holds is read, not run again.

    Args:
      identity: what decides the cells (model, budget, each method's settings); kept with them.
      kind: of the cells that are read back.

    Raises:
      ValueError: the folder holds cells of another comparison; says which setting differs.
    """
    todo = [(seed, method) for seed in seeds for method in methods]
    found = {pair: _finished(folder, *pair, identity, kind) for pair in todo}
    left, done, began = sum(cell is None for cell in found.values()), 0, time.perf_counter()
    for seed, method in todo:
        if found[seed, method] is not None:
            continue
        eta = f", about {duration((time.perf_counter() - began) / done * (left - done))} left" if done else ""
        say(f"{method}, seed {seed}: cell {done + 1} of {left}{eta}")
        cell = run(method, seed, _place(folder, method, seed))
        said: Any = cell
        _write(_place(folder, method, seed) / RESULT, {"identity": _of(identity, method), "cell": asdict(said)})
        found[seed, method] = cell
        done += 1
    return [cell for cell in found.values() if cell is not None]


def _place(folder: Path, method: str, seed: int) -> Path:
    return folder / method / f"seed{seed}"


def _of(identity: Mapping[str, Any], method: str) -> dict[str, Any]:
    """What decides one method's cells."""
    return json.loads(json.dumps({**identity, "methods": identity["methods"][method]}))


def _finished(folder: Path, seed: int, method: str, identity: Mapping[str, Any], kind: Callable[..., C]) -> C | None:
    path = _place(folder, method, seed) / RESULT
    if not path.is_file():
        return None
    kept, wanted = json.loads(path.read_text(encoding="utf-8")), _of(identity, method)
    if kept["identity"] != wanted:
        names = sorted(k for k in kept["identity"].keys() | wanted if kept["identity"].get(k) != wanted.get(k))
        raise ValueError(
            f"{path} is of another comparison ({', '.join(names)} differ); give another --out, or delete its folder"
        )
    return kind(**kept["cell"])


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    new.replace(path)


@dataclass(frozen=True)
class Row:
    """One method over its seeds."""

    method: str
    seeds: tuple[int, ...]
    before: Mean
    after: Mean
    gain: Mean
    """after - before, seed by seed."""
    against_first: Mean | None
    """after - the first method's after, seed by seed; None for the first."""
    samples: Mean
    tokens: Mean
    steps: Mean
    seconds: Mean
    tasks: dict[str, float]
    """Means after training."""


def summarise(cells: Sequence[Cell], evaluation: str) -> list[Row]:
    """A row per method, in the order of the cells' first appearance.

    Args:
      evaluation: which of the cells' evaluations is compared.
    """
    methods = list(dict.fromkeys(cell.method for cell in cells))
    by_method = {m: sorted((c for c in cells if c.method == m), key=lambda c: c.seed) for m in methods}
    first = {cell.seed: cell.after[evaluation] for cell in by_method[methods[0]]} if methods else {}
    rows = []
    for method, own in by_method.items():
        after = {cell.seed: cell.after[evaluation] for cell in own}
        rows.append(
            Row(
                method,
                tuple(after),
                before=over_seeds([cell.before[evaluation] for cell in own]),
                after=over_seeds(list(after.values())),
                gain=over_seeds([cell.after[evaluation] - cell.before[evaluation] for cell in own]),
                against_first=None if method == methods[0] else paired(first, after),
                samples=over_seeds([cell.samples for cell in own]),
                tokens=over_seeds([cell.tokens for cell in own]),
                steps=over_seeds([cell.steps for cell in own]),
                seconds=over_seeds([cell.seconds for cell in own]),
                tasks={task: sum(cell.tasks[task] for cell in own) / len(own) for task in own[0].tasks},
            )
        )
    return rows


def table(rows: Sequence[Row], *, title: str) -> str:
    """The rows as Markdown; each interval is a 95% t-interval over seeds."""
    if not rows:
        return title
    tasks = list(rows[0].tasks)
    head = ["method", "seeds", "before", "after", "gain", f"against {rows[0].method}"]
    head += ["samples", "tokens", "steps", "seconds", *tasks]
    lines = [title, "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        against = "" if row.against_first is None else points(row.against_first)
        counts = [f"{mean.mean:,.0f}" for mean in (row.samples, row.tokens, row.steps, row.seconds)]
        shares = [f"{row.tasks[task]:.0%}" for task in tasks]
        values = [
            row.method,
            str(len(row.seeds)),
            f"{row.before.mean:.1%}",
            share(row.after),
            points(row.gain),
            against,
        ]
        lines.append("| " + " | ".join(values + counts + shares) + " |")
    return "\n".join(lines)


def share(mean: Mean) -> str:
    """Of a whole, in percent, with half of its interval."""
    return f"{mean.mean:.1%}" + ("" if math.isnan(mean.low) else f" ± {100 * mean.half:.1f}")


def points(mean: Mean) -> str:
    """A difference in percentage points, with half of its interval."""
    return f"{100 * mean.mean:+.1f}" + ("" if math.isnan(mean.low) else f" ± {100 * mean.half:.1f}")


def write_table(folder: Path, rows: Sequence[Any], text: str, identity: Mapping[str, Any]) -> None:
    """table.md and table.json beside the cells; rows are dataclasses of plain values and of `Mean`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    _write(folder / "table.json", {"identity": dict(identity), "rows": [_plain(row) for row in rows]})


def _plain(row: Any) -> dict[str, Any]:
    """NaN is no JSON: an interval that is unknown is null."""

    def mean(value: Any) -> Any:
        if not isinstance(value, Mean):
            return value
        return {name: None if math.isnan(x) else x for name, x in value._asdict().items()}

    return {name: mean(getattr(row, name)) for name in row.__dataclass_fields__}
