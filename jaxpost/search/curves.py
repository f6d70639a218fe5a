"""Accuracy as a function of tokens, fitted by difficulty, and a fixed total spent along it.

For each bin of difficulty and method, accuracy at several budgets is made monotone (isotonic regression, weighted by
counts: more budget is never worse in the mean), and over all methods of the bin the least concave majorant is taken.
Along it the gain per token falls, so taking the increment with the greatest gain per token of all prompts, until the
total is spent, maximises the predicted sum: no other choice of increments of the same cost gains more. Where the last
increment does not fit, the loss is less than that increment's gain.

The majorant of noisy points is optimistic: compare the predicted accuracy with the realised one.
"""

from __future__ import annotations

import bisect
import heapq
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple


class Trial(NamedTuple):
    """One prompt that was searched with a method and a budget: what the search spent, and whether it was right."""

    difficulty: float
    method: str
    budget: int
    tokens: int
    right: float


class Level(NamedTuple):
    """A vertex of a bin's curve: what a method with a budget costs and reaches."""

    cost: float
    accuracy: float
    method: str
    budget: int


class Plan(NamedTuple):
    """A level for each prompt, the mean accuracy that is predicted, and what it costs."""

    choices: list[Level]
    predicted: float
    cost: float


def isotonic(values: Sequence[float], weights: Sequence[float] | None = None) -> list[float]:
    """The non-decreasing sequence that is nearest in weighted squares, by pooling adjacent violators.

    >>> isotonic([0.1, 0.5, 0.3, 0.9])
    [0.1, 0.4, 0.4, 0.9]
    """
    pools: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights or [1.0] * len(values), strict=True):
        mean, total, count = value, weight, 1
        while pools and pools[-1][0] > mean:
            other, more, n = pools.pop()
            mean, total, count = (mean * total + other * more) / (total + more), total + more, count + n
        pools.append((mean, total, count))
    return [mean for mean, _, count in pools for _ in range(count)]


def envelope(levels: Iterable[Level]) -> tuple[Level, ...]:
    """The vertices of the least concave majorant, from the cheapest to the best: cost and accuracy rise, gains per
    cost fall.

    >>> [v.cost for v in envelope([Level(0, 0.0, "", 0), Level(1, 0.1, "a", 1), Level(2, 0.6, "b", 2),
    ...                            Level(3, 0.6, "a", 3), Level(4, 0.8, "b", 4)])]
    [0, 2, 4]
    """
    kept: list[Level] = []
    for level in sorted(levels, key=lambda v: (v.cost, -v.accuracy)):
        if kept and level.accuracy <= kept[-1].accuracy:
            continue
        if kept and level.cost == kept[-1].cost:
            continue
        while len(kept) > 1 and _slope(kept[-2], kept[-1]) <= _slope(kept[-1], level):
            kept.pop()
        kept.append(level)
    return tuple(kept)


def _slope(a: Level, b: Level) -> float:
    return (b.accuracy - a.accuracy) / (b.cost - a.cost)


