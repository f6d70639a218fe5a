"""Numbers of searches and verifiers against counts by hand and simulations."""

from __future__ import annotations

import numpy as np
import pytest

from jaxpost.eval import search as es
from jaxpost.eval import verifiers as ev
from jaxpost.eval.search import Outcome, Runs


def test_top_1_any_of_k_and_pass_at_k_are_three_numbers():
    outcomes = [Outcome(False, (False, True, True, False), 9), Outcome(True, (True, False, False, False), 9),
                Outcome(False, (False,) * 4, 9)]  # fmt: skip
    assert es.top_1(outcomes).value == pytest.approx(1 / 3)
    assert [es.any_of(outcomes, k).value for k in (1, 2, 4)] == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    # 1 - C(2,2)/C(4,2), 1 - C(3,2)/C(4,2), 0
    assert es.pass_at(outcomes, 2).value == pytest.approx((5 / 6 + 1 / 2 + 0) / 3)
    with pytest.raises(ValueError, match="pass@5 needs"):
        es.pass_at(outcomes, 5)


def runs(method, budget, right, tokens=None, seeds=2):
    tokens = [budget] * len(right) if tokens is None else tokens
    return Runs(method, budget, [[Outcome(bool(r), (bool(r),), t) for r, t in zip(right, tokens, strict=True)]] * seeds)


def test_a_point_counts_prompts_not_seeds():
    once, five = (es.point(runs("a", 10, [1, 0, 1, 1], seeds=n)) for n in (1, 5))
    assert once.accuracy == five.accuracy
    assert (five.prompts, five.seeds, five.by_seed) == (4, 5, (0.75,) * 5)
    with pytest.raises(ValueError, match="same prompts"):
        Runs("a", 10, [[Outcome(True, (), 1)], []])


def test_the_compute_optimal_curve_is_not_tuned_on_what_it_reports():
    # Coin tosses: the best of 40 looks better than 1/2 where it was chosen, and is 1/2 elsewhere.
    rng = np.random.default_rng(0)
    table = [runs(f"coin{i}", 10, rng.random(400) < 0.5, seeds=1) for i in range(40)]
    best_seen = max(r.right.mean() for r in table)
    [found] = es.compute_optimal(table)
    assert best_seen > 0.54
    assert found.accuracy.low < 0.5 < found.accuracy.high
    assert len(found.chosen) == 2


def test_the_compute_optimal_curve_chooses_by_bin_and_keeps_to_the_budget():
    easy, hard = [1] * 40, [0] * 40
    table = [
        runs("greedy", 10, easy + hard), runs("beam", 20, [0] * 40 + [1] * 20 + [0] * 20), runs("all", 90, easy * 2),
    ]  # fmt: skip
    found = es.compute_optimal(table, bins=[0] * 40 + [1] * 40)
    assert [f.budget for f in found] == [10, 20, 90]
    assert [f.accuracy.value for f in found] == [0.5, 0.75, 1.0]
    assert found[1].chosen == (("greedy@10", "beam@20"),) * 2
    assert found[2].tokens.value == pytest.approx((10 * 40 + 90 * 40) / 80)  # of equals the cheaper one


def test_equal_budgets_are_compared_prompt_by_prompt():
    table = [runs("a", 10, [0, 0, 1, 1] * 5), runs("b", 10, [1, 1, 1, 1] * 5, [9] * 20)]
    found = es.compare(table, "a", "b", 10)
    assert found.difference.value == 0.5
    assert found.tokens.value == -1
    assert (found.test.gained, found.test.lost) == (10, 0)
    with pytest.raises(ValueError, match="no runs of c"):
        es.compare(table, "a", "c", 10)
    text = es.markdown(table, against="a")
    assert "+50.0 [" in text
    assert text.count("\n") == 3


def test_false_accepts_and_rejects_by_hand():
    scores, right = [0.9, 0.8, 0.7, 0.4, 0.3, np.nan], [1, 0, 1, 1, 0, 1]
    found = ev.acceptance(scores, right, threshold=0.5)
    assert (found.false_accept.value, found.false_reject.value, found.precision.value) == (1 / 2, 2 / 4, 2 / 3)
    assert (found.accepted, found.items) == (3, 6)
    assert found.false_accept.low > 0  # Wilson's
    with pytest.raises(ValueError, match="2 scores of 1"):
        ev.acceptance([1, 2], [1])


def test_a_calibrated_verifier_has_no_error_and_an_overconfident_one_has():
    rng = np.random.default_rng(1)
    p = rng.random(20_000)
    right = rng.random(20_000) < p
    assert ev.worth("true", p, right).calibration.error < 0.02
    assert ev.worth("sure", np.round(p), right).calibration.error == pytest.approx(0.25, abs=0.02)
    text = ev.report({"true": p, "sure": np.round(p)}, right)
    assert "false accept at 0.9" in text
    assert text.count("->") > 10
