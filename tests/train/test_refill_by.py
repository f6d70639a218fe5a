"""Dynamic sampling by one column of the reward: which groups are kept, and when it stops."""

import numpy as np
import pytest

from jaxpost.config_rl import RolloutSection
from jaxpost.rewards.runner import Scored
from jaxpost.rl.episodes import Episode, Problem
from jaxpost.train.collect import collect
from jaxpost.train.online_job import OnlineJob


def job(compared=(), **rollout) -> OnlineJob:
    made = object.__new__(OnlineJob)  # `collect` reads these three alone
    object.__setattr__(made, "compared", compared)
    object.__setattr__(made, "rollout", RolloutSection(prompts=2, samples=2, **rollout))
    object.__setattr__(made, "unscore_truncated", False)
    return made


def round_of(first: int, accuracy: list[list[float]], penalty: list[list[float]]):
    problems = [Problem(first + i, (1,), "?", {}) for i in range(len(accuracy))]
    episodes = [
        Episode(p, s, (1,), (1,), (0.0,), "stop", "", 0) for p in range(len(accuracy)) for s in range(len(accuracy[p]))
    ]
    math, long = np.ravel(accuracy).astype(float), np.ravel(penalty).astype(float)
    return (problems, episodes), Scored({"reward": math + long, "math": math, "overlong": long}, ())


def test_groups_that_differ_in_the_penalty_alone_are_sampled_anew():
    first = round_of(0, [[0, 0], [1, 0]], [[0, -0.5], [0, 0]])
    further = {1: round_of(2, [[1, 1], [1, 1]], [[0, -1], [0, 0]]), 2: round_of(4, [[0, 1], [1, 0]], [[0, 0], [0, 0]])}
    step = collect(job(max_refills=5, refill_by="math"), *first, further.__getitem__)
    assert [g.problem.number for g in step.groups] == [1, 4]
    assert (step.refills, len(step.seen)) == (2, 6)
    by_reward = collect(job(max_refills=5), *first, further.__getitem__)
    assert [g.problem.number for g in by_reward.groups] == [0, 1]


def test_a_group_whose_parts_cancel_teaches_nothing():
    step = collect(job(max_refills=1, refill_by="math"), *round_of(0, [[1, 0], [1, 0]], [[-1, 0], [0, 0]]),
                   lambda number: round_of(2, [[0, 0], [0, 0]], [[0, 0], [0, 0]]))  # fmt: skip
    assert [g.problem.number for g in step.groups] == [1]


def test_an_unknown_column_is_named():
    with pytest.raises(ValueError, match="'acc' is none of the reward's columns: reward, math, overlong"):
        collect(job(max_refills=1, refill_by="acc"), *round_of(0, [[1, 0]], [[0, 0]]), lambda number: None)


def test_rewards_that_are_compared_one_by_one_teach_though_their_sums_are_equal():
    first = round_of(0, [[1, 0], [0, 0]], [[-1, 0], [0, 0]])
    alone = collect(job(compared=("math", "overlong")), *first, lambda number: None).groups
    assert [g.informative for g in alone] == [True, False]
    np.testing.assert_array_equal(alone[0].compared, [[1, 0], [-1, 0]])
    assert not collect(job(), *first, lambda number: None).groups[0].informative
    with pytest.raises(ValueError, match=r"advantage.columns 'acc' is none of the reward's columns: reward, math"):
        collect(job(compared=("math", "acc")), *first, lambda number: None)


def test_a_round_that_no_reward_could_score_has_nothing_to_compare():
    round_, _ = round_of(0, [[0, 0]], [[0, 0]])
    (group,) = collect(job(compared=("math",)), round_, Scored({"reward": np.full(2, np.nan)}, ()),
                       lambda number: None).groups  # fmt: skip
    assert np.isnan(group.compared).all()
    assert not group.informative


def test_a_sample_that_lacks_one_of_the_compared_rewards_is_unscored():
    round_, scored = round_of(0, [[1, 0]], [[0, 0]])
    scored.rewards["style"] = np.array([np.nan, 0.5])  # of a table's further column, which the reward does not read
    (group,) = collect(job(compared=("math", "style")), round_, scored, lambda number: None).groups
    np.testing.assert_array_equal(group.reward, [np.nan, 0])
    np.testing.assert_array_equal(group.compared, [[np.nan, 0], [np.nan, 0.5]])
    assert not group.informative, "one scored sample has none to be compared with"


def test_a_round_in_which_one_part_failed_everywhere_goes_on():
    """Its own columns go by the names that a function gives them, which nobody knows of one that raises."""
    failed, fine = np.full(2, np.nan), np.array([1.0, 0.0])
    scored = Scored({"reward": failed, "math": fine, "brief": failed}, ())
    round_, _ = round_of(0, [[0, 0]], [[0, 0]])
    further = round_of(2, [[1, 0], [0, 1]], [[0, 0], [0, 0]])
    step = collect(job(max_refills=1, refill_by="overlong"), round_, scored, lambda number: further)
    assert len(step.seen) == 3
    (group,) = collect(job(compared=("math", "shorter")), round_, scored, lambda number: None).groups
    assert not group.informative
