"""Means over seeds with Student's intervals, and differences seed by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Mean(NamedTuple):
    """A mean over seeds with its 95% interval; of one seed the interval is NaN."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def half(self) -> float:
        """Half of the interval's width."""
        return (self.high - self.low) / 2


def t_inside(t: float, freedom: int) -> float:
    """P(|T| < t) of Student's distribution with a whole number of degrees of freedom, by its finite series.

    With tan(a) = t / sqrt(freedom): sin(a) (1 + cos^2/2 + 3 cos^4/8 + ...) if freedom is even, and
    2/pi (a + sin(a) (cos + 2/3 cos^3 + ...)) if it is odd, up to the power freedom - 2.
    """
    angle = math.atan2(t, math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def t_quantile(freedom: int, *, inside: float = 0.95) -> float:
    """The t with P(|T| < t) = inside, by bisection.

    >>> round(t_quantile(4), 3)
    2.776

    Raises:
      ValueError: no degree of freedom, or a probability that is not between 0 and 1.
    """
    if freedom < 1 or not 0 < inside < 1:
        raise ValueError(f"no quantile for {freedom} degrees of freedom and a probability of {inside}")
    low, high = 0.0, 1.0
    while t_inside(high, freedom) < inside:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_inside(middle, freedom) < inside else (low, middle)
    return high


def over_seeds(values: Sequence[float | int]) -> Mean:
    """Mean of one value per seed -+ t s / sqrt(n), s the deviation with n - 1.

    Raises:
      ValueError: no values.
    """
    if not values:
        raise ValueError("a mean of no values was asked for")
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Mean(mean, math.nan, math.nan, 1)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (count - 1))
    half = t_quantile(count - 1) * deviation / math.sqrt(count)
    return Mean(mean, mean - half, mean + half, count)


def paired(first: Mapping[int, float | int], second: Mapping[int, float | int]) -> Mean | None:
    """Mean difference second - first over the seeds that both have, by `over_seeds`; None if they share none."""
    shared = sorted(first.keys() & second.keys())
    return over_seeds([second[seed] - first[seed] for seed in shared]) if shared else None
