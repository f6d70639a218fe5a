"""Which samples a step learns from: dynamic sampling, unscored rewards, groups without a signal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from toy_online import VOCAB, first_table, log_policy, scored_by, toy_config, toy_job

from jaxpost.config import AdamWSection, ScheduleSection
from jaxpost.config_policy_losses import PPOLoss, ReinforceLoss
from jaxpost.config_rl import EvalSection, GRPOAdvantage, KLSection, LearnerSection, RLOOAdvantage, RolloutSection
from jaxpost.rewards.runner import Problem as Fault
from jaxpost.rewards.runner import Scored
from jaxpost.rl.episodes import Episode, Problem
from jaxpost.train.collect import GREEDY, Step, collect, grouped
from jaxpost.train.compiled import CompiledStep
from jaxpost.train.learn import Learner, Numbers, Samples
from jaxpost.train.online_eval import evaluate
from jaxpost.train.online_job import Evaluation, OnlineJob, Wish
from jaxpost.train.online_log import sample_records, step_metrics
from jaxpost.train.step import init_state, make_train_step

NAN = float("nan")
G = 4


def job_of(tmp_path: Path, **sections: Any) -> OnlineJob:
    rollout = RolloutSection(prompts=4, samples=G, max_tokens=3, max_refills=sections.pop("max_refills", 0),
                             uninformative=sections.pop("uninformative", "drop"))  # fmt: skip
    return toy_job(toy_config(tmp_path, rollout=rollout, **sections), scored_by(lambda e, c: 0.0))[0]


def a_round(rewards: list[list[float]], first: int = 0, **more: Any) -> tuple[Any, Scored]:
    """A round of groups with these rewards; problems are numbered from `first`."""
    rng = np.random.default_rng(first)
    problems = [Problem(first + p, (4,), "?", {"answer": "b"}) for p in range(len(rewards))]
    episodes = []
    for p, group in enumerate(rewards):
        for s in range(len(group)):
            tokens = tuple(int(t) for t in rng.integers(1, VOCAB, rng.integers(1, 4)))
            finish = more.get("finish", {}).get((p, s), "stop")
            episodes.append(Episode(p, s, tokens, (1,) * len(tokens), (-1.0,) * len(tokens), finish, "x", 0))
    column = np.asarray([r for group in rewards for r in group])
    return (problems, episodes), Scored({"score": column, "part": column / 2}, more.get("faults", ()))


EVEN, ODD, WON = [0.0] * G, [1.0, 0.0, 0.0, 1.0], [1.0] * G


def refills(job: OnlineJob, *rounds: list[list[float]]) -> Step:
    asked: list[int] = []

    def refill(number: int) -> Any:
        asked.append(number)
        return a_round(rounds[number], first=100 * number)

    found = collect(job, *a_round(rounds[0]), refill)
    assert asked == list(range(1, found.refills + 1))
    return found


def test_refills_until_the_batch_is_full_of_informative_groups(tmp_path: Path) -> None:
    job = job_of(tmp_path, max_refills=3)
    found = refills(job, [ODD, EVEN, WON, ODD], [EVEN, EVEN, ODD, EVEN], [ODD, ODD, ODD, EVEN], [ODD] * 4)
    assert found.refills == 2
    assert [g.problem.number for g in found.groups] == [0, 3, 102, 200], "the first ones; what is more is left out"
    assert all(g.informative for g in found.groups)
    metrics = step_metrics(found, [], 0)
    counts = {"groups": 12, "zero_variance_groups": 6, "dropped_groups": 8, "refills": 2, "samples": 48, "unscored": 0}
    assert {name: metrics[name] for name in counts} == counts
    assert len(list(sample_records(1, found, None, G))) == 48


def test_refills_end_at_the_cap_and_no_refill_is_asked_for_in_vain(tmp_path: Path) -> None:
    job = job_of(tmp_path, max_refills=2)
    short = refills(job, [EVEN] * 4, [ODD, EVEN, EVEN, EVEN], [EVEN] * 4)
    assert (short.refills, len(short.groups), len(short.seen)) == (2, 1, 12)
    assert refills(job, [ODD] * 4).refills == 0
    none = refills(job, [EVEN] * 4, [WON] * 4, [[NAN] * G] * 4)
    assert none.groups == []


def test_without_dynamic_sampling_every_group_stays(tmp_path: Path) -> None:
    found = refills(job_of(tmp_path), [ODD, EVEN, WON, [NAN] * G])
    assert len(found.groups) == 4
    assert [g.informative for g in found.groups] == [True, False, False, False]


def test_unscored_samples_leave_mean_deviation_and_count(tmp_path: Path) -> None:
    fault = Fault("score", 1, "it raised")
    rewards = [[1.0, NAN, 0.0, 1.0], [NAN, NAN, NAN, 1.0], [NAN] * G, ODD]
    (now, scored), job = a_round(rewards, faults=(fault,)), job_of(tmp_path)
    found = collect(job, now, scored, lambda number: pytest.fail("no refill"))
    assert found.faults == [str(fault)]
    metrics = step_metrics(found, [], 0)
    valid = [r for group in rewards for r in group if r == r]
    assert metrics["unscored"] == 8
    assert metrics["reward"] == np.mean(valid)
    assert metrics["reward/part"] == np.mean(valid) / 2
    assert metrics["zero_variance_groups"] == 2
    samples = Samples.of(found.groups, count=4, samples=G, tokens=3)
    credit = Learner(job, CompiledStep(job))._assign(found, samples, {}, Numbers())
    a = credit.advantages[:, 0].reshape(4, G)
    first = np.array([1.0, 0.0, 1.0])
    np.testing.assert_allclose(a[0, [0, 2, 3]], (first - first.mean()) / (first.std(ddof=1) + 1e-4), rtol=1e-5)
    assert not a[0, 1]
    assert not a[1:3].any()
    trained = credit.weights.any(axis=1).reshape(4, G)
    np.testing.assert_array_equal(trained, ~np.isnan(rewards))
    learner = Learner(job, CompiledStep(job))
    assert [learner._teaches(g) for g in found.groups] == [True, False, False, True]


def test_unscored_everywhere_is_no_update_and_no_crash(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    found = collect(job, *a_round([[NAN] * G] * 4), lambda number: pytest.fail("no refill"))
    learner, state = Learner(job, CompiledStep(job)), job.init_state()
    outcome = learner.learn(state, found, Numbers(), 0, True)
    assert outcome.updates == []
    assert not outcome.halt, "a process's own wish to stop is no agreement of all"
    assert outcome.state is state
    assert "reward" not in step_metrics(found, [], 0)


def test_a_column_that_only_some_rounds_have(tmp_path: Path) -> None:
    """A function that fails on a whole round has no chance to name its columns there."""
    job = job_of(tmp_path, max_refills=1)
    more, _ = a_round([EVEN] * 4, first=50)
    failed = Scored({"reward": np.full(4 * G, NAN)}, (Fault("reward", 0, "it raised"),))
    found = collect(job, *a_round([ODD, EVEN, ODD, EVEN]), lambda number: (more, failed))
    metrics = step_metrics(found, [], 0)
    assert metrics["unscored"] == 16
    assert metrics["reward/part"] == 0.125
    first, *_, last = sample_records(1, found, None, G)
    assert first["rewards"] == {"score": 1.0, "part": 0.5}
    assert last["rewards"] == {"reward": None}


def test_truncated_samples_by_rule(tmp_path: Path) -> None:
    cut = {"finish": {(0, 0): "length", (3, 1): "length"}}
    unscored = grouped(job_of(tmp_path, loss=PPOLoss(truncated="unscore")), *a_round([ODD] * 4, **cut))
    assert np.isnan(unscored[0].reward).tolist() == [True, False, False, False]
    for rule, trained in {"keep": True, "mask": False}.items():
        job = job_of(tmp_path / rule, loss=PPOLoss(truncated=rule))
        found = collect(job, *a_round([ODD] * 4, **cut), lambda number: None)
        assert not np.isnan(found.groups[0].reward).any()
        samples = Samples.of(found.groups, count=4, samples=G, tokens=3)
        credit = Learner(job, CompiledStep(job))._assign(found, samples, {}, Numbers())
        assert credit.weights[0].any() == trained
        np.testing.assert_allclose(credit.advantages[1, 0], credit.advantages[2, 0])  # statistics hold all four


def test_greedy_answers_are_a_baseline_and_not_trained_on(tmp_path: Path) -> None:
    (problems, episodes), scored = a_round([ODD, ODD])
    best = [episodes[0]._replace(problem=p, sample=GREEDY) for p in (0, 1)]
    columns = {name: np.append(column, [0.25, NAN]) for name, column in scored.rewards.items()}
    groups = grouped(job_of(tmp_path), (problems, [*episodes, *best]), Scored(columns, ()))
    assert [len(g.episodes) for g in groups] == [G, G]
    assert groups[0].greedy == 0.25
    assert np.isnan(groups[1].greedy)


# What a silent group counts for, against gradients by hand

GROUPS = [ODD, EVEN, [0.0, 3.0, NAN, 1.0], [NAN, 2.0, NAN, NAN]]
AGGREGATES = ("token_mean", "sequence_mean", "constant_mean")


def by_hand(found: Step, credit: Any, aggregate: str, count_silent: bool) -> np.ndarray:
    """The gradient of -A log pi summed over tokens, divided as the aggregate says, in float64."""
    table = first_table().astype(np.float64)
    grad, tokens, samples = np.zeros_like(table), 0, 0
    for g, group in enumerate(found.groups):
        for s, episode in enumerate(group.episodes):
            if np.isnan(group.reward[s]) or not (group.informative or count_silent):
                continue
            samples, tokens = samples + 1, tokens + len(episode.tokens)
            share = {"sequence_mean": 1 / len(episode.tokens), "constant_mean": 1 / 3}.get(aggregate, 1.0)
            prompt = [4]
            for t, token in enumerate(episode.tokens):
                place = min(len(prompt) - 1, 5) * VOCAB + prompt[-1]
                pull = np.eye(VOCAB)[token] - np.exp(log_policy(table, prompt))
                grad[place] -= share * credit.advantages[g * G + s, t] * pull
                prompt.append(token)
    return grad / (tokens if aggregate == "token_mean" else samples)


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_silent_groups_count_in_the_mean_or_not_as_asked(aggregate: str, tmp_path: Path) -> None:
    grads = {}
    for rule in ("count", "drop"):
        job = job_of(
            tmp_path / rule,
            uninformative=rule,
            loss=PPOLoss(aggregate=aggregate),
            advantage=GRPOAdvantage(scale="none"),
        )
        found = collect(job, *a_round(GROUPS), lambda number: pytest.fail("no refill"))
        captured: list[Any] = []

        def rule_of(optimizer: Any, grads: Any, state: Any, **_: Any) -> Any:
            return grads, state.opt_state

        grads[rule], credit = gradient_of(job, found, rule_of)
        want = by_hand(found, credit, aggregate, count_silent=rule == "count")
        np.testing.assert_allclose(grads[rule], want, rtol=1e-4, atol=1e-7)
        captured.clear()
    assert np.linalg.norm(grads["drop"]) > 1.2 * np.linalg.norm(grads["count"])


def gradient_of(job: OnlineJob, found: Step, rule: Any) -> tuple[np.ndarray, Any]:
    """The gradient of a step's one update, and its credit."""
    from toy_online import table_model

    from jaxpost.assemble import policy

    mesh = job.mesh
    config = job_config(job)
    loss = policy.make_policy_loss(config, table_model(), mesh)
    step = make_train_step(loss, optax.identity(), num_microbatches=job.plan.pieces, skip_empty=True, update_rule=rule)
    state = init_state({"policy": {"table": {"kernel": first_table()}}}, optax.identity())
    state = jax.device_put(state)
    job = replace(job, step=step, abstract_state=jax.eval_shape(lambda: state))
    outcome = Learner(job, CompiledStep(job)).learn(state, found, Numbers.of({}, job), 0, False)
    assert len(outcome.updates) == 1
    return np.asarray(outcome.state.params["policy"]["table"]["kernel"]), outcome.credit


