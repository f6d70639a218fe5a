"""What a trained model is worth, one cell a method and seed, and the table over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxpost.recipes.lab.comparison import points, share
from jaxpost.recipes.lab.statistics import Mean, over_seeds, paired


@dataclass(frozen=True)
class Cell:
    """One method with one seed, finished."""

    method: str
    seed: int
    rate: float
    updates: int
    pairs: int
    """Read, over all updates."""
    greedy: float
    """Share of right answers to unseen problems."""
    sampled: float
    """The same at temperature 1."""
    order: float
    """Share of unseen pairs whose right answer gained more log-probability than its wrong one; half for equal gains."""
    chosen: float
    """Mean change of log pi of the right answers of these pairs, nats."""
    rejected: float
    """Of the wrong ones."""
    tokens: float
    """Of a greedy answer."""
    seconds: float
    tasks: dict[str, float] = field(default_factory=dict)
    """Greedy, by task."""


NUMBERS = ("greedy", "sampled", "order", "chosen", "rejected", "tokens", "seconds")


@dataclass(frozen=True)
class Row:
    """One method over its seeds."""

    method: str
    rate: float
    seeds: tuple[int, ...]
    greedy: Mean
    against_first: Mean | None
    """greedy - the first method's, seed by seed; None for the first."""
    sampled: Mean
    sampled_against_first: Mean | None
    order: Mean
    chosen: Mean
    rejected: Mean
    tokens: Mean
    seconds: Mean
    tasks: dict[str, float]
    """Means over seeds."""


def summarise(cells: Sequence[Cell], first: str) -> list[Row]:
    """A row per method in the order of the cells, compared with the method `first`."""
    methods = list(dict.fromkeys(cell.method for cell in cells))
    by_method = {m: sorted((c for c in cells if c.method == m), key=lambda c: c.seed) for m in methods}
    of = lambda method, name: {cell.seed: getattr(cell, name) for cell in by_method[method]}  # noqa: E731
    rows = []
    for method, own in by_method.items():
        differ = {n: None if method == first else paired(of(first, n), of(method, n)) for n in ("greedy", "sampled")}
        rows.append(
            Row(
                method,
                own[0].rate,
                tuple(cell.seed for cell in own),
                **{name: over_seeds(list(of(method, name).values())) for name in NUMBERS},
                against_first=differ["greedy"],
                sampled_against_first=differ["sampled"],
                tasks={task: math.fsum(cell.tasks[task] for cell in own) / len(own) for task in own[0].tasks},
            )
        )
    return rows


def table(rows: Sequence[Row], *, title: str, first: str) -> str:
    """The rows as Markdown; each interval is a 95% t-interval over seeds."""
    tasks = list(rows[0].tasks)
    head = ["method", "rate", "greedy", f"against {first}", "sampled", f"against {first}", "pairs in order"]
    head += ["chosen, nats", "rejected, nats", "tokens", "seconds", *tasks]
    lines = [title, "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        against, sampled = (
            "" if mean is None else points(mean) for mean in (row.against_first, row.sampled_against_first)
        )
        values = [row.method, f"{row.rate:g}" if row.rate else "", share(row.greedy), against]
        values += [share(row.sampled), sampled, share(row.order), _nats(row.chosen), _nats(row.rejected)]
        values += [f"{row.tokens.mean:.1f}", f"{row.seconds.mean:.0f}"]
        lines.append("| " + " | ".join(values + [f"{row.tasks[task]:.0%}" for task in tasks]) + " |")
    return "\n".join(lines)


def _nats(mean: Mean) -> str:
    return f"{mean.mean:+.2f}" + ("" if math.isnan(mean.low) else f" ± {mean.half:.2f}")


def tried(cells: Sequence[Cell], chosen: dict[str, float], *, title: str) -> str:
    """What each learning rate gave on the seed that it was chosen with, as Markdown; the chosen one in bold."""
    rates = sorted({cell.rate for cell in cells})
    lines = [title, "", "| method | " + " | ".join(f"{rate:g}" for rate in rates) + " |"]
    lines.append("|" + "---|" * (1 + len(rates)))
    for method, own in chosen.items():
        found = {cell.rate: worth(cell) for cell in cells if cell.method.rpartition("@")[0] == method}
        shown = [f"**{found[rate]:.1%}**" if rate == own else f"{found[rate]:.1%}" for rate in rates]
        lines.append(f"| {method} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def worth(cell: Cell) -> float:
    """What a learning rate is chosen by: the mean of greedy and sampled accuracy, which is less noisy than either."""
    return (cell.greedy + cell.sampled) / 2
