"""reasoning-gym's problems: our scorers give the reference 1 and everything else 0."""

import sys
from types import SimpleNamespace

import pytest

from jaxpost.rewards import gym
from jaxpost.rewards.contract import Sample
from jaxpost.rewards.gym import TASKS, GymAnswer, GymProblems, plain


@pytest.mark.parametrize(
    ("task", "gold", "text", "wanted"),
    [
        ("chain_sum", "-4", r"so \boxed{-4}", 1),
        ("chain_sum", "-4", "the answer is 4", 0),
        ("dice", "737/960", "The answer is 737/960.", 1),
        ("syllogism", "Yes", "<answer>yes</answer>", 1),
        ("syllogism", "Yes", "Yes and no", 0),
        ("caesar_cipher", "LET US THEN", "It reads\n'let us  then'.", 0),
        ("caesar_cipher", "LET US THEN", "It reads\nlet us  then.", 1),
        ("bitwise_arithmetic", "0x5b993", "__import__('os').abort() or 0x5b993", 0),
        ("string_splitting", "0 0 0 3 0 1", "<answer>0 0 0 3 0 1</answer>", 1),
        ("gcd", "5", "", 0),
    ],
)
def test_answers_are_compared_here(task, gold, text, wanted):
    assert GymAnswer().row({"task": task, "answer": gold}, Sample(text)) == wanted


def test_unsafe_tasks_are_refused():
    for task in ("countdown", "puzzle24", "game_of_life_halting", "codeio"):
        assert task not in TASKS
        with pytest.raises(ValueError, match="no safe scorer"):
            GymProblems(task)
        with pytest.raises(ValueError, match="no safe scorer"):
            GymAnswer().row({"task": task, "answer": "1"}, Sample("1"))


def test_problems_come_by_seed_and_index_and_no_scorer_is_called(monkeypatch):
    class Dataset:
        def __init__(self, task, size, seed):
            self.at = lambda i: {"question": f"{task}?", "answer": str(seed + i)}

        def __getitem__(self, index):
            return self.at(index)

        def score_answer(self, answer, entry):
            raise AssertionError("never")

    fake = SimpleNamespace(create_dataset=lambda name, size, seed: Dataset(name, size, seed))
    monkeypatch.setitem(sys.modules, "reasoning_gym", fake)
    monkeypatch.setattr(gym.importlib.util, "find_spec", lambda name: object())
    gym._dataset.cache_clear()
    example = GymProblems("gcd", seed=3).example(2)
    assert example == {"prompt": "gcd?", "answer": "5", "task": "gcd"}
    assert GymAnswer().row(example, Sample("5")) == 1
    gym._dataset.cache_clear()
    monkeypatch.setattr(gym.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'jaxpost\[gym\]'"):
        GymProblems("gcd")


@pytest.mark.parametrize("task", sorted(TASKS))
def test_every_task_of_the_package(task):
    pytest.importorskip("reasoning_gym")
    problems = GymProblems(task, seed=11)
    first = [problems.example(i) for i in range(3)]
    assert first == [GymProblems(task, seed=11).example(i) for i in range(3)]
    for example in first:
        told = f"I think so.\n<answer>{example['answer']}</answer>"
        assert (
            GymAnswer().row(example, Sample(told if TASKS[task] == "text" else rf"\boxed{{{example['answer']}}}")) == 1
        )
        assert GymAnswer().row(example, Sample("no idea")) == 0


def test_plain_text():
    assert plain("  'A  b'. ") != ""
    assert plain("Friday.") == "friday"
