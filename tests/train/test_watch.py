"""Alarms: each is raised where its metric crosses, once, and the same whether or not the run was interrupted."""

import json
import math
from typing import Any

import numpy as np
import pytest

from jaxpost.train.watch import RULES, Alarm, Limits, watch

HEALTHY = {
    **{"reward": 0.2, "reward_std": 0.4, "kl": 0.01, "old_kl": 0.001, "answer_tokens": 20.0, "repetition": 0.02},
    **{"entropy": 1.0, "groups": 8, "zero_variance_groups": 2, "samples": 64, "unscored": 0, "sampler_gap": 0.001},
    **{"effective_sample_size": 0.99, "truncated": 0.3},
}
SICK = {
    "kl": {"kl": 3.0},
    "old_kl": {"old_kl": 0.5},
    "length_growth": {"answer_tokens": 90.0},
    "length_collapse": {"answer_tokens": 2.0},
    "repetition": {"repetition": 0.6},
    "entropy_collapse": {"entropy": 0.02},
    "zero_variance": {"zero_variance_groups": 8},
    "unscored": {"unscored": 40},
    "sampler_mismatch": {"sampler_gap": 0.4},
    "effective_sample_size": {"effective_sample_size": 0.1},
    "truncation": {"truncated": 0.9},
}


def run(records: list[dict[str, Any]], **options: Any) -> list[Alarm]:
    state: dict[str, Any] = {}
    raised = []
    for record in records:
        state, alarms = watch(state, record, **options)
        raised += alarms
    return raised


def train(start: int, count: int, **changes: Any) -> list[dict[str, Any]]:
    return [{"step": start + i, "kind": "train", **HEALTHY, **changes} for i in range(count)]


def test_every_rule_is_tried_here():
    assert SICK.keys() == RULES.keys()


def test_a_healthy_run_is_quiet():
    rng = np.random.default_rng(0)
    noisy = [
        record | {k: v * rng.uniform(0.8, 1.2) for k, v in HEALTHY.items() if isinstance(v, float)}
        for record in train(1, 200)
    ]
    assert run(noisy) == []


@pytest.mark.parametrize("name", SICK)
def test_an_alarm_is_raised_once_for_each_crossing(name):
    sick = train(21, 100, **SICK[name])
    (alarm,) = run([*train(1, 20), *sick])
    assert alarm.alarm == name
    assert 21 <= alarm.step <= 50, "soon after the metric went wrong"
    assert any(c.isdigit() for c in alarm.message)
    again = run([*train(1, 20), *sick, *train(121, 100), *train(221, 100, **SICK[name])])
    assert [a.alarm for a in again] == [name, name]
    assert 221 <= again[1].step <= 250


def test_a_metric_that_jitters_at_its_limit_does_not_ring_every_time():
    records = train(1, 20) + [
        {"step": 21 + i, "kind": "train", **HEALTHY, "kl": 1.0 + (0.05 if i % 2 else -0.05)} for i in range(100)
    ]
    assert [a.alarm for a in run(records, limits=Limits(window=1.0))] == ["kl"]
    wide = [{**r, "kl": 2.0 if r["step"] % 2 else 0.5} for r in records]
    assert len(run(wide, limits=Limits(window=1.0, margin=0.1))) > 50


def test_one_outlier_is_smoothed_away():
    records = train(1, 60)
    records[30] |= {"kl": 5.0, "old_kl": math.nan, "entropy": math.inf, "reward": "nan"}
    assert run(records) == []
    assert [a.alarm for a in run(records, limits=Limits(window=1.0))] == ["kl"]


def test_interrupting_at_any_record_changes_nothing():
    """The state goes through JSON after every record."""
    records = [*train(1, 20), *train(21, 40, kl=3.0, entropy=0.02), *train(61, 60), *train(121, 20, truncated=0.9)]
    records.insert(70, evaluation(70, 0.5))
    records.insert(120, evaluation(120, 0.1))
    whole = run(records)
    state: dict[str, Any] = {}
    pieces = []
    for record in records:
        before = json.dumps(state)
        new, alarms = watch(state, record)
        assert json.dumps(state) == before, "the old state is left alone"
        state = json.loads(json.dumps(new))
        pieces += alarms
    assert pieces == whole
    assert {a.alarm for a in whole} >= {"kl", "entropy_collapse", "truncation"}


def evaluation(step: int, accuracy: float, half: float = 0.05, name: str = "strict") -> dict[str, Any]:
    bounds = {f"{name}/low": accuracy - half, f"{name}/high": accuracy + half}
    return {"step": step, "kind": "eval", f"{name}/accuracy": accuracy, **bounds}


def test_reward_that_rises_without_accuracy_is_hacking():
    rising = [{**r, "reward": 0.2 + 0.01 * r["step"]} for r in train(1, 60)]
    good = [evaluation(0, 0.2), *rising, evaluation(60, 0.6)]
    assert run(good) == []
    (alarm,) = run([evaluation(0, 0.2), *rising, evaluation(60, 0.2)])
    assert (alarm.step, alarm.alarm) == (60, "reward_hacking")
    assert "20.0% to 20.0%" in alarm.message
    assert run([evaluation(0, 0.2), *train(1, 60), evaluation(60, 0.1)]) == [], "the reward did not rise"


def test_accuracy_that_clearly_falls_from_its_best_while_the_reward_rises_is_hacking():
    rising = [{**r, "reward": 0.2 + 0.02 * r["step"]} for r in train(1, 90)]
    run_of = lambda last: [  # noqa: E731
        evaluation(0, 0.2), *rising[:30], evaluation(30, 0.6), *rising[30:60], evaluation(60, last), *rising[60:]
    ]  # fmt: skip
    assert run(run_of(0.57)) == [], "within the interval"
    (alarm,) = run([*run_of(0.4), evaluation(90, 0.4)])
    assert (alarm.step, alarm.alarm) == (60, "reward_hacking")
    assert "since step 30" in alarm.message


def test_the_gold_is_the_evaluation_that_is_named():
    rising = [{**r, "reward": 0.2 + 0.01 * r["step"]} for r in train(1, 60)]
    both = [
        {**evaluation(0, 0.2), **evaluation(0, 0.3, name="long")},
        *rising,
        {**evaluation(60, 0.7), **evaluation(60, 0.1, name="long")},
    ]
    assert run(both) == []
    assert [a.alarm for a in run(both, gold="long")] == ["reward_hacking"]


def test_what_a_run_does_not_measure_is_not_watched():
    assert run([{"step": i, "kind": "train", "loss": 1.0} for i in range(50)]) == []
    assert run([{"step": 1, "kind": "note"}, {"step": 1, "kind": "eval", "loss": 2.0}]) == []
    quiet = Limits(kl=math.inf, entropy=0.0)
    assert run([*train(1, 20), *train(21, 50, kl=9.0, entropy=0.001)], limits=quiet) == []


def test_samples_without_a_reward_may_have_been_cut_off():
    (alarm,) = run(train(1, 20) + train(21, 60, **SICK["unscored"]))
    assert "the log names" in alarm.message
    assert "loss.truncated is unscore" in alarm.message
