"""The lab's problems: right, endless, the same whenever asked for, and split so that nothing held out is shown."""

import itertools
import re

import pytest

from jaxpost.recipes.lab.problems import TASKS, LabProblems, distinct

TRAIN, TEST = LabProblems(seed=3), LabProblems(seed=3, split="test")


def asked(text: str) -> tuple[tuple[int, ...], str] | None:
    """The unordered operands and the operation of a text `a op b`."""
    match = re.fullmatch(r"(-?\d+)([-+*])(-?\d+)", text)
    return (tuple(sorted(map(int, match.group(1, 3)))), match[2]) if match else None


def test_every_step_and_every_answer_is_right():
    for row in itertools.islice(TRAIN, 600):
        a, operation, b = re.fullmatch(r"(\d+)([-+*])(\d+)", row["prompt"]).groups()
        right = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[operation]
        assert int(row["answer"]) == right
        steps = row["completion"].split(";")
        assert steps[-1].rpartition("=")[2] == row["answer"]
        for step in steps if len(steps) > 1 else []:
            x, sign, y, value = re.fullmatch(r"(-?\d+)([-+*])(\d+)=(-?\d+)", step).groups()
            assert {"+": int(x) + int(y), "-": int(x) - int(y), "*": int(x) * int(y)}[sign] == int(value)


def test_problem_i_is_a_function_of_seed_and_i():
    rows = [TRAIN.example(i) for i in range(40)]
    assert [TRAIN.example(i) for i in reversed(range(40))] == rows[::-1]
    assert list(itertools.islice(LabProblems(seed=3), 40)) == rows
    assert [LabProblems(seed=4).example(i) for i in range(40)] != rows
    assert TRAIN.example(10**9)["prompt"], "there is no end"


def test_held_out_operands_are_in_no_training_row_in_any_order():
    test = {asked(row["prompt"])[0] for row in itertools.islice(TEST, 3000)}
    shown = set()
    for row in itertools.islice(TRAIN, 6000):
        shown.add(asked(row["prompt"])[0])
        shown |= {asked(step.rpartition("=")[0])[0] for step in row["completion"].split(";") if "=" in step}
    assert not test & shown
    # Both are large, and a fifth is held out: 81 * 82 / 2 pairs of two-digit numbers without zeros, 81 * 7 products.
    assert len(test) > 500
    assert 0.1 < len(test) / (len(test) + len({s for s in shown if min(s) > 2})) < 0.35


def test_tasks_take_turns_and_half_of_the_answers_show_no_working():
    rows = list(itertools.islice(TRAIN, 900))
    assert [row["task"] for row in rows[:6]] == [*TASKS, *TASKS]
    bare = sum("=" not in row["completion"] for row in rows) / len(rows)
    assert 0.42 < bare < 0.58  # five deviations of a binomial
    assert all("=" in row["completion"] for row in itertools.islice(LabProblems(direct=0.0), 30))


def test_distinct_problems_and_their_end():
    rows = list(distinct(TEST, 90))
    assert len({row["prompt"] for row in rows}) == 90
    assert {task: sum(row["task"] == task for row in rows) for task in TASKS} == dict.fromkeys(TASKS, 30)
    with pytest.raises(ValueError, match="more different problems of the task product"):
        list(distinct(LabProblems(split="test", tasks=("product",)), 200))


@pytest.mark.parametrize("wrong", [{"tasks": ("root",)}, {"tasks": ()}, {"share": 0.0}, {"direct": 1.5}])
def test_wrong_settings_are_named(wrong):
    with pytest.raises(ValueError, match=r"tasks are some of|needs 0 < share"):
        LabProblems(**wrong)
