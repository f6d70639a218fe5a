"""SPIN on the online loop: given answers against the policy's own, relative to the policy before each step."""

import json
import math
from dataclasses import replace

import pytest

from jaxpost import assemble
from jaxpost.config import AdamWSection, MeshSection, ModelSection, RunSection, ScheduleSection, SourceSection
from jaxpost.config_check_rl import check_rl
from jaxpost.config_io import ConfigError
from jaxpost.config_policy_losses import OnlinePreferenceLoss
from jaxpost.config_preference_losses import DPOLoss
from jaxpost.config_rewards import FinishedSection, RewardSection
from jaxpost.config_rl import (
    BestWorst,
    FilePrompts,
    LearnerSection,
    OnlineSection,
    RLConfig,
    SelfPlay,
)
from jaxpost.config_rollout import GivenOpponent, ReferenceOpponent, RolloutSection

ROWS = [{"prompt": f"say {i}", "completion": "yes " * (1 + i % 2)} for i in range(4)]


@pytest.fixture
def config(tiny_model, tmp_path, monkeypatch) -> RLConfig:
    monkeypatch.setenv("JAXPOST_CACHE", str(tmp_path / "cache"))
    return RLConfig(
        model=ModelSection(path=str(tiny_model)),
        prompts=FilePrompts(sources=(SourceSection(path=written(tmp_path, ROWS)),)),
        rollout=RolloutSection(prompts=4, samples=2, max_tokens=12, rows=8, opponent=GivenOpponent()),
        reward=RewardSection(parts=(FinishedSection(),), workers=1),
        advantage=SelfPlay(),
        loss=OnlinePreferenceLoss(losses=(DPOLoss(beta=0.5),)),
        learner=LearnerSection(),
        optim=AdamWSection(lr=3e-3, schedule=ScheduleSection(kind="constant", warmup=0.0)),
        mesh=MeshSection(data=-1, fsdp=1),
        train=OnlineSection(steps=3),
        run=RunSection(dir=str(tmp_path / "{name}"), name="spin", export=False),
    )


def written(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def lines(result, name):
    return [json.loads(line) for line in (result.folder / name).read_text().splitlines()]


@pytest.mark.slow
def test_each_step_compares_given_answers_with_the_policy_that_drew_the_others(config):
    result = assemble.train(check_rl(config))
    steps = [row for row in lines(result, "metrics.jsonl") if row["kind"] == "train"]
    # One update a step: had the reference stayed behind, later losses would be below log 2.
    assert [row["dpo"] for row in steps] == pytest.approx([math.log(2)] * 3, abs=1e-5)
    given = [row["logprobs/chosen"] for row in steps]
    assert given[2] > given[1] > given[0], "given answers become likelier"
    assert {row["samples"] for row in steps} == {4.0}, "the policy's own"
    samples = lines(result, "samples.jsonl")
    theirs = {row["text"] for row in samples if row.get("by") == "opponent"}
    assert theirs <= {row["completion"] for row in ROWS}
    assert theirs


@pytest.mark.slow
def test_several_updates_of_a_step_share_its_reference(config):
    config = replace(config, learner=replace(config.learner, epochs=3), train=OnlineSection(steps=1))
    steps = [row for row in lines(assemble.train(check_rl(config)), "metrics.jsonl") if row["kind"] == "train"]
    assert steps[0]["dpo"] < math.log(2) - 0.01
    assert steps[0]["rewards/margin"] > 0


@pytest.mark.parametrize(
    ("row", "message"),
    [({"prompt": "say 9"}, r"rows\.jsonl:5: the row's completion \(rollout\.opponent\.key\) must be the given answer"),
     ({"prompt": "a", "completion": "yes " * 50}, r"rows\.jsonl:5: completion has .* exceeds rollout\.max_tokens 12")],
)  # fmt: skip
def test_rows_without_a_fitting_answer_are_named(config, tmp_path, row, message):
    written(tmp_path, [*ROWS, row])
    with pytest.raises(ValueError, match=message):
        assemble.train(config)


def test_what_goes_together(config):
    for changes, message in (
        ({"rollout": replace(config.rollout, opponent=ReferenceOpponent())}, "compares with given answers"),
        ({"rollout": replace(config.rollout, opponent=None)}, "compares with given answers"),
        ({"rollout": replace(config.rollout, overlap=1)}, "set rollout.overlap to 0"),
        ({"rollout": replace(config.rollout, samples=3, opponent=GivenOpponent(samples=2))}, "has one given answer"),
        ({"advantage": BestWorst()}, None),
    ):
        changed = replace(config, **changes)
        if message is None:
            assert check_rl(changed) == changed
        else:
            with pytest.raises(ConfigError, match=message):
                check_rl(changed)
