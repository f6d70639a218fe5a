"""Rewards of form and the combinators, against values worked out by hand."""

import math

import numpy as np
import pytest

from jaxpost.generate.samples import Completion
from jaxpost.rewards import contract
from jaxpost.rewards.combine import Clip, Gate, Min, Product, Scale, Sum, leaves
from jaxpost.rewards.contract import RewardFn, Sample
from jaxpost.rewards.style import Finished, OneBox, Overlong, Repetition, Script, TargetLength, ThinkFormat


def score(reward, text="", tokens=(), finish="stop", example=None):
    (column,) = reward([example or {}], [Sample(text, tuple(tokens), finish)]).values()
    assert column.dtype == np.float64
    return column[0]


def test_the_samplers_completions_are_completions():
    completion = Completion(tokens=(1, 2), logprobs=(0.0, 0.0), finish="length", text="a")
    assert isinstance(completion, contract.Completion)
    assert isinstance(Finished(), RewardFn)
    assert Finished()([{}], [completion])["finished"].tolist() == [0]
    assert score(Finished()) == 1


@pytest.mark.parametrize(
    ("text", "plain", "opened", "tagged"),
    [
        ("<think>a</think>b", 1, 1, 0),
        (" <think>\na\n</think>\n\nb", 1, 1, 0),
        ("a</think>b", 0, 1, 0),
        ("<think>a</think><answer>b</answer>", 1, 1, 1),
        ("<think>a</think>\n<answer>\nb</answer>\n", 1, 1, 1),
        ("<think>a</think> so <answer>b</answer>", 1, 1, 0),
        ("<think>a</think><answer>b</answer>c", 1, 1, 0),
        ("<think>a</think><answer> </answer>", 1, 1, 0),
        ("<think> </think>b", 0, 0, 0),
        ("<think>a</think>", 0, 0, 0),
        ("a</think>", 0, 0, 0),
        ("x<think>a</think>b", 0, 0, 0),
        ("</think>a<think>b", 0, 0, 0),
        ("<think>a<think>b</think>c", 0, 0, 0),
        ("<think>a</think>b</think>c", 0, 0, 0),
        ("<think><think>a</think>b", 0, 0, 0),
        ("<think>a", 0, 0, 0),
        ("<answer>b</answer><think>a</think>", 0, 0, 0),
        ("", 0, 0, 0),
    ],
)
def test_thinking(text, plain, opened, tagged):
    assert score(ThinkFormat(), text) == plain
    assert score(ThinkFormat(opened=True), text) == opened
    assert score(ThinkFormat(answer="answer"), text) == tagged


@pytest.mark.parametrize(
    ("text", "one"),
    [
        ("\\boxed{1}", 1),
        ("\\boxed{\\frac{1}{2}}", 1),
        ("", 0),
        ("\\boxed{}", 0),
        ("\\boxed{1} \\boxed{1}", 0),
        ("\\boxed{1} \\boxed{2", 0),
        ("\\boxed{\\boxed{1}}", 0),
        ("\\boxed{1", 0),
    ],
)
def test_one_box(text, one):
    assert score(OneBox(), text) == one


def test_overlong_is_equation_13_of_dapo():
    """The paper's setting: a limit of 20480 with a buffer of 4096 tokens."""
    reward = Overlong(max_tokens=20480, buffer=4096)
    for length, wanted in (
        (0, 0),
        (16384, 0),
        (16385, -1 / 4096),
        (18432, -0.5),
        (20480, -1),
        (20481, -1),
        (30000, -1),
    ):
        assert score(reward, tokens=range(length)) == wanted
    for bad in ({"max_tokens": 4, "buffer": 5}, {"max_tokens": 4, "buffer": 0}):
        with pytest.raises(ValueError, match="from 1 to max_tokens = 4"):
            Overlong(**bad)


def test_target_length():
    reward = TargetLength(coef=0.01)
    assert score(reward, tokens=range(30), example={"target_tokens": 50}) == pytest.approx(-0.2)
    assert score(reward, tokens=range(50), example={"target_tokens": 50}) == 0
    assert score(reward, tokens=range(950), example={"target_tokens": 50}) == -1
    with pytest.raises(ValueError, match="'target_length' needs 'target_tokens'"):
        score(reward)


