"""What verifiers are worth: calibration, and how often they accept what is wrong or reject what is right."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from jaxpost.eval.reward import Calibration, area_under_curve, calibration
from jaxpost.eval.search import share
from jaxpost.eval.statistics import Interval, wilson


class Acceptance(NamedTuple):
    """A verifier used as a filter: what it lets through."""

    threshold: float
    false_accept: Interval
    """P(score >= threshold | wrong), Wilson."""
    false_reject: Interval
    """P(score < threshold | right), Wilson."""
    precision: Interval
    """P(right | score >= threshold), Wilson."""
    accepted: int
    items: int


def acceptance(scores: npt.ArrayLike, right: npt.ArrayLike, *, threshold: float = 0.5) -> Acceptance:
    """Of answers with scores and labels; scores that are NaN are rejected.

    Example:
      >>> found = acceptance([0.9, 0.8, 0.4, 0.1], [1, 0, 1, 0])
      >>> found.false_accept.value, found.false_reject.value, found.precision.value
      (0.5, 0.5, 0.5)

    Raises:
      ValueError: different numbers of scores and labels.
    """
    x, y = _pair(scores, right)
    kept = np.nan_to_num(x, nan=-math.inf) >= threshold
    wrong_in, right_out = int((kept & ~y).sum()), int((~kept & y).sum())
    return Acceptance(
        threshold,
        wilson(wrong_in, int((~y).sum())),
        wilson(right_out, int(y.sum())),
        wilson(int((kept & y).sum()), int(kept.sum())),
        int(kept.sum()),
        int(x.size),
    )


def _pair(scores: npt.ArrayLike, right: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(scores, np.float64).reshape(-1), np.asarray(right).reshape(-1) >= 0.5
    if x.shape != y.shape:
        raise ValueError(f"{x.size} scores of {y.size} answers")
    return x, y


class Worth(NamedTuple):
    """One verifier on labelled answers."""

    name: str
    calibration: Calibration
    area: float
    """P(a right answer scores above a wrong one), ties half."""
    accepts: tuple[Acceptance, ...]


def worth(
    name: str,
    scores: npt.ArrayLike,
    right: npt.ArrayLike,
    *,
    thresholds: Sequence[float] = (0.5, 0.9),
    bins: int = 10,
) -> Worth:
    """Calibration, order and acceptance of one verifier; scores outside of [0, 1] are in the outer bins."""
    x, y = _pair(scores, right)
    known = ~np.isnan(x)
    accepts = tuple(acceptance(x, y, threshold=threshold) for threshold in thresholds)
    return Worth(name, calibration(x[known], y[known], bins=bins), area_under_curve(x[known], y[known]), accepts)


def report(
    parts: Mapping[str, npt.ArrayLike], right: npt.ArrayLike, *, thresholds: Sequence[float] = (0.5, 0.9)
) -> str:
    """A Markdown report of several verifiers (a composition and its parts) on the same labelled answers.

    Args:
      parts: scores by verifier.
      right: labels.

    Example:
      >>> print(report({"orm": [0.9, 0.2, 0.8, 0.1]}, [1, 0, 1, 0], thresholds=(0.5,)).splitlines()[4])
      | orm | 0.150 | 1.000 | 0.0% [0.0, 65.8] | 0.0% [0.0, 65.8] | 100.0% [34.2, 100.0] |
    """
    y = np.asarray(right).reshape(-1) >= 0.5
    head = ["verifier", "calibration error", "area under the curve"]
    for threshold in thresholds:
        head += [f"{what} at {threshold:g}" for what in ("false accept", "false reject", "precision")]
    lines = [f"{y.size} answers, {int(y.sum())} of them right; Wilson's 95% intervals.", ""]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    found = [worth(name, scores, y, thresholds=thresholds) for name, scores in parts.items()]
    for each in found:
        cells = [each.name, f"{each.calibration.error:.3f}", f"{each.area:.3f}"]
        for accepted in each.accepts:
            cells += [share(x) for x in (accepted.false_accept, accepted.false_reject, accepted.precision)]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Reliability: mean score said -> share that was right (answers)."]
    for each in found:
        bins = ", ".join(f"{said:.2f} -> {came:.2f} ({count})" for said, came, count in each.calibration.bins)
        lines.append(f"- {each.name}: {bins}")
    return "\n".join(lines)
