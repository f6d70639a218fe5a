"""Rewards of programs, of math-verify and of reasoning-gym, as presets name them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jaxpost.assemble import prompts, references, rewards
from jaxpost.assemble.prompts import Placed
from jaxpost.config_check_rl import check_config
from jaxpost.config_io import ConfigError, loads
from jaxpost.config_rewards import CodeSection, FunctionSection, GymSection, MathVerifySection, RewardSection
from jaxpost.config_rl import GymPrompts, RLConfig
from jaxpost.rewards import gym
from jaxpost.rewards.contract import Sample
from jaxpost.rl.episodes import Problem
from jaxpost.sandbox.limits import IsolationMissing
from jaxpost.sandbox.run import available

ROW = {"tests": ["assert square(3) == 9", "assert square(-2) == 4"]}
sandboxed = pytest.mark.skipif(all(available().values()), reason="no isolation works on this machine")


def section(*parts: Any, seconds: float = 20.0) -> RewardSection:
    return RewardSection(parts=parts, workers=1, seconds=seconds)


def fenced(code: str) -> Sample:
    return Sample(f"```python\n{code}\n```")


@sandboxed
def test_a_preset_can_reward_programs_by_their_tests() -> None:
    text = "method: rl\nreward: {parts: [{kind: code, seconds: 5, weight: 2}, {kind: finished}], seconds: 20}\n"
    config = check_config(loads(text, source="p.yaml"))
    assert isinstance(config, RLConfig)
    with rewards.make_pool(config.reward) as pool:
        answers = [fenced("def square(x): return x * x"), fenced("def square(x): return 9"), Sample("none")]
        found, problems = pool([ROW] * 3, answers)
    assert problems == ()
    assert found["code"].tolist() == [1.0, 0.5, 0.0]
    assert found["reward"].tolist() == [3.0, 2.0, 1.0]


@sandboxed
def test_what_cannot_work_is_told_before_the_run() -> None:
    with pytest.raises(ValueError, match=r"reward: 'code' may take 3 s; give a row that and 2.0 more"):
        rewards.make_pool(section(CodeSection(), seconds=4.0))
    with pytest.raises(ValueError, match=r"'math_verify' may take 9 s"):
        rewards.make_pool(section(MathVerifySection(seconds=9.0), seconds=5.0))
    with pytest.raises(ValueError, match="memory_mb = 8: Python itself needs 64"):
        rewards.make_pool(section(CodeSection(memory_mb=8)))
    for level, problem in available().items():
        if problem:
            with pytest.raises(IsolationMissing):
                rewards.make_pool(section(CodeSection(isolation=level)))


def test_a_file_that_is_a_script_is_told(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("import sys\n\nsys.exit(3)\n")
    with pytest.raises(ValueError, match=r"script.py:3 could not be run: SystemExit: 3"):
        rewards.make_reward_at(section(FunctionSection(path=f"{tmp_path}/script.py:f")), key="reward")


def test_tests_that_cannot_be_judged_show_with_file_and_line() -> None:
    reward = rewards.make_reward(section(CodeSection()))

    def placed(*rows: Any) -> list[Placed]:
        return [Placed(f"a.jsonl:{n}", Problem(n, (), "", row)) for n, row in enumerate(rows, 1)]

    references.check_references(reward, placed(ROW, {"tests": ["assert f(1) == g(1)"]}), key="prompts")
    (verdict,) = references.judge(reward, placed(ROW, {"tests": ["assert f(1) == g(1)"]}))
    assert verdict.short == ["a.jsonl:2"]
    assert verdict.fault is not None
    assert "a.jsonl:2: Unsupported" in verdict.fault
    with pytest.raises(ValueError, match=r"a.jsonl:1: reward 'code' needs 'tests'"):
        references.check_references(reward, placed({"test": ["assert f(1) == 1"]}), key="prompts")
    with pytest.raises(ValueError, match=r"none of the first 1 .* must hold assert statements"):
        references.check_references(reward, placed({"tests": [1]}), key="prompts")


def test_problems_of_the_gym(monkeypatch: pytest.MonkeyPatch) -> None:
    def entries(task, size, seed):
        return [{"question": f"{task}: {seed} + {i}?", "answer": f"{seed + i}"} for i in range(9)]

    monkeypatch.setitem(sys.modules, "reasoning_gym", SimpleNamespace(create_dataset=entries))
    monkeypatch.setattr(gym.importlib.util, "find_spec", lambda name: object())
    gym._dataset.cache_clear()
    source = prompts.puzzles_of(GymPrompts(task="chain_sum", seed=40))
    example = source.example(2)
    gym._dataset.cache_clear()
    assert example == {"prompt": "chain_sum: 40 + 2?", "answer": "42", "task": "chain_sum"}
    reward = rewards.make_reward(section(GymSection()))
    assert reward([example] * 2, [Sample("so 42"), Sample("41")])["gym"].tolist() == [1.0, 0.0]
    references.check_references(reward, [Placed("gym problem 2", Problem(2, (), "", example))], key="prompts")
    text = (
        "method: rl\nprompts: {kind: gym, task: chain_sum}\nreward: {parts: [{kind: gym}]}\ntrain: {steps: 10}\n"
        "evals: [{name: a, prompts: {kind: gym, task: chain_sum, seed: SEED}}]\n"
    )
    check_config(loads(text.replace("SEED", "1000"), source="p.yaml"))
    with pytest.raises(ConfigError, match=r"evals.0.prompts.seed 80 gives problems that training may draw; .* 88 on"):
        check_config(loads(text.replace("SEED", "80"), source="p.yaml"))
