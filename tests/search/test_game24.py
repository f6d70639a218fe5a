"""The exact solver against brute force, and what its verifier says of answers."""

from __future__ import annotations

from fractions import Fraction
from itertools import permutations, product

import pytest

from jaxpost.search.contract import Case
from jaxpost.search.game24 import Solver, apply, ask, judge, next_steps, proposals, puzzle_of, reachable, read_step
from jaxpost.search.tree import Ledger, Node, Problem
from jaxpost.text.arithmetic import evaluate


def join(operation, a, b):
    if a is None or b is None or (operation == "/" and b == 0):
        return None
    return {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "/": lambda: a / b}[operation]()


def values(numbers):
    """All values of expressions over the numbers in this order, by every way to split them in two."""
    if len(numbers) == 1:
        return {numbers[0]}
    out = set()
    for cut in range(1, len(numbers)):
        for a, b, operation in product(values(numbers[:cut]), values(numbers[cut:]), "+-*/"):
            out.add(join(operation, a, b))
    return out - {None}


def brute(numbers, target=24):
    return any(target in values(order) for order in set(permutations(numbers)))


@pytest.mark.parametrize("numbers", [(1, 5, 5, 5), (3, 3, 8, 8), (1, 1, 1, 8), (4, 9, 10, 13), (1, 1, 11, 11)])
def test_each_steps_reachability_is_brute_forces(numbers):
    start = tuple(Fraction(x) for x in numbers)
    assert reachable(start) == brute(start)
    seen = set()
    for line in next_steps(start):
        left = apply(start, read_step(line))
        assert left is not None
        assert reachable(left) == brute(left)
        score, steps = judge(puzzle_of(ask(numbers)), line + "\n", whole=False)
        assert (score, steps) == (float(brute(left)), (float(brute(left)),))
        seen.add(left)
    # Every pair with every operation is there.
    assert len(seen) == len({
        tuple(sorted([*(start[k] for k in range(4) if k not in (i, j)), value]))
        for i, j in permutations(range(4), 2) for operation in "+-*/"
        if (value := join(operation, start[i], start[j])) is not None
    })  # fmt: skip


@pytest.mark.parametrize(
    "line",
    ["4 + 8 = 13 (left: 4 6 13)", "4 + 9 = 13 (left: 4 6 13)", "4 + 8 = 12 (left: 4 6)", "4 + 8 = 12",
     "8 / 0 = 0 (left: 4)", "6 + 6 = 12 (left: 4 8 12)", "4 + 8 = 12 (left: 4 6 12) yes", "1/0 + 4 = 4 (left: 4)"],
)  # fmt: skip
def test_a_wrong_step_is_0_and_stays_0(line):
    puzzle = puzzle_of(ask([4, 4, 6, 8]))
    assert judge(puzzle, "4 + 8 = 12 (left: 4 6 12)\n", whole=False) == (1.0, (1.0,))
    assert judge(puzzle, line + "\n6 - 4 = 2 (left: 2 12)\n", whole=False) == (0.0, (0.0, 0.0))


@pytest.mark.parametrize(
    ("answer", "score"),
    [("4 + 8 = 12 (left: 4 6 12)\n6 - 4 = 2 (left: 2 12)\n2 * 12 = 24 (left: 24)\nAnswer: (6 - 4) * (4 + 8) = 24", 1.0),
     ("4 + 8 = 12 (left: 4 6 12)\n6 - 4 = 2 (left: 2 12)\n2 * 12 = 24 (left: 24)", 1.0),
     ("Answer: (6 - 4) * (4 + 8) = 24", 1.0), ("Answer: (6 - 4) * (8 + 8 - 4) = 24", 0.0), ("Answer: 24", 0.0),
     ("4 + 8 = 12 (left: 4 6 12)", 0.0), ("", 0.0), ("Answer: __import__('os')", 0.0)],
)  # fmt: skip
def test_a_whole_answer_has_to_get_there(answer, score):
    root = Node(0, None, (), "")
    problem = Problem(0, [{"role": "user", "content": ask([4, 4, 6, 8])}], root, Ledger(), str.strip)
    [verdict] = Solver()([Case(problem, problem.child(root, (1,), answer, end="stop"))])
    assert verdict.score == score
    assert not verdict.steps or verdict.steps[-1] == score


def test_prompts_without_a_puzzle_are_a_sentence():
    problem = Problem(0, "What is 2 + 2?", Node(0, None, (), ""), Ledger(), str.strip)
    [said] = Solver()([Case(problem, problem.root)])
    assert "poses no puzzle" in said


def test_steps_written_in_an_order_make_the_expression_that_rewards_accept():
    """The way that `reachable` follows leads to 24 by `apply` alone."""
    left = tuple(Fraction(x) for x in (3, 3, 8, 8))
    while len(left) > 1:
        after = [apply(left, read_step(line)) for line in next_steps(left)]
        left = next(x for x in after if x and reachable(x))
    assert left == (Fraction(24),)
    assert evaluate("8 / (3 - 8 / 3)").value == 24
    assert proposals("1. 3 / 8 = 3/8 (left: 3/8 3 8)\n- -2 + 1 = -1 (left: -1)\nno") == [
        "3 / 8 = 3/8 (left: 3/8 3 8)", "-2 + 1 = -1 (left: -1)",
    ]  # fmt: skip
