"""How many candidates a noisy scorer is worth: a width capped by its measured signal-to-noise ratio.

Let candidates have values v ~ N(0, s^2), and let the scorer say v + e with e ~ N(0, t^2). Its signal-to-noise ratio is
R = s^2 / t^2, and its correlation with the truth rho = sqrt(R / (1 + R)). Of N candidates the one with the highest
score has E[v] = s rho m(N), m(N) being the expected maximum of N standard normal numbers, because E[v | v + e] =
rho^2 (v + e) and v + e has the deviation s / rho. So one more candidate gains s rho (m(N) - m(N-1)), which falls with N
and with the noise: past some width, tokens are better spent otherwise.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import numpy.typing as npt


@cache
def expected_maximum(n: int) -> float:
    """m(n) = E max of n standard normal numbers: the integral of x n phi(x) Phi(x)^(n-1), by the trapezoid rule.

    >>> round(expected_maximum(2), 4), round(expected_maximum(3), 4)  # 1/sqrt(pi), 3/(2 sqrt(pi))
    (0.5642, 0.8463)
    """
    if n < 1:
        raise ValueError(f"a maximum of {n} numbers")
    x = np.linspace(-9.0, 9.0, 3601)
    density = np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    below = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in x])
    return float(np.sum(x * n * density * below ** (n - 1)) * (x[1] - x[0]))


def signal_to_noise(scores: npt.ArrayLike, values: npt.ArrayLike) -> float:
    """R = r^2 / (1 - r^2), r being the correlation of scores with what they should say; 0 where r <= 0 or unknown.

    Values may be labels 0 and 1: then R = p (1 - p) (difference of the mean scores)^2 / variance within the classes.

    >>> signal_to_noise([0.0, 1.0, 1.0, 0.0], [0, 1, 1, 0]), signal_to_noise([1.0, 0.0], [0, 1])
    (inf, 0.0)
    """
    x, y = np.asarray(scores, np.float64).reshape(-1), np.asarray(values, np.float64).reshape(-1)
    if x.shape != y.shape:
        raise ValueError(f"{x.size} scores of {y.size} values")
    kept = np.isfinite(x) & np.isfinite(y)
    x, y = x[kept], y[kept]
    if x.size < 2 or not x.std() or not y.std():
        return 0.0
    r = float(np.mean((x - x.mean()) * (y - y.mean())) / (x.std() * y.std()))
    return 0.0 if r <= 0 else math.inf if r * r >= 1 - 1e-12 else r * r / (1 - r * r)


def gain(width: int, snr: float) -> float:
    """rho m(width): the chosen candidate's expected value, in deviations of the values.

    >>> round(gain(4, 1.0), 3), gain(4, 0.0)
    (0.728, 0.0)
    """
    rho = 1.0 if math.isinf(snr) else math.sqrt(snr / (1 + snr))
    return rho * expected_maximum(width)


def widest(snr: float, *, least: float = 0.1, most: int = 64) -> int:
    """The widest N of at most `most` whose last candidate still gains rho (m(N) - m(N-1)) >= `least`; at least 1.

    Args:
      snr: R, from `signal_to_noise`.
      least: what one more candidate must gain, in deviations of the values: its cost, in the same unit.

    >>> [widest(snr) for snr in (0.0, 0.1, 1.0, float("inf"))]
    [1, 2, 4, 6]

    Raises:
      ValueError: a ratio below 0, or limits that are not above 0.
    """
    if not snr >= 0 or least <= 0 or most < 1:
        raise ValueError(f"needs a signal-to-noise ratio >= 0, least > 0 and most >= 1, not {snr}, {least}, {most}")
    width = 1
    while width < most and gain(width + 1, snr) - gain(width, snr) >= least:
        width += 1
    return width
