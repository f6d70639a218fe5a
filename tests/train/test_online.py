"""The online loop on a table of logits: what it learns and writes, and that it can be cut anywhere."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from toy_online import (
    first_table,
    halves,
    long_config,
    probability,
    records,
    scored_by,
    table_of,
    toy_config,
    toy_job,
    toys,
)

from jaxpost.assemble import rl
from jaxpost.assemble.rewards import make_pool
from jaxpost.checkpoint import CheckpointMismatch
from jaxpost.config import MeshSection
from jaxpost.config_policy_losses import ReinforceLoss
from jaxpost.config_rewards import FunctionSection, RewardSection
from jaxpost.config_rl import (
    CriticSection,
    EvalSection,
    GAEAdvantage,
    GRPOAdvantage,
    KLSection,
    LearnerSection,
    OnlineSection,
    ReinforceAdvantage,
    RolloutSection,
    TruncatedCorrection,
)
from jaxpost.train.online import run_online

TOY = Path(__file__).with_name("toy_online.py")
ROLLOUT = RolloutSection(prompts=4, samples=8, max_tokens=2)
SCORE = scored_by(halves)
EVAL = EvalSection(name="held_out", items=5, samples=4, temperature=1.0, pass_at=(1, 4))


def test_the_reward_rises_and_the_files_say_how(tmp_path: Path) -> None:
    config = toy_config(
        tmp_path, train=OnlineSection(steps=25, save_every=0, eval_every=10), evals=(EVAL,),
        advantage=GRPOAdvantage(scale="none"),
    )  # fmt: skip
    result = run_online(toy_job(config, SCORE)[0])
    assert result.step == 25
    assert probability(table_of(result.state), "ba") > 0.9 > 0.2 > probability(first_table(), "ba")
    found = records(result.folder)
    trained, evals = ([r for r in found if r["kind"] == kind] for kind in ("train", "eval"))
    assert [r["step"] for r in trained] == list(range(1, 26))
    assert [r["step"] for r in evals] == [0, 10, 20, 25]
    assert evals[0]["held_out/accuracy"] < 0.3 < 0.8 < evals[-1]["held_out/accuracy"]
    assert evals[-1]["held_out/accuracy"] <= evals[-1]["held_out/pass@4"]
    assert trained[0]["reward"] < 0.5 < 0.9 < trained[-1]["reward"]
    lines = (result.folder / "metrics.jsonl").read_text().splitlines()
    assert {"rollout", "reward", "reference", "learner", "seconds"} <= json.loads(lines[-2])["time"].keys()
    samples = records(result.folder, "samples.jsonl")
    for record in trained:
        mine = [s for s in samples if s["kind"] == "rollout" and s["step"] == record["step"]]
        assert len(mine) == 32
        np.testing.assert_allclose(np.mean([s["reward"] for s in mine]), record["reward"])
        np.testing.assert_allclose(np.mean([s["tokens"] for s in mine]), record["answer_tokens"])
        assert record["truncated"] == np.mean([s["finish"] == "length" for s in mine])
        assert {s["version"] for s in mine} == {record["policy_version"]}
        for group in range(4):
            rewards = [s["reward"] for s in mine if s["group"] == group]
            advantages = [s["advantage"] for s in mine if s["group"] == group]
            if len(set(rewards)) > 1:
                np.testing.assert_allclose(advantages, np.array(rewards) - np.mean(rewards), atol=1e-6)
    assert len([s for s in samples if s["kind"] == "eval" and s["step"] == 0]) == 20


@pytest.mark.parametrize("pieces", [{}, {"correction": TruncatedCorrection()}], ids=["plain", "corrected"])
def test_on_policy_ratios_are_one_and_the_loss_is_minus_the_mean_advantage(
    pieces: dict[str, Any], tmp_path: Path
) -> None:
    """With one update a step the old policy is the current one, with a correction too: no pass of its own."""
    config = toy_config(
        tmp_path, advantage=ReinforceAdvantage(baseline="none"), train=OnlineSection(steps=3, save_every=0),
        rollout=replace(ROLLOUT, temperature=0.7), **pieces,
    )  # fmt: skip
    score = scored_by(lambda example, completion: 0.3 + len(completion.text) ** 2)
    result = run_online(toy_job(config, score)[0])
    samples = records(result.folder, "samples.jsonl")
    for record in records(result.folder):
        assert abs(record["ratio"] - 1) < 1e-5
        assert abs(record["ratio_squared"] - 1) < 1e-5
        assert record["clip_fraction"] == record["clip_low"] == record["clip_high"] == 0
        assert abs(record["old_kl"]) < 1e-6
        assert record["sampler_gap"] < 1e-5
        assert abs(record.get("effective_sample_size", 1.0) - 1) < 1e-5
        mine = [s for s in samples if s["step"] == record["step"]]
        want = -np.average([s["advantage"] for s in mine], weights=[s["tokens"] for s in mine])
        np.testing.assert_allclose(record["policy"], want, rtol=1e-4)
        np.testing.assert_allclose(record["loss"], want, rtol=1e-4)


# Cut and gone on with

BIG = {"train": OnlineSection(steps=9, save_every=2, eval_every=4, log_every=2), "evals": (EVAL,)}
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "minibatches, epochs, adaptive KL": {
        "learner": LearnerSection(minibatches=2, epochs=2, microbatch_rows=2),
        "kl": KLSection(coef=0.1, target=0.01, horizon=100),
    },
    "one step off, running baseline": {
        "rollout": replace(ROLLOUT, overlap=1),
        "correction": TruncatedCorrection(),
        "advantage": ReinforceAdvantage(),
        "loss": ReinforceLoss(),
    },
    "one step off, dynamic sampling": {
        "rollout": replace(ROLLOUT, overlap=1, max_refills=2),
        "correction": TruncatedCorrection(level="sequence"),
    },
    "critic": {
        "advantage": GAEAdvantage(),
        "critic": CriticSection(network="separate"),
        "learner": LearnerSection(minibatches=2, microbatch_rows=2),
    },
}


class Cut(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def kill() -> None:
    raise Cut


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def everything(folder: Path) -> Any:
    return [records(folder, name) for name in ("metrics.jsonl", "samples.jsonl", "alarms.jsonl")]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if i > 1 else ()) for i, name in enumerate(RUNS)]
)
def test_cut_at_a_random_moment_it_ends_bit_for_bit_the_same(name: str, tmp_path: Path) -> None:
    """Killed while it samples or scores; asked to stop; each at a random call of one run."""
    whole_job, sampler = toy_job(toy_config(tmp_path / "whole", **BIG, **RUNS[name]), SCORE)
    whole = run_online(whole_job)
    calls, seed = sampler.calls, random.randrange(10**6)
    rng = random.Random(seed)
    for how in (kill, terminate):
        at, scores = rng.randrange(1, calls), rng.random() < 0.5
        seen = 0

        def score(examples: Any, completions: Any, at: int = at, on: bool = scores, how: Any = how) -> Any:
            nonlocal seen
            seen += 1
            if on and seen == at:
                how()
            return SCORE(examples, completions)

        job, sampler = toy_job(toy_config(tmp_path / "cut", **BIG, **RUNS[name]), score)
        if not scores:
            sampler.before = lambda call, at=at, how=how: how() if call == at else None
        try:
            result = run_online(job)
        except Cut:
            continue
        assert result.stopped in (None, "SIGTERM")
    again = run_online(toy_job(toy_config(tmp_path / "cut", **BIG, **RUNS[name]), SCORE)[0])
    for one, other in zip(jax.tree.leaves(whole.state), jax.tree.leaves(again.state), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other), err_msg=f"seed {seed}")
    assert everything(whole.folder) == everything(again.folder), f"seed {seed}"


def test_killed_for_good_it_ends_bit_for_bit_the_same(tmp_path: Path) -> None:
    """SIGKILL of a process that samples one step ahead, at a random moment."""
    whole = run_online(toy_job(long_config(tmp_path / "whole"), SCORE)[0])
    seed = random.randrange(10**6)
    child = subprocess.Popen(
        [sys.executable, str(TOY), str(tmp_path / "cut"), "0.05"],
        env=os.environ | {"PYTHONPATH": str(TOY.parents[2])}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    until = time.monotonic() + 120
    while not (tmp_path / "cut" / "toy" / "metrics.jsonl").exists() and child.poll() is None:
        assert time.monotonic() < until, "the run did not get going"
        time.sleep(0.01)
    time.sleep(random.Random(seed).uniform(1.0, 3.0))
    assert child.poll() is None, child.communicate()[1].decode()[-2000:]
    child.kill()
    child.communicate()
    again = run_online(toy_job(long_config(tmp_path / "cut"), SCORE)[0])
    assert everything(whole.folder) == everything(again.folder), f"seed {seed}"
    np.testing.assert_array_equal(table_of(whole.state), table_of(again.state), err_msg=f"seed {seed}")


# Rewards that fail

REWARD = """
import time

