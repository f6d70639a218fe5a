"""Reinforcement learning in an environment: answers of several turns, with a calculator between them."""

import math
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxpost.assemble import envs, rl
from jaxpost.assemble.prompts import make_problems
from jaxpost.config import AdamWSection, MeshSection, ModelSection, RunSection, ScheduleSection, SourceSection
from jaxpost.config_check_rl import check_rl
from jaxpost.config_env import CalculatorTool, EnvSection, PythonTool, SearchTool
from jaxpost.config_rewards import FinishedSection, RewardSection
from jaxpost.config_rl import (
    ArithmeticPrompts,
    EvalSection,
    LearnerSection,
    OnlineSection,
    RLConfig,
    RolloutSection,
)
from jaxpost.rl.episodes import Episode, from_json, to_json
from jaxpost.sandbox.run import available
from jaxpost.text.tokenizer import load_tokenizer
from jaxpost.train.collect import collect, draw_round
from jaxpost.train.compiled import CompiledStep
from jaxpost.train.learn import Learner, Numbers
from jaxpost.train.online import run_online
from jaxpost.train.online_job import Draw, Wish
from tests.train.toy_online import InProcess, records, scored_by

STOPS = tuple(chr(c) for c in range(33, 127))
"""A random model of bytes ends a turn within a few tokens."""


def _often(self, text):
    """What stands for the search for a call: one in every turn but those of a length that 3 divides."""
    return ("calculator", "1/0" if len(text) % 2 else "20+3") if len(text) % 3 else None


