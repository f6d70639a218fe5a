"""What a reward model's scores are worth: the right order, calibration, length bias, the first wrong step. NumPy only.

Scores of pairs and rankings are numbers whose differences count; those of labelled answers and steps are
probabilities. Intervals are 95%; a group (a pair, a ranking, an answer) is the item that they count, since the pairs
of one ranking are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from jaxpost.eval.statistics import Interval, mean_share, wilson


class Ranked(NamedTuple):
    """One group's answers."""

    scores: np.ndarray
    """[n]"""
    ranks: np.ndarray
    """[n], 0 the best."""
    lengths: np.ndarray
    """[n], tokens."""
    strength: float = 1.0
    """Margin by grade."""
    subset: str = ""


class Labelled(NamedTuple):
    """One answer's scores and labels: one, or one for each step."""

    scores: np.ndarray
    """[n]"""
    labels: np.ndarray
    """[n]"""
    length: int
    """Tokens of the answer."""
    subset: str = ""
    question: Hashable = None
    """Answers to one question are not independent; None: of this answer alone."""


class Calibration(NamedTuple):
    """How often what has the probability p comes true."""

    error: float
    """Expected calibration error: sum over bins of their share times |mean p - share that came true| (1706.04599)."""
    bins: list[tuple[float, float, int]]
    """(mean p, share that came true, count) of the bins that are not empty."""


def calibration(
    probabilities: npt.ArrayLike, outcomes: npt.ArrayLike, *, bins: int = 10, low: float = 0.0, high: float = 1.0
) -> Calibration:
    """Equal-width bins of [low, high].

    Args:
      outcomes: 0, 1 or shares between them.

    Example:
      >>> calibration([0.9, 0.9, 0.2, 0.2], [1, 0, 0, 0]).error.__round__(3)
      0.3
    """
    p, y = np.asarray(probabilities, np.float64).reshape(-1), np.asarray(outcomes, np.float64).reshape(-1)
    if not p.size:
        return Calibration(math.nan, [])
    where = np.clip(((p - low) / (high - low) * bins).astype(int), 0, bins - 1)
    found = [(float(p[where == b].mean()), float(y[where == b].mean()), int((where == b).sum())) for b in set(where)]
    error = sum(count * abs(mean - share) for mean, share, count in found) / p.size
    return Calibration(float(error), sorted(found))