def reward(examples, completions):
    (example,), (completion,) = examples, completions
    kind = example["index"] % 4
    if kind == 1:
        raise KeyError("no answer")
    if kind == 2 and completion.text[:1] == "a":
        time.sleep(60)
    if kind == 3:
        return {"score": [float("nan")], "length": [1.0]}
    return {"score": [float(completion.text[:1] == "b")], "length": [float(len(completion.text))]}
"""


def test_a_reward_that_fails_for_some_rows_is_told_and_the_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text(REWARD)
    section = RewardSection(parts=(FunctionSection(path=f"{tmp_path}/reward.py:reward"),), workers=2, seconds=0.5)
    config = toy_config(tmp_path, reward=section, train=OnlineSection(steps=2, save_every=0))
    with toys(make_pool(section)):
        job = rl.make_job(config, command=("jaxpost",))
    result = run_online(job)
    samples = records(result.folder, "samples.jsonl")
    for record in records(result.folder):
        mine = [s for s in samples if s["step"] == record["step"]]
        assert record["unscored"] == sum(s["reward"] is None for s in mine)
        np.testing.assert_allclose(record["reward"], np.mean([s["reward"] for s in mine if s["reward"] is not None]))
    for s in samples:
        kind, gone = s["example"] % 4, s["reward"] is None
        assert gone == (kind in (1, 3) or (kind == 2 and s["text"][:1] == "a"))
        assert s["advantage"] is None or not gone
    said = (result.folder / "log.txt").read_text()
    assert "reward 'reward' left row 8 unscored: it raised KeyError" in said
    faults = [line for line in said.splitlines() if "unscored:" in line]
    for name in ("reward", "score"):
        assert sum(f"reward '{name}' left row" in line for line in faults) == 3, "the first few of each are shown"
    told = sum(s["reward"] is None for s in samples)
    assert f"Rewards failed {told} times since the start (reward 'reward': " in said


def test_one_device_and_eight_draw_and_learn_the_same(tmp_path: Path) -> None:
    found = {}
    sections = {
        "train": OnlineSection(steps=2, save_every=0),
        "kl": KLSection(coef=0.1),
        "learner": LearnerSection(minibatches=2),
    }
    for devices in (1, 8):
        config = toy_config(tmp_path / str(devices), mesh=MeshSection(data=devices, fsdp=1), **sections)
        result = run_online(toy_job(config, SCORE, devices=devices)[0])
        found[devices] = table_of(result.state), records(result.folder, "samples.jsonl")
    one, eight = found[1], found[8]
    moved = np.linalg.norm(one[0] - first_table())
    assert np.linalg.norm(one[0] - eight[0]) < 1e-4 * moved
    for a, b in zip(one[1], eight[1], strict=True):
        assert a.pop("advantage") == pytest.approx(b.pop("advantage"), rel=1e-5)
        assert a == b


@pytest.mark.parametrize(("advantage", "alarms"), [(GRPOAdvantage(), True), (ReinforceAdvantage(), False)])
def test_equal_rewards_are_an_alarm_where_they_teach_nothing(advantage: Any, alarms: bool, tmp_path: Path) -> None:
    """Without a comparison in the group, its one sample teaches all the same."""
    config = toy_config(
        tmp_path, advantage=advantage, rollout=replace(ROLLOUT, samples=2 if alarms else 1),
        train=OnlineSection(steps=6, save_every=0),
    )  # fmt: skip
    score = scored_by((lambda example, completion: 1.0) if alarms else halves)
    folder = run_online(toy_job(config, score)[0]).folder
    assert [r["zero_variance_groups"] for r in records(folder)] == [4] * 6
    assert ("zero_variance" in [alarm["alarm"] for alarm in records(folder, "alarms.jsonl")]) == alarms


@pytest.mark.parametrize("of", ["the run", "an evaluation"])
def test_a_run_does_not_go_on_with_another_reward_function(of: str, tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(REWARD)
    section = RewardSection(parts=(FunctionSection(path=f"{tmp_path}/rewards.py:reward"),))
    mine = {"reward": section} if of == "the run" else {"evals": (replace(EVAL, reward=section),)}
    config = toy_config(tmp_path, train=OnlineSection(steps=2, save_every=0), **mine)
    constant = scored_by(lambda example, completion: 1.0)
    run_online(toy_job(config, constant)[0])
    run_online(toy_job(config, constant)[0])
    (tmp_path / "rewards.py").write_text(REWARD + "# another day\n")
    with pytest.raises(CheckpointMismatch, match=r"reward function .*rewards.py:reward: fingerprint"):
        run_online(toy_job(config, constant)[0])
