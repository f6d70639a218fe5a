"""Intervals and tests against closed forms, enumeration and simulation."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from jaxpost.eval.statistics import (
    Interval,
    bootstrap_mean,
    mcnemar,
    mean_pass_at_k,
    mean_share,
    paired_difference,
    pass_at_k,
    wilson,
)

Z = 1.959963984540054


@pytest.mark.parametrize(("right", "items"), [(0, 1), (0, 20), (1, 20), (36, 256), (10, 10), (999, 1000)])
def test_wilsons_bounds_solve_its_equation(right, items):
    """The bounds are where |share - p| = z sqrt(p (1 - p) / n)."""
    share, low, high = wilson(right, items)
    assert share == right / items
    for p in (low, high):
        assert 0 <= p <= 1
        if 0 < p < 1:
            assert abs(share - p) == pytest.approx(Z * math.sqrt(p * (1 - p) / items), rel=1e-9)
    assert (low == 0) == (right == 0)
    assert (high == 1) == (right == items)


def test_wilson_covers_as_often_as_it_says():
    """The exact coverage, by summing the binomial's probabilities, is near 95% on average over p."""
    items = 40
    intervals = [wilson(k, items) for k in range(items + 1)]
    coverage = [
        sum(
            math.comb(items, k) * p**k * (1 - p) ** (items - k) for k, i in enumerate(intervals) if i.low <= p <= i.high
        )
        for p in np.linspace(0.05, 0.95, 91)
    ]
    assert 0.945 < np.mean(coverage) < 0.96


def test_wilson_without_items_knows_nothing():
    value, low, high = wilson(0, 0)
    assert math.isnan(value)
    assert (low, high) == (0, 1)


@pytest.mark.parametrize("n", [1, 3, 6])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(float(Fraction(sum(map(any, subsets)), len(subsets))), abs=1e-15)


def test_pass_at_k_is_unbiased():
    """Its expectation over Binomial(n, p) is 1 - (1 - p)^k exactly."""
    n, p = 10, 0.13
    for k in (1, 4, 10):
        mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
        assert mean == pytest.approx(1 - (1 - p) ** k, rel=1e-12)


def test_mean_pass_at_k_takes_items_of_different_sizes():
    got = mean_pass_at_k([2, 4, 8], [1, 0, 8], 2)
    assert got.value == pytest.approx((1 + 0 + 1) / 3)
    assert 0 <= got.low <= got.value <= got.high <= 1


@pytest.mark.parametrize("right", [0, 1, 4, 5])
def test_shares_that_are_all_or_nothing_have_wilsons_interval(right):
    shares = [1.0] * right + [0.0] * (5 - right)
    assert mean_share(shares) == wilson(right, 5)
    samples = [3] * 5
    assert mean_pass_at_k(samples, [3 * share for share in shares], 2) == wilson(right, 5)
    assert mean_share([*shares, 0.25]) == bootstrap_mean([*shares, 0.25])


def test_the_bootstrap_has_the_quantiles_of_all_resamples():
    """With 4 items, all 4^4 resamples can be enumerated."""
    values = [0.0, 1.0, 3.0, 4.0]
    means = [np.mean(choice) for choice in itertools.product(values, repeat=4)]
    expected = np.quantile(means, [0.1, 0.9])
    got = bootstrap_mean(values, confidence=0.8, resamples=20_000, seed=3)
    assert got.value == 2.0
    np.testing.assert_allclose(got[1:], expected, atol=0.26)  # one step of the lattice of means
    assert got == bootstrap_mean(values, confidence=0.8, resamples=20_000, seed=3)
    assert got != bootstrap_mean([v + 0.1 for v in values], confidence=0.8, resamples=20_000, seed=3)


def test_the_bootstrap_agrees_with_the_normal_interval_of_many_items():
    values = np.random.default_rng(0).normal(2.0, 3.0, 4000)
    got = bootstrap_mean(values)
    half = Z * values.std() / math.sqrt(len(values))
    np.testing.assert_allclose(got, [values.mean(), values.mean() - half, values.mean() + half], atol=0.1 * half)
    alone = bootstrap_mean([5.0])
    assert alone == Interval(5.0, 5.0, 5.0)
    assert math.isnan(bootstrap_mean([]).value)


def test_a_paired_difference_forgets_what_items_share():
    """Items differ a lot from one another, the answers to one item hardly: pairing shows a small gain clearly."""
    rng = np.random.default_rng(1)
    item = rng.normal(0, 10, 200)
    got = paired_difference(item, item + rng.normal(0.5, 0.5, 200))
    assert 0.3 < got.low < got.value < got.high < 0.7


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (5, 1), (3, 3), (9, 2), (2, 9)])
def test_mcnemar_counts_every_assignment_of_signs(gained, lost):
    """Under the null each changed item is a gain or a loss like a coin: all 2^n outcomes are enumerated."""
    before = [False] * gained + [True] * lost + [True, False, True]
    after = [True] * gained + [False] * lost + [True, False, True]
    n, extreme = gained + lost, min(gained, lost)
    outcomes = [sum(signs) for signs in itertools.product((0, 1), repeat=n)]
    expected = sum(min(heads, n - heads) <= extreme for heads in outcomes) / len(outcomes)
    got = mcnemar(before, after)
    assert (got.gained, got.lost) == (gained, lost)
    assert got.p == pytest.approx(expected, rel=1e-12)


def test_mcnemar_of_thousands_is_no_overflow():
    got = mcnemar([False] * 3000 + [True] * 100, [True] * 3000 + [False] * 100)
    assert 0 <= got.p < 1e-300
    assert mcnemar([True] * 9, [True] * 9).p == 1.0


@pytest.mark.parametrize(
    "call",
    [
        lambda: wilson(3, 2),
        lambda: wilson(1, 2, confidence=1.0),
        lambda: pass_at_k(4, 1, 5),
        lambda: pass_at_k(4, 5, 1),
        lambda: mcnemar([True], [True, False]),
        lambda: paired_difference([1.0], [1.0, 2.0]),
    ],
)
def test_impossible_numbers_are_refused(call):
    with pytest.raises(ValueError, match=r"\d"):
        call()