def job_config(job: OnlineJob) -> Any:
    from jaxpost import config_io

    return config_io.loads(job.config_text, source="toy")


def test_answers_of_equal_rewards_are_compared_by_their_kl(tmp_path: Path) -> None:
    moved = first_table() + np.random.default_rng(1).normal(0, 0.5, first_table().shape).astype(np.float32)
    groups = [WON, EVEN, [NAN, 1.0, NAN, NAN], ODD]
    for coef, updated in ((0.1, True), (0.0, False)):
        for rewards in (groups[:3], groups):
            job = job_of(
                tmp_path / f"{coef} {len(rewards)}",
                advantage=RLOOAdvantage(),
                loss=ReinforceLoss(),
                kl=KLSection(coef=coef, where="sample"),
            )
            state = job.init_state()
            start = jax.device_put({"policy": {"table": {"kernel": moved}}})
            found = collect(job, *a_round(rewards), lambda number: pytest.fail("no refill"))
            outcome = Learner(job, CompiledStep(job)).learn(
                state._replace(params=start), found, Numbers.of({}, job), 0, False
            )
            assert bool(outcome.updates) == (updated or ODD in rewards)
            assert outcome.credit is None or outcome.credit.advantages[: 2 * G].any() == updated


def test_updates_that_are_not_made_do_not_delay_the_schedule(tmp_path: Path) -> None:
    optim = AdamWSection(lr=0.1, weight_decay=0.0, schedule=ScheduleSection(kind="linear", warmup=0.0))
    job = job_of(tmp_path, optim=optim, learner=LearnerSection(microbatch_rows=4, minibatches=2, epochs=2))
    found = collect(job, *a_round([ODD, EVEN, EVEN, EVEN]), lambda number: pytest.fail("no refill"))
    learner = Learner(job, CompiledStep(job))
    rate = lambda update: 0.1 * (1 - update / 119)  # noqa: E731
    for step in (0, job.num_steps - 1):
        outcome = learner.learn(job.init_state(), found, Numbers.of({}, job), step, False)
        assert len(outcome.updates) == 2, "one minibatch in two is silent"
        # Adam's first two steps by one gradient are as long as the learning rate.
        moved = np.abs(np.asarray(outcome.state.params["policy"]["table"]["kernel"]) - first_table()).max()
        first = job.planned(step)
        assert 0.9 * 2 * rate(first + 3) <= moved <= 1.1 * 2 * rate(first)
    assert job.planned(job.num_steps) == 120