@pytest.fixture
def make(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(envs._Conversation, "_first_call", _often)
    monkeypatch.setattr(rl, "make_judge", lambda *a, **k: InProcess(scored_by(lambda example, c: float(len(c.tokens)))))

    def job(name="run", **train):
        config = RLConfig(
            model=ModelSection(path=str(tiny_model)),
            prompts=ArithmeticPrompts(),
            rollout=RolloutSection(prompts=2, samples=4, max_tokens=6, rows=8, stop=STOPS),
            env=EnvSection(tools=(CalculatorTool(),), max_turns=3, max_tokens=150, system="Use {tools}"),
            reward=RewardSection(parts=(FinishedSection(),)),
            learner=LearnerSection(epochs=2),
            optim=AdamWSection(lr=1e-3, schedule=ScheduleSection(kind="constant", warmup=0.0)),
            evals=(EvalSection(items=2),),
            mesh=MeshSection(data=1, fsdp=8),
            train=OnlineSection(**{"steps": 2, "save_every": 1, **train}),
            run=RunSection(dir=str(tmp_path / name), name="toy", export=False),
        )
        return rl.make_job(check_rl(config), command=("jaxpost",))

    return job


def found_step(job, state):
    problems = [job.problem(i) for i in range(job.rollout.prompts)]
    episodes = draw_round(job, state.params, problems, 0, 0)
    scored = job.score([problems[e.problem].example for e in episodes], episodes)
    return collect(job, (problems, episodes), scored, lambda number: pytest.fail("no refill"))


@pytest.mark.slow
def test_a_run_in_an_environment_resumes_exactly(make, tmp_path):
    whole = run_online(make("whole"))
    run_online(replace(make("parts"), num_steps=1))
    parts = run_online(make("parts"))
    for a, b in zip(jax.tree.leaves(whole.state.params), jax.tree.leaves(parts.state.params), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    steps = [r for r in records(tmp_path / "whole") if r["kind"] == "train"]
    again = [r for r in records(tmp_path / "parts") if r["kind"] == "train"]
    assert [r["reward"] for r in steps] == [r["reward"] for r in again]
    assert all(r["grad_norm"] > 0 for r in steps)
    assert all(r["env/turns"] > 1 and 0 < r["env/tool_errors"] < r["env/tool_calls"] for r in steps)
    evaluated = next(r for r in records(tmp_path / "whole") if r["kind"] == "eval")
    assert evaluated["held_out/env/turns"] >= 1
    samples = [r for r in records(tmp_path / "whole", "samples.jsonl") if r["kind"] == "rollout"]
    assert any("<result>\n23\n</result>" in r["text"] and "<result>" not in r["judged"] for r in samples)
    assert {r["finish"] for r in samples} >= {"stop", "turns"}
    mean = np.mean([r["env"]["turns"] for r in samples if r["step"] == 1])
    assert steps[0]["env/turns"] == pytest.approx(mean)


@pytest.mark.slow
def test_sampler_and_learner_agree_and_replies_are_not_learnt(make):
    job = make()
    state = job.init_state()
    found = found_step(job, state)
    learner = Learner(job, CompiledStep(job))
    said = learner._say(state, found, [0, 1], dict(job.hyper))["logprobs"]
    episodes = [e for group in found.groups for e in group.episodes]
    assert sum(e.info["turns"] > 1 for e in episodes) > 1
    for row, e in enumerate(episodes):
        on = np.asarray(e.mask, bool)
        assert not np.asarray(e.logprobs)[~on].any()
        np.testing.assert_allclose(said[row, : len(on)][on], np.asarray(e.logprobs)[on], atol=1e-4)
    packed = learner._pack(found, [0, 1], job.plan, None)
    for e, (row, start) in zip(episodes, packed.places, strict=True):
        np.testing.assert_array_equal(packed.batch.weights[row, start : start + len(e.mask)], e.mask)
        np.testing.assert_array_equal(packed.batch.tokens[row, start : start + len(e.mask)], e.tokens)
    assert packed.batch.weights.sum() == sum(len(e.own) for e in episodes)

    def learnt(lie):
        groups = [
            group._replace(
                episodes=tuple(
                    e._replace(logprobs=tuple(x + lie * (1 - m) for x, m in zip(e.logprobs, e.mask, strict=True)))
                    for e in group.episodes
                )
            )
            for group in found.groups
        ]
        step = replace(found, groups=groups, seen=groups)
        return Learner(job, compiled).learn(job.init_state(), step, Numbers.of({}, job), 0, False).updates

    compiled = CompiledStep(job)
    honest = learnt(0.0)
    assert honest == learnt(5.0)
    assert abs(honest[0]["sampler_gap"]) < 1e-4


@pytest.mark.slow
def test_an_answer_does_not_depend_on_its_company(make):
    job = make()
    state = job.init_state()
    problems = [job.problem(i) for i in range(3)]
    wish, draw = Wish(3, 1.0, 6), Draw(4, 2, 7)
    together = job.generate(state.params, job.frozen, problems, wish, draw)
    alone = job.generate(state.params, job.frozen, problems[1:2], wish, draw)
    assert [e.tokens for e in alone] == [e.tokens for e in together[3:6]]
    assert [(e.problem, e.sample) for e in together] == [(i, k) for i in range(3) for k in range(3)]
    assert len({e.tokens for e in together}) > 6
    assert all(len(e.tokens) <= 150 and e.version == 2 for e in together)


def test_episodes_survive_a_checkpoint():
    episode = Episode(0, 1, (5, 6), (1, 0), (-0.5, 0.0), "turns", "a", 3, None, {"turns": 2.0}, "ab")
    assert from_json(to_json([], [episode]), {}.get)[1] == [episode]
    assert math.isnan(from_json(to_json([], [episode._replace(reward=math.nan)]), {}.get)[1][0].reward)
    assert episode.own == (5,)
    assert episode.truncated


def test_tools_are_made_as_configured(tiny_model, tmp_path):
    codec = load_tokenizer(tiny_model)
    (tmp_path / "corpus.jsonl").write_text('{"body": "cats sleep"}\n{"body": "dogs run"}\n')
    source = SourceSection(path=str(tmp_path / "corpus.jsonl"), columns={"text": "body"})
    tools = (CalculatorTool(), SearchTool(source=source, count=1))
    made = envs.make_environments(EnvSection(tools=tools), RolloutSection(), codec, context=99)
    assert made.tools[0]("2 * 16") == "32"
    assert made.tools[1]("dogs") == "[1] dogs run"
    assert list(made.identity) == ["env.tools.1"]
    asked = make_problems(ArithmeticPrompts(system_prompt="Be brief."), codec, tools="T: <x>")
    assert "system\nBe brief.\n\nT: <x><|im_end|>" in codec.decode(asked.at(0).tokens, skip_special_tokens=False)
    bad = (SearchTool(source=SourceSection(path=source.path)),)
    with pytest.raises(ValueError, match=r"there is no text among body; say env\.tools\.0\.source\.columns"):
        envs.make_environments(EnvSection(tools=bad), RolloutSection(), codec, context=99)


@pytest.mark.skipif(all(available().values()), reason="no isolation works on this machine")
def test_python_is_made_with_its_limits(tiny_model):
    section = EnvSection(tools=(PythonTool(seconds=9.0, output_kb=1),))
    made = envs.make_environments(section, RolloutSection(), load_tokenizer(tiny_model), context=99)
    assert made.tools[0]("print(2 ** 5)") == "32"
    assert "stopped: output" in made.tools[0]("print('x' * 5000)")
