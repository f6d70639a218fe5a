"""What a search is worth: top-1, any-of-k and pass@k apart, accuracy against tokens, and the compute-optimal curve.

top-1 is whether the chosen answer is right; any-of-k whether one of the first k that the search offers is, which
nobody can pick without knowing; pass@k is the chance that k fresh independent samples hold a right one, and is said of
samples alone. They are three numbers: none stands for another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from jaxpost.eval.statistics import (
    Interval,
    PairedTest,
    bootstrap_mean,
    mcnemar,
    mean_pass_at_k,
    mean_share,
    paired_difference,
    wilson,
)


class Outcome(NamedTuple):
    """One prompt's search, judged."""

    right: bool
    """The chosen answer is."""
    offered: tuple[bool, ...]
    """Whether each answer that the search offers is right, in its order; the first is the chosen one."""
    tokens: int
    """Generated + verifier tokens."""
    failed: bool = False
    """It ended with an error; its chosen answer, if any, counts all the same."""


@dataclass(frozen=True)
class Runs:
    """Outcomes of the same prompts with one method and one budget, by seed: [seeds][prompts]."""

    method: str
    budget: int
    seeds: Sequence[Sequence[Outcome]]
    _right: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.seeds or not self.seeds[0] or len({len(seed) for seed in self.seeds}) > 1:
            raise ValueError(f"{self.method} at {self.budget} tokens: every seed needs outcomes of the same prompts")
        table = np.array([[outcome.right for outcome in seed] for seed in self.seeds], np.float64)
        object.__setattr__(self, "_right", table)

    @property
    def right(self) -> np.ndarray:
        """Share of seeds that are right, by prompt: [prompts]."""
        return self._right.mean(axis=0)

    @property
    def tokens(self) -> np.ndarray:
        """Mean tokens over seeds, by prompt: [prompts]."""
        return np.array([[o.tokens for o in seed] for seed in self.seeds], np.float64).mean(axis=0)


def top_1(outcomes: Sequence[Outcome]) -> Interval:
    """Share of prompts whose chosen answer is right, with Wilson's interval."""
    return wilson(sum(o.right for o in outcomes), len(outcomes))


def any_of(outcomes: Sequence[Outcome], k: int) -> Interval:
    """Share of prompts with a right one among the first k answers offered, with Wilson's interval.

    >>> any_of([Outcome(False, (False, True), 9), Outcome(False, (False,), 5)], 2).value
    0.5
    """
    if k < 1:
        raise ValueError(f"any of {k} answers")
    return wilson(sum(any(o.offered[:k]) for o in outcomes), len(outcomes))


def pass_at(outcomes: Sequence[Outcome], k: int) -> Interval:
    """Mean unbiased pass@k over prompts (2107.03374), with an interval over prompts.

    The answers offered must be independent samples: of a beam or a tree this says nothing.

    Raises:
      ValueError: a prompt with less than k answers.
    """
    return mean_pass_at_k([len(o.offered) for o in outcomes], [sum(o.offered) for o in outcomes], k)


class Point(NamedTuple):
    """One method at one budget: accuracy against tokens."""

    method: str
    budget: int
    accuracy: Interval
    """Top-1, over prompts (each the mean over its seeds)."""
    tokens: Interval
    """Spent by prompt."""
    any: Interval
    """Any of the answers offered."""
    prompts: int
    seeds: int
    failed: int
    by_seed: tuple[float, ...]
    """Top-1 of each seed."""


def point(runs: Runs) -> Point:
    """Means over prompts with intervals over prompts (`mean_share`): seeds of one prompt are not independent items."""
    offered = np.array([[any(o.offered) for o in seed] for seed in runs.seeds], np.float64).mean(axis=0)
    each = [float(np.mean([o.right for o in seed])) for seed in runs.seeds]
    return Point(
        runs.method,
        runs.budget,
        mean_share(runs.right),
        bootstrap_mean(runs.tokens),
        mean_share(offered),
        len(runs.right),
        len(runs.seeds),
        sum(o.failed for seed in runs.seeds for o in seed),
        tuple(each),
    )


def curve(table: Sequence[Runs], method: str) -> list[Point]:
    """A method's points, by budget."""
    return [point(runs) for runs in sorted(table, key=lambda r: r.budget) if runs.method == method]


class Optimal(NamedTuple):
    """The compute-optimal strategy at one budget."""

    budget: int
    accuracy: Interval
    """On prompts that it was not chosen on."""
    tokens: Interval
    chosen: tuple[tuple[str, ...], ...]
    """method@budget by bin of difficulty, of each of the two halves."""