@pytest.mark.parametrize(
    ("tokens", "n", "wanted"),
    [
        ((1, 2, 3, 4), 2, 0),
        ((1, 1, 1, 1, 1), 2, -0.75),
        ((1, 2, 1, 2, 1), 2, -0.5),
        ((1, 2), 3, 0),
        ((), 1, 0),
        ((7, 7), 1, -0.5),
    ],
)
def test_repetition(tokens, n, wanted):
    assert score(Repetition(n=n), tokens=tokens) == wanted


def test_repetition_needs_an_n():
    with pytest.raises(ValueError, match="at least 1"):
        Repetition(n=0)


@pytest.mark.parametrize(
    ("text", "scripts", "wanted"),
    [
        ("abc", ("LATIN",), 1),
        ("ab\u0431\u0432", ("LATIN",), 0.5),
        ("ab\u0431\u0432", ("CYRILLIC",), 0.5),
        ("1 + 1 = 2!", ("LATIN",), 1),
        ("\u4f60\u597dok", ("CJK",), 0.5),
        ("\u3053\u3093\u4eca\u65e5", ("CJK", "HIRAGANA"), 1),
        ("\u4f60", ("LATIN",), 0),
        ("", ("LATIN",), 1),
    ],
)
def test_script(text, scripts, wanted):
    assert score(Script(scripts), text) == wanted


class Given:
    """A reward with given scores."""

    def __init__(self, name, *scores):
        self.name, self.scores = name, scores

    def __call__(self, examples, completions):
        return {self.name: np.asarray(self.scores, np.float64)}


A, B = Given("a", 0.0, 1.0, 2.0, math.nan), Given("b", 3.0, -1.0, 0.5, 1.0)


@pytest.mark.parametrize(
    ("reward", "wanted"),
    [
        (Sum((A, B)), [3, 0, 2.5, math.nan]),
        (Sum((A, B), weights=(0.5, 2.0)), [6, -1.5, 2, math.nan]),
        (Product((A, B)), [0, -1, 1, math.nan]),
        (Min((A, B)), [0, -1, 0.5, math.nan]),
        (Gate((A, B)), [0, -1, 0.5, math.nan]),
        (Gate((B, A), threshold=0.5, otherwise=-9.0), [0, -9, 2, math.nan]),
        (Clip((A,), high=1.0), [0, 1, 1, math.nan]),
        (Scale((A,), coef=2.0, shift=-1.0), [-1, 1, 3, math.nan]),
        (Sum((Clip((B,), low=-0.5, high=0.5, name="c"), A)), [0.5, 0.5, 2.5, math.nan]),
    ],
)
def test_combinations(reward, wanted):
    columns = reward([{}] * 4, [Sample("")] * 4)
    assert next(iter(columns)) == "reward"
    np.testing.assert_array_equal(columns["reward"], wanted)
    for part in leaves(reward):
        np.testing.assert_array_equal(columns[part.name], part.scores)


def test_combinations_refuse_what_they_cannot_name():
    with pytest.raises(ValueError, match="two rewards are named 'a'"):
        Sum((A, Given("a", 1.0, 1.0, 1.0, 1.0)))([{}] * 4, [Sample("")] * 4)
    # A user's function may be called "reward", and its table of columns may hold any name.
    both = Sum((Given("reward", 5.0, 1.0), lambda e, c: {"more": np.ones(2), "reward": np.zeros(2), "a": np.ones(2)}))
    found = both([{}] * 2, [Sample("")] * 2)
    assert list(found) == ["reward", "reward/reward", "more", "<lambda>/reward", "a"]
    assert found["reward"].tolist() == [6, 2]
    assert list(Sum((A, Scale((A,), name="twice")))([{}] * 4, [Sample("")] * 4)) == ["reward", "a", "twice"]
    with pytest.raises(ValueError, match="1 weights for 2 parts"):
        Sum((A, B), weights=(1.0,))
    with pytest.raises(ValueError, match="no parts"):
        Min(())
    for bad in (lambda: Gate((A,)), lambda: Clip((A, B)), lambda: Clip((A,), low=2.0), lambda: Scale((A, B))):
        with pytest.raises(ValueError, match="part"):
            bad()