def test_an_answer_whose_environment_failed_is_not_right(tmp_path: Path) -> None:
    (problems, episodes), scored = a_round([[1.0], [1.0]])
    episodes[0] = episodes[0]._replace(reward=NAN)
    job = replace(job_of(tmp_path), generate=lambda *args: episodes)
    section = EvalSection(name="held_out", items=2)
    asked = Evaluation(section, tuple(problems), lambda *args: scored, Wish(1, 0.0, 3))
    result = evaluate(job, asked, None, 0)
    assert result.metrics["held_out/accuracy"] == result.metrics["held_out/pass@1"] == 0.5
    assert result.metrics["held_out/unscored"] == 1
    assert [sample["score"] for sample in result.samples] == [0.0, 1.0]


def test_an_unfinished_thought_has_no_vote(tmp_path: Path) -> None:
    (problems, episodes), scored = a_round([[0.0, 0.0, 1.0]])
    texts = ("2 and 3 are 5", "or 5", "2 + 2 = 4</think> It is 4.")
    said = [e._replace(text=text, opened="<think>") for e, text in zip(episodes, texts, strict=True)]
    job = replace(job_of(tmp_path), generate=lambda *args: said)
    section = EvalSection(name="held_out", items=1, samples=3, temperature=1.0, vote=True)
    asked = Evaluation(section, tuple(problems), lambda *args: scored, Wish(3, 1.0, 3))
    assert evaluate(job, asked, None, 0).metrics["held_out/vote@3"] == 1.0
