"""What an evaluation's numbers allow one to say: intervals, pass@k, and tests of paired answers. NumPy only.

An item is one problem; c of its n samples are right. Items, not samples, are drawn from a population: intervals of
means over items count items.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Interval(NamedTuple):
    """An estimate and its confidence interval."""

    value: float
    low: float
    high: float


class PairedTest(NamedTuple):
    """Two answers to each item: how many became right, how many became wrong, and how surprising that is."""

    gained: int
    lost: int
    p: float
    """Two-sided; 1 where nothing changed."""


def wilson(right: int, items: int, *, confidence: float = 0.95) -> Interval:
    """Wilson's interval of a share: all p with |right/n - p| <= z sqrt(p (1 - p) / n).

    Unlike the normal interval it keeps within [0, 1] and does not shrink to a point at 0 or n.

    Args:
      right: 0 to `items`.
      items: n; without any, the share is unknown: value NaN, interval [0, 1].

    Raises:
      ValueError: `right` is not in 0..`items`.

    Example:
      >>> [round(x, 3) for x in wilson(36, 256)]
      [0.141, 0.103, 0.189]
    """
    if not 0 <= right <= items:
        raise ValueError(f"{right} right answers of {items} items")
    if items == 0:
        return Interval(math.nan, 0.0, 1.0)
    z = _quantile(confidence)
    share, weight = right / items, z * z / items
    centre = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / items + weight / (4 * items))
    low = 0.0 if right == 0 else max(centre - half, 0.0)
    return Interval(share, low, 1.0 if right == items else min(centre + half, 1.0))


def _quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"a confidence of {confidence} is not between 0 and 1")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that k of n samples hold a right one: 1 - C(n-c, k) / C(n, k), drawn without replacement (2107.03374).

    Unbiased for the chance that k fresh samples hold one, which 1 - (1 - c/n)^k is not.

    Raises:
      ValueError: fewer than k samples, or `right` not in 0..`samples`.

    Example:
      >>> pass_at_k(8, 2, 1), round(pass_at_k(8, 2, 4), 4)
      (0.25, 0.7857)
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs at least {k} samples of every item, and one has {samples}")
    if not 0 <= right <= samples:
        raise ValueError(f"{right} right answers of {samples} samples")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def mean_pass_at_k(
    samples: npt.ArrayLike, right: npt.ArrayLike, k: int, *, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Mean pass@k over items, with an interval over items (`mean_share`).

    Args:
      samples, right: n and c of each item.

    Example:
      >>> mean_pass_at_k([4, 4], [4, 0], 2).value
      0.5
    """
    each = [pass_at_k(int(n), int(c), k) for n, c in zip(np.asarray(samples), np.asarray(right), strict=True)]
    return mean_share(each, confidence=confidence, seed=seed)


def mean_share(shares: npt.ArrayLike, *, confidence: float = 0.95, seed: int = 0) -> Interval:
    """A mean over items of shares in [0, 1]: Wilson's interval where each is 0 or 1, else a bootstrap over items.

    A bootstrap of items that are all right, or all wrong, shrinks to a point however few they are.

    Args:
      shares: one per item. None: value NaN, interval [0, 1].

    Example:
      >>> [round(x, 2) for x in mean_share([0.0, 0.0, 0.0, 0.0])], [round(x, 2) for x in mean_share([1.0, 0.0, 0.5])]
      ([0.0, 0.0, 0.49], [0.5, 0.0, 1.0])
    """
    found = np.asarray(shares, np.float64).reshape(-1)
    if np.isin(found, (0.0, 1.0)).all():
        return wilson(int(found.sum()), found.size, confidence=confidence)
    return bootstrap_mean(found, confidence=confidence, seed=seed)


def bootstrap_mean(
    values: npt.ArrayLike, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """A mean over items and its percentile bootstrap interval: the same seed gives the same interval.

    Args:
      values: one per item. None: value NaN and an interval without bounds.
    """
    found = np.asarray(values, np.float64).reshape(-1)
    if found.size == 0:
        return Interval(math.nan, -math.inf, math.inf)
    _quantile(confidence)  # refuses what is no confidence
    tail = (1 - confidence) / 2
    rng = np.random.default_rng(seed)
    rows = max(1, min(resamples, 2_000_000 // found.size))  # so many resamples at a time: 16 MB of indices
    means = np.concatenate(
        [
            found[rng.integers(0, found.size, (min(rows, resamples - done), found.size))].mean(axis=1)
            for done in range(0, resamples, rows)
        ]
    )
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(found.mean()), float(low), float(high))


def paired_difference(
    before: npt.ArrayLike, after: npt.ArrayLike, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Mean of after - before over items that were answered twice, with a bootstrap interval over items.

    Raises:
      ValueError: different numbers of items.

    Example:
      >>> paired_difference([0, 0, 1, 1], [1, 1, 1, 1]).value
      0.5
    """
    first, second = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if first.shape != second.shape:
        raise ValueError(f"{first.size} items before and {second.size} after are not paired")
    return bootstrap_mean(second - first, confidence=confidence, resamples=resamples, seed=seed)


def mcnemar(before: npt.ArrayLike, after: npt.ArrayLike) -> PairedTest:
    """McNemar's exact test: among the items whose answer changed, were gains as likely as losses?

    With b gains and c losses, p = min(1, 2 P[Binomial(b + c, 1/2) <= min(b, c)]).

    Args:
      before, after: whether each item was right, in the same order.

    Raises:
      ValueError: different numbers of items.

    Example:
      >>> mcnemar([False] * 6 + [True] * 4, [True] * 6 + [True] * 4)
      PairedTest(gained=6, lost=0, p=0.03125)
    """
    first, second = np.asarray(before, bool).reshape(-1), np.asarray(after, bool).reshape(-1)
    if first.shape != second.shape:
        raise ValueError(f"{first.size} items before and {second.size} after are not paired")
    gained, lost = int((~first & second).sum()), int((first & ~second).sum())
    changed = gained + lost
    # In whole numbers: 2^-changed is no float for long tests.
    tail = 2 * sum(math.comb(changed, i) for i in range(min(gained, lost) + 1))
    return PairedTest(gained, lost, 1.0 if tail >= 2**changed else tail / 2**changed)