@dataclass(frozen=True)
class Fitted:
    """A fitted policy: a curve for each bin of difficulty.

    Attributes:
      edges: between bins, rising; bin i holds difficulties in [edges[i-1], edges[i]).
      curves: vertices of each bin's envelope, the first with cost 0.
      counts: prompts that each bin was fitted on.
      cost: what a vertex costs: its budget ("limit": a total is never exceeded), or the mean of what was spent ("mean":
        it holds in the mean).
    """

    edges: tuple[float, ...]
    curves: tuple[tuple[Level, ...], ...]
    counts: tuple[int, ...]
    cost: Literal["limit", "mean"] = "limit"

    @property
    def methods(self) -> set[str]:
        """That a plan may choose."""
        return {level.method for curve in self.curves for level in curve if level.budget > 0}

    def bin(self, difficulty: float) -> int:
        """Which curve a difficulty has."""
        return bisect.bisect_right(self.edges, difficulty)

    def plan(self, difficulties: Sequence[float], total: float | int) -> Plan:
        """The increments of greatest gain per token until the total is spent. Equals are taken in order.

        Example:
          >>> curve = (Level(0, 0.0, "", 0), Level(10, 0.5, "greedy", 10), Level(20, 0.6, "vote", 20))
          >>> hard = (Level(0, 0.0, "", 0), Level(10, 0.2, "greedy", 10), Level(20, 0.3, "vote", 20))
          >>> [c.budget for c in Fitted((0.5,), (curve, hard), (9, 9)).plan([0.1, 0.9, 0.2], 30)[0]]
          [10, 10, 10]
        """
        curves = [self.curves[self.bin(d)] for d in difficulties]
        at, left = [0] * len(curves), float(total)
        heap = [(-_slope(c[0], c[1]), i) for i, c in enumerate(curves) if len(c) > 1]
        heapq.heapify(heap)
        while heap:
            _, i = heapq.heappop(heap)
            curve, level = curves[i], at[i]
            step = curve[level + 1].cost - curve[level].cost
            if step > left:
                continue
            left -= step
            at[i] = level + 1
            if level + 2 < len(curve):
                heapq.heappush(heap, (-_slope(curve[level + 1], curve[level + 2]), i))
        choices = [curve[level] for curve, level in zip(curves, at, strict=True)]
        predicted = math.fsum(c.accuracy for c in choices) / len(choices) if choices else math.nan
        return Plan(choices, predicted, float(total) - left)

    def save(self, path: str | Path) -> Path:
        """As JSON."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = asdict(self) | {"curves": [[level._asdict() for level in curve] for curve in self.curves]}
        new = path.with_name(path.name + ".new")
        new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        new.replace(path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Fitted:
        """What `save` wrote.

        Raises:
          FileNotFoundError: no such file. ValueError: it holds no fitted policy.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such fitted policy; fit one first")
        try:
            content: Any = json.loads(path.read_text(encoding="utf-8"))
            curves = tuple(tuple(Level(**level) for level in curve) for curve in content["curves"])
            found = cls(tuple(content["edges"]), curves, tuple(content["counts"]), content["cost"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: holds no fitted policy: {error!r}") from None
        if len(found.curves) != len(found.edges) + 1 or not all(found.curves):
            raise ValueError(f"{path}: {len(found.edges)} edges need {len(found.edges) + 1} curves")
        return found


def fit(trials: Sequence[Trial], *, bins: int = 3, cost: Literal["limit", "mean"] = "limit") -> Fitted:
    """Curves from trials of many prompts; bins hold equally many trials, as far as their difficulties differ.

    Trials with a budget of 0 say what a prompt's probes alone reach: the curve begins there, else at accuracy 0.

    Raises:
      ValueError: no trials, or no bins.
    """
    if not trials or bins < 1:
        raise ValueError(f"cannot fit {bins} bins to {len(trials)} trials")
    ordered = sorted(trial.difficulty for trial in trials)
    cuts = {ordered[len(ordered) * i // bins] for i in range(1, bins)}
    edges = tuple(sorted(cut for cut in cuts if cut > ordered[0]))
    grouped: list[list[Trial]] = [[] for _ in range(len(edges) + 1)]
    for trial in trials:
        grouped[bisect.bisect_right(edges, trial.difficulty)].append(trial)
    return Fitted(edges, tuple(_curve(group, cost) for group in grouped), tuple(map(len, grouped)), cost)


def _curve(trials: Sequence[Trial], cost: str) -> tuple[Level, ...]:
    by_method: Mapping[str, dict[int, list[Trial]]] = defaultdict(lambda: defaultdict(list))
    for trial in trials:
        by_method[trial.method][trial.budget].append(trial)
    start = [t.right for t in trials if t.budget == 0]
    levels = [Level(0.0, math.fsum(start) / len(start) if start else 0.0, "", 0)]
    for method, budgets in by_method.items():
        asked = sorted(budget for budget in budgets if budget > 0)
        means = [math.fsum(t.right for t in budgets[b]) / len(budgets[b]) for b in asked]
        smooth = isotonic(means, [float(len(budgets[b])) for b in asked])
        spent = [math.fsum(t.tokens for t in budgets[b]) / len(budgets[b]) for b in asked]
        prices = [float(b) for b in asked] if cost == "limit" else [max(x, 1.0) for x in isotonic(spent)]
        levels += [Level(*each) for each in zip(prices, smooth, [method] * len(asked), asked, strict=True)]
    return envelope(levels)
