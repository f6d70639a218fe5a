"""What scores are worth, against counting by hand."""

import itertools
import math

import numpy as np
import pytest

from jaxpost.eval.reward import (
    Labelled,
    Ranked,
    area_interval,
    area_under_curve,
    calibration,
    judge_graded,
    judge_labelled,
    judge_ranked,
    places,
)

RNG = np.random.default_rng(0)


def pair(chosen, rejected, lengths=(5, 5), **more):
    return Ranked(np.array([chosen, rejected]), np.array([0, 1]), np.array(lengths), **more)


def test_the_area_is_the_share_of_right_above_wrong_by_counting():
    scores, labels = RNG.integers(0, 6, 40) / 5, RNG.integers(0, 2, 40)
    wins = [(a > b) + 0.5 * (a == b) for a, b in itertools.product(scores[labels == 1], scores[labels == 0])]
    assert area_under_curve(scores, labels) == pytest.approx(np.mean(wins))
    assert np.isnan(area_under_curve([0.5], [1]))


def test_the_areas_interval_is_delongs_where_scores_are_independent():
    scores, labels = RNG.integers(0, 9, 60) / 8, RNG.integers(0, 2, 60)
    up, down = scores[labels == 1], scores[labels == 0]
    wins = (up[:, None] > down[None]) + 0.5 * (up[:, None] == down[None])
    spread = np.sqrt(np.var(wins.mean(1), ddof=1) / len(up) + np.var(wins.mean(0), ddof=1) / len(down))
    area = wins.mean()
    found = area_interval(scores, labels, range(60))
    logit = lambda p: np.log(p / (1 - p))  # noqa: E731
    for bound, side in ((found.low, -1), (found.high, 1)):
        assert logit(bound) == pytest.approx(logit(area) + side * 1.959964 * spread / (area * (1 - area)))


def test_the_areas_interval_counts_clusters_and_not_scores():
    rng, inside, narrow = np.random.default_rng(3), 0, 0
    for _ in range(200):
        # Five near copies of each of 40 scores: as much as 40 say, and not as 200.
        label = rng.integers(0, 2, 40)
        score = label + rng.normal(size=40)
        scores, labels = np.repeat(score, 5) + 1e-6 * rng.normal(size=200), np.repeat(label, 5)
        found = area_interval(scores, labels, np.repeat(np.arange(40), 5).tolist())
        alone = area_interval(scores, labels, range(200))
        truth = 0.5 * (1 + math.erf(0.5))  # P(N(1, 1) > N(0, 1))
        inside += found.low <= truth <= found.high
        narrow += alone.low <= truth <= alone.high
    assert 180 <= inside <= 200
    assert narrow < 160


def test_places_of_equal_values_are_their_mean():
    values = RNG.integers(0, 5, 30)
    expected = [np.mean([np.sum(values < v) + 1, np.sum(values <= v)]) for v in values]
    np.testing.assert_allclose(places(values), expected)


def test_accuracy_by_subset_and_grade_with_intervals_and_a_tie_is_not_right():
    groups = [
        pair(1.0, 0.0, subset="a", strength=1.0),
        pair(0.0, 1.0, subset="a", strength=1.0),
        pair(2.0, 1.0, subset="b", strength=0.5),
        pair(1.0, 1.0, subset="b", strength=0.5),
    ]
    found = judge_ranked(groups, grades={1.0: "better", 0.5: "slightly"})
    assert (found["accuracy"], found["items"]) == (0.5, 4)
    assert found["low"] < 0.5 < found["high"]
    assert found["subset/a/accuracy"] == found["grade/slightly/accuracy"] == 0.5
    with pytest.raises(ValueError, match="no order to judge"):
        judge_ranked([Ranked(np.zeros(2), np.zeros(2), np.zeros(2))])


def test_rankings_count_as_groups_not_as_pairs():
    one = Ranked(np.array([3.0, 2.0, 1.0]), np.array([0, 1, 2]), np.array([1, 1, 1]))
    other = Ranked(np.array([1.0, 2.0, 3.0]), np.array([0, 1, 1]), np.array([1, 1, 1]))
    found = judge_ranked([one, other])
    assert (found["accuracy"], found["items"]) == (0.5, 2)


def test_length_bias_shows_where_the_shorter_answer_is_better():
    by_length = [pair(float(a), float(b), (a, b)) for a, b in [(9, 3), (8, 2), (2, 7), (3, 9)]]
    found = judge_ranked(by_length)
    assert found["length_correlation"] == pytest.approx(1.0)
    assert (found["longer_is_better/accuracy"], found["longer_is_worse/accuracy"]) == (1.0, 0.0)


def test_calibration_of_probabilities_that_are_right_and_of_those_that_are_too_sure():
    p = np.repeat([0.2, 0.8], 500)
    honest = np.concatenate([np.arange(500) < 100, np.arange(500) < 400])
    assert calibration(p, honest).error == pytest.approx(0.0, abs=1e-12)
    sure = np.repeat([0.0, 1.0], 500)
    assert calibration(sure, honest).error == pytest.approx(0.2)
    assert [count for _, _, count in calibration(sure, honest).bins] == [500, 500]


def test_steps_and_grades():
    answers = [
        Labelled(np.array([0.9, 0.8, 0.1]), np.array([1.0, 1.0, 0.0]), 9),
        Labelled(np.array([0.9, 0.2, 0.1]), np.array([1.0, 1.0, 0.0]), 9),
        Labelled(np.array([0.9, 0.7]), np.array([1.0, 1.0]), 4),
    ]
    found = judge_labelled(answers)
    assert (found["first_error/wrong"], found["first_error/right"]) == (0.5, 1.0)
    assert found["first_error/f1"] == pytest.approx(2 / 3)
    assert found["accuracy"] == pytest.approx((1 + 2 / 3 + 1) / 3)
    graded = judge_graded([Labelled(np.array([x]), np.array([2 * x + 1]), 1) for x in (0.0, 1.0, 2.0)])
    assert graded["rank_correlation"] == graded["correlation"] == pytest.approx(1.0)
    assert graded["mean_absolute_error"] == pytest.approx(2.0)