def halves(prompts: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Prompt numbers in two halves by chance.

    >>> [len(half) for half in halves(5)]
    [3, 2]
    """
    order = np.random.default_rng(seed).permutation(prompts)
    cut = (prompts + 1) // 2
    return np.sort(order[:cut]), np.sort(order[cut:])


def compute_optimal(
    table: Sequence[Runs], *, budgets: Sequence[int] | None = None, bins: npt.ArrayLike | None = None, seed: int = 0
) -> list[Optimal]:
    """At each budget, for each bin of difficulty, the method (and at most that budget) that was best on one half of
    the prompts, reported on the other; and the other way round, so that every prompt is reported once (2408.03314).

    Of equals the one that spent less is taken. Nothing is chosen on what it is reported on.

    Args:
      table: of the same prompts.
      budgets: reported; None: all that the table has.
      bins: a number for each prompt, known before its search; None: all are in one bin.

    Raises:
      ValueError: no runs, or of different numbers of prompts, or a budget without runs.
    """
    if not table or len({len(runs.right) for runs in table}) > 1:
        raise ValueError("the compute-optimal curve needs runs, and all of them on the same prompts")
    count = len(table[0].right)
    kinds = np.zeros(count, int) if bins is None else np.asarray(bins).reshape(-1)
    first, second = halves(count, seed=seed)
    out = []
    for budget in sorted(set(budgets if budgets is not None else [runs.budget for runs in table])):
        allowed = [runs for runs in table if runs.budget <= budget]
        if not allowed:
            raise ValueError(f"no runs with a budget of at most {budget} tokens")
        right, tokens = np.zeros(count), np.zeros(count)
        chosen = []
        for chosen_on, reported in ((first, second), (second, first)):
            names = []
            for kind in np.unique(kinds):
                seen, unseen = chosen_on[kinds[chosen_on] == kind], reported[kinds[reported] == kind]
                best = _best(allowed, seen if len(seen) else chosen_on)
                right[unseen], tokens[unseen] = best.right[unseen], best.tokens[unseen]
                names.append(f"{best.method}@{best.budget}")
            chosen.append(tuple(names))
        out.append(Optimal(budget, mean_share(right), bootstrap_mean(tokens), tuple(chosen)))
    return out


def _best(table: Sequence[Runs], prompts: np.ndarray) -> Runs:
    return max(table, key=lambda runs: (runs.right[prompts].mean(), -runs.tokens[prompts].mean()))


class Comparison(NamedTuple):
    """Two methods at one budget, prompt by prompt."""

    difference: Interval
    """second - first, top-1, with a bootstrap interval over prompts."""
    tokens: Interval
    """second - first."""
    test: PairedTest
    """McNemar's on the first seed."""


def compare(table: Sequence[Runs], first: str, second: str, budget: int) -> Comparison:
    """second against first at equal budget.

    Raises:
      ValueError: no runs of one of them at this budget.
    """
    a, b = (_find(table, method, budget) for method in (first, second))
    flags = [[o.right for o in runs.seeds[0]] for runs in (a, b)]
    return Comparison(
        paired_difference(a.right, b.right), paired_difference(a.tokens, b.tokens), mcnemar(flags[0], flags[1])
    )


def _find(table: Sequence[Runs], method: str, budget: int) -> Runs:
    for runs in table:
        if runs.method == method and runs.budget == budget:
            return runs
    raise ValueError(f"there are no runs of {method} with a budget of {budget} tokens")


def markdown(table: Sequence[Runs], *, against: str | None = None) -> str:
    """A row for each method and budget; `against` names the method that others are compared with at equal budget."""
    head = ["method", "budget", "tokens spent", "top-1", "any offered", "failed"]
    head += [f"against {against}"] if against else []
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    at: Mapping[int, Runs] = {runs.budget: runs for runs in table if runs.method == against}
    for runs in table:
        found = point(runs)
        cells = [runs.method, str(runs.budget), f"{found.tokens.value:.0f}", share(found.accuracy), share(found.any)]
        cells.append(str(found.failed))
        if against:
            other = at.get(runs.budget)
            gap = None if other is None or other is runs else paired_difference(other.right, runs.right)
            cells.append("" if gap is None else f"{100 * gap.value:+.1f} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def share(found: Interval) -> str:
    """In per cent, with its interval.

    >>> share(Interval(0.5, 0.4, 0.6))
    '50.0% [40.0, 60.0]'
    """
    if math.isnan(found.value):
        return "unknown"
    return f"{found.value:.1%} [{100 * found.low:.1f}, {100 * found.high:.1f}]"