def correlation(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Pearson's; NaN where one of them does not vary.

    >>> round(correlation([1, 2, 3], [2, 4, 6]), 6)
    1.0
    """
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    x, y = (v - v.mean() if v.size else v for v in (x, y))
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale > 0 else math.nan


def places(values: npt.ArrayLike) -> np.ndarray:
    """Ranks from 1, equal values sharing their mean rank.

    >>> places([10.0, 30.0, 10.0]).tolist()
    [1.5, 3.0, 1.5]
    """
    x = np.asarray(values, np.float64)
    order = np.argsort(x, kind="stable")
    ranks = np.empty(x.size)
    ranks[order] = np.arange(1, x.size + 1)
    _, which, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.bincount(which, ranks) / counts)[which]


def area_under_curve(scores: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """P(a right answer scores above a wrong one), ties half: the area under the ROC curve; NaN without both kinds.

    >>> area_under_curve([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1])
    0.75
    """
    right = np.asarray(labels) >= 0.5
    up, down = int(right.sum()), int((~right).sum())
    if not up or not down:
        return math.nan
    return float((places(scores)[right].sum() - up * (up + 1) / 2) / (up * down))


def area_interval(scores: npt.ArrayLike, labels: npt.ArrayLike, clusters: Sequence[Hashable]) -> Interval:
    """`area_under_curve` with the 95% interval of scores that come in clusters (Obuchowski 1997; DeLong's where each
    has one): the answers to a question, or the steps of an answer, are not independent.

    With A the area, M right and N wrong scores, and psi(x, y) = 1, 1/2, 0 as x is above, equal to or below y, a cluster
    k adds u_k = sum over its right x of (mean_y psi(x, y) - A) and v_k likewise of its wrong ones. Then

        var A = I_u / (I_u - 1) sum_k u_k^2 / M^2 + I_v / (I_v - 1) sum_k v_k^2 / N^2
              + 2 I / (I - 1) sum_k u_k v_k / (M N),

    I_u, I_v and I being the clusters with right ones, with wrong ones, and all. The interval is taken of the logit.

    Args:
      clusters: of each score.

    Returns: bounds of 0 and 1 where the area is 0 or 1 or there is one cluster; NaN without both kinds of labels.

    Example:
      >>> found = area_interval([0.1, 0.4, 0.35, 0.8, 0.6, 0.2], [0, 0, 1, 1, 1, 0], range(6))
      >>> [round(x, 2) for x in found]
      [0.89, 0.26, 0.99]
    """
    x, right = np.asarray(scores, np.float64), np.asarray(labels) >= 0.5
    area, up, down = area_under_curve(x, right), int(right.sum()), int((~right).sum())
    if math.isnan(area):
        return Interval(area, 0.0, 1.0)
    _, cluster = np.unique([str(c) for c in clusters], return_inverse=True)
    whole = places(x)
    beats = np.empty(x.size)
    beats[right] = (whole[right] - places(x[right])) / down - area
    beats[~right] = 1 - (whole[~right] - places(x[~right])) / up - area
    count = int(cluster.max()) + 1
    u, v = (np.bincount(cluster[of], beats[of], count) for of in (right, ~right))
    with_up, with_down = (int(np.unique(cluster[of]).size) for of in (right, ~right))
    if min(with_up, with_down) < 2 or not 0 < area < 1:
        return Interval(area, 0.0, 1.0)
    variance = with_up / (with_up - 1) * float(u @ u) / up**2 + with_down / (with_down - 1) * float(v @ v) / down**2
    variance += 2 * count / (count - 1) * float(u @ v) / (up * down)
    half = _Z95 * math.sqrt(max(variance, 0.0)) / (area * (1 - area))
    middle = math.log(area / (1 - area))
    return Interval(area, *(1 / (1 + math.exp(-x)) for x in (middle - half, middle + half)))


_Z95 = NormalDist().inv_cdf(0.975)


def _pairs(group: Ranked) -> tuple[np.ndarray, np.ndarray]:
    """Better and worse answer of every ordered pair."""
    better, worse = np.nonzero(group.ranks[:, None] < group.ranks[None, :])
    return better, worse


def _share(groups: Sequence[Sequence[bool]]) -> Interval:
    """The mean over groups of the share that is right."""
    return mean_share([float(np.mean(group)) for group in groups])


def _told(name: str, share: Interval, items: int) -> dict[str, float]:
    head = f"{name}/" if name else ""
    found = {"accuracy": share.value, "low": share.low, "high": share.high, "items": float(items)}
    return {head + key: value for key, value in found.items()}


def bins_told(found: Calibration) -> dict[str, float]:
    """A reliability diagram as numbers of a metrics record."""
    out = {"calibration_error": found.error}
    for i, (mean, share, count) in enumerate(found.bins):
        out |= {f"reliability/{i}/said": mean, f"reliability/{i}/true": share, f"reliability/{i}/count": float(count)}
    return out


def judge_ranked(groups: Sequence[Ranked], *, grades: Mapping[float, str] | None = None) -> dict[str, float]:
    """How well scores order answers.

    Returns: "accuracy" of pairs, "low", "high", "items" (groups), the same under "subset/<name>/..." and
    "grade/<name>/..." where there are several; "calibration_error" and the reliability diagram of the probability
    s(|r_i - r_j|) that the pair's order is right; "length_correlation" of r_i - r_j with the difference in tokens, and
    "longer_is_better/accuracy" and "longer_is_worse/accuracy" over the pairs whose better answer is longer or
    shorter. A tie is not right.

    Args:
      grades: names of strengths; None: their numbers.

    Raises:
      ValueError: no group with two answers in some order.
    """
    kept = [(g, *_pairs(g)) for g in groups]
    kept = [(g, i, j) for g, i, j in kept if i.size]
    if not kept:
        raise ValueError("no group has two answers of which one is better: there is no order to judge")
    right = [(g.scores[i] > g.scores[j]).tolist() for g, i, j in kept]
    out = _told("", _share(right), len(kept))
    names = grades or {}
    for kind, of in (("subset", lambda g: g.subset), ("grade", lambda g: names.get(g.strength, f"{g.strength:.3g}"))):
        found = [of(g) for g, _, _ in kept]
        for name in sorted(set(found)) if len(set(found)) > 1 else ():
            part = [r for r, f in zip(right, found, strict=True) if f == name]
            out |= _told(f"{kind}/{name}", _share(part), len(part))
    gaps = np.concatenate([g.scores[i] - g.scores[j] for g, i, j in kept]).astype(np.float64)
    longer = np.concatenate([g.lengths[i] - g.lengths[j] for g, i, j in kept]).astype(np.float64)
    sure = 1.0 / (1.0 + np.exp(-np.minimum(np.abs(gaps), 500.0)))
    out |= bins_told(calibration(sure, gaps > 0, low=0.5))
    out["length_correlation"] = correlation(gaps, longer)
    for name, mask in (("longer_is_better", longer > 0), ("longer_is_worse", longer < 0)):
        if mask.any():
            share = wilson(int((gaps[mask] > 0).sum()), int(mask.sum()))
            out |= _told(name, share, int(mask.sum()))
    return {name: value for name, value in out.items() if math.isfinite(value)}


def judge_labelled(answers: Sequence[Labelled], *, threshold: float = 0.5) -> dict[str, float]:
    """How well probabilities tell right answers or steps from wrong ones.

    Returns: "accuracy" over answers or, where answers have several labels, the mean over answers of their steps',
    with "low", "high", "items"; by subset as in `judge_ranked`; "area_under_curve" with its interval ("_low", "_high",
    questions being what is independent); "calibration_error" and the
    reliability diagram; "length_correlation" of an answer's mean score with its tokens; for steps those of
    `first_errors`.
    """
    if not answers:
        raise ValueError("there is no labelled answer to judge")
    right = [((a.scores >= threshold) == (a.labels >= 0.5)).tolist() for a in answers]
    out = _told("", _share(right), len(answers))
    subsets = [a.subset for a in answers]
    for name in sorted(set(subsets)) if len(set(subsets)) > 1 else ():
        part = [r for r, s in zip(right, subsets, strict=True) if s == name]
        out |= _told(f"subset/{name}", _share(part), len(part))
    scores, labels = (np.concatenate([getattr(a, k) for a in answers]) for k in ("scores", "labels"))
    asked = [("answer", i) if a.question is None else a.question for i, a in enumerate(answers)]
    clusters = [q for q, a in zip(asked, answers, strict=True) for _ in a.labels]
    area = area_interval(scores, labels, clusters)
    out |= {"area_under_curve": area.value, "area_under_curve_low": area.low, "area_under_curve_high": area.high}
    out |= bins_told(calibration(scores, labels))
    out["length_correlation"] = correlation([float(np.mean(a.scores)) for a in answers], [a.length for a in answers])
    if any(len(a.labels) > 1 for a in answers):
        out |= first_errors(answers, threshold=threshold)
    return {name: value for name, value in out.items() if math.isfinite(value)}


def first_error(values: npt.ArrayLike, *, threshold: float = 0.5) -> int | None:
    """Number of the first step below the threshold; None: all steps are right.

    >>> first_error([0.9, 0.4, 0.8]), first_error([0.9])
    (1, None)
    """
    below = np.flatnonzero(np.asarray(values) < threshold)
    return int(below[0]) if below.size else None


def first_errors(answers: Sequence[Labelled], *, threshold: float = 0.5) -> dict[str, float]:
    """Where the first wrong step is said to be (2412.06559).

    Returns: "first_error/wrong", the share of answers with an error whose first one is found exactly;
    "first_error/right", the share of answers without one of which that is said; each with its Wilson interval ("_low",
    "_high"); and their harmonic mean "first_error/f1".

    Example:
      >>> wrong = Labelled(np.array([0.9, 0.2]), np.array([1.0, 0.0]), 5)
      >>> right = Labelled(np.array([0.9]), np.array([1.0]), 3)
      >>> first_errors([wrong, right])["first_error/f1"]
      1.0
    """
    out: dict[str, float] = {}
    shares = []
    for name, wrong in (("wrong", True), ("right", False)):
        part = [a for a in answers if (first_error(a.labels) is not None) == wrong]
        hits = sum(first_error(a.scores, threshold=threshold) == first_error(a.labels) for a in part)
        share = wilson(hits, len(part))
        head = f"first_error/{name}"
        out |= {head: share.value, f"{head}_low": share.low, f"{head}_high": share.high}
        shares.append(share.value)
    both = sum(shares)
    out["first_error/f1"] = 2 * shares[0] * shares[1] / both if both else 0.0 * both
    return out


def judge_graded(answers: Sequence[Labelled]) -> dict[str, float]:
    """How close scores come to grades.

    Returns: "mean_absolute_error", "correlation" (Pearson's) and "rank_correlation" (Spearman's) with "items".
    """
    scores, labels = (np.concatenate([getattr(a, k) for a in answers]).astype(np.float64) for k in ("scores", "labels"))
    known = ~np.isnan(labels)
    scores, labels = scores[known], labels[known]
    out = {
        "mean_absolute_error": float(np.mean(np.abs(scores - labels))) if scores.size else math.nan,
        "correlation": correlation(scores, labels),
        "rank_correlation": correlation(places(scores), places(labels)),
        "items": float(len(answers)),
    }
    return {name: value for name, value in out.items() if math.isfinite(value)}
