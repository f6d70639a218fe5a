"""Puzzles: every generated problem is solved by a solver of the test's own, whose solutions the checker accepts."""

import ast
import gzip
import itertools
import json
import operator
import time
from fractions import Fraction

import pytest

from jaxpost.rewards.contract import Sample
from jaxpost.rewards.puzzles import Arithmetic, Countdown, Game24, Reaches, solve, stated
from jaxpost.text.arithmetic import BadExpression, evaluate

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
SHAPES = ("((a{}b){}c){}d", "(a{}(b{}c)){}d", "a{}((b{}c){}d)", "a{}(b{}(c{}d))", "(a{}b){}(c{}d)")


def ways(a, b, c, d, p, q, r):
    """The value of each of SHAPES, to be asked for."""
    return (
        lambda: r(q(p(a, b), c), d),
        lambda: r(p(a, q(b, c)), d),
        lambda: p(a, r(q(b, c), d)),
        lambda: p(a, q(b, r(c, d))),
        lambda: q(p(a, b), r(c, d)),
    )


def brute(numbers, target):
    """All orders, operations and shapes of four numbers, in fractions."""
    for order in sorted(set(itertools.permutations(map(Fraction, numbers)))):
        for signs in itertools.product("+-*/", repeat=3):
            for shape, way in zip(SHAPES, ways(*order, *(OPERATIONS[sign] for sign in signs)), strict=True):
                try:
                    if way() == target:
                        text = shape.format(*signs)
                        for letter, number in zip("abcd", order, strict=True):
                            text = text.replace(letter, str(number))
                        return text
                except ZeroDivisionError:
                    continue
    return None


def check(example, text, **settings):
    return Reaches(**settings)([example], [Sample(text)])["reaches"][0]


@pytest.mark.parametrize("problems", [Game24(seed=3), Countdown(seed=3), Countdown(seed=4, largest=12, low=1)])
def test_every_problem_can_be_solved_and_the_checker_agrees(problems):
    for example in itertools.islice(problems, 25):
        assert len(example["numbers"]) == 4
        solution = brute(example["numbers"], example["target"])
        assert solution, example
        assert check(example, f"I try.\n<answer>{solution}</answer>") == 1
        assert check(example, f"\\boxed{{{solution} = {example['target']}}}") == 1
        assert check(example, f"It works:\n{solution}") == 1
        assert check(example, f"{solution} = {example['target'] + 1}") == 0
        assert check(example, f"{solution} + 0") == 0  # 0 was not given
        assert check(example, f"{solution} * {example['numbers'][0]} / {example['numbers'][0]}") == 0  # reuse
        assert check(example, str(example["target"])) == 0
        assert check({**example, "target": example["target"] + 1}, solution) == 0
        for number in example["numbers"]:
            assert str(number) in example["prompt"]
        assert str(example["target"]) in example["prompt"]


def test_the_solver_finds_what_brute_force_finds():
    for numbers in [
        (1, 1, 1, 1),
        (3, 3, 8, 8),
        (1, 5, 5, 5),
        (1, 3, 4, 6),
        (13, 13, 13, 13),
        (2, 2, 13, 13),
        (1, 1, 1, 8),
    ]:
        ours, theirs = solve(numbers), brute(numbers, 24)
        assert (ours is None) == (theirs is None), numbers
        if ours:
            assert check({"numbers": numbers}, ours) == 1
    assert solve((1, 2), 5) is None
    assert solve((7,), 7) == "7"


def test_the_puzzles_that_people_played_have_solutions(shared_data):
    with gzip.open(shared_data / "rl_puzzle" / "game24_minus_901_1000.jsonl.gz", "rt") as file:
        puzzles = [json.loads(line)["numbers"] for line in file]
    for numbers in puzzles[::12]:
        solution = solve(tuple(numbers))
        assert solution
        assert check({"numbers": numbers}, solution) == 1


def test_problems_are_a_function_of_seed_and_index():
    for make in (Arithmetic, Game24, Countdown):
        first = [make(seed=1).example(i) for i in range(12)]
        assert first == list(itertools.islice(make(seed=1), 12))
        assert first[7] == make(seed=1).example(7)
        assert first != [make(seed=2).example(i) for i in range(12)]
        assert len({example["prompt"] for example in first}) > 6


def test_arithmetic_is_right_and_its_splits_are_apart():
    pairs = {}
    for split in ("train", "test"):
        examples = [Arithmetic(low=1, high=20, operations="+-*", split=split).example(i) for i in range(400)]
        for example in examples:
            a, b = example["operands"]
            assert 1 <= min(a, b) <= max(a, b) <= 20
            assert int(example["answer"]) == OPERATIONS[example["operation"]](a, b)
            assert f"{a} {example['operation']} {b}" in example["prompt"]
        assert {example["operation"] for example in examples} == set("+-*")
        pairs[split] = {frozenset(example["operands"]) for example in examples}
    assert not pairs["train"] & pairs["test"]
    assert 8 <= len(pairs["test"]) <= 40  # about a tenth of 210


def test_differences_need_not_be_negative():
    signed, unsigned = Arithmetic(operations="-", high=9), Arithmetic(operations="-", high=9, negative=False)
    pairs = [(signed.example(i), unsigned.example(i)) for i in range(60)]
    assert any(int(a["answer"]) < 0 for a, _ in pairs)
    assert [abs(int(a["answer"])) for a, _ in pairs] == [int(b["answer"]) for _, b in pairs]


def test_generators_refuse_what_has_no_problems():
    with pytest.raises(ValueError, match="no pair"):
        Arithmetic(low=1, high=2, split="test", held_out=0.0)
    with pytest.raises(ValueError, match="needs low <= high"):
        Arithmetic(operations="^")
    with pytest.raises(ValueError, match="at least 4"):
        Game24(high=3)
    with pytest.raises(ValueError, match="count >= 2"):
        Countdown(count=1)


def test_some_numbers_may_be_left_out_if_so_wished():
    example = {"numbers": [4, 6, 9, 9], "target": 24}
    assert check(example, "4*6") == 0
    assert check(example, "4*6", use="some") == 1
    assert check(example, "4*6*9/9", use="some") == 1
    assert check(example, "4*4+4+4", use="some") == 0
    with pytest.raises(ValueError, match="needs 'numbers'"):
        check({"target": 24}, "24")


def test_what_is_stated():
    assert stated("<answer>1+1</answer> no <answer>2 \\times 3</answer>") == "2 * 3"
    assert stated("Hm\nThe answer is: (1+2)\n\n") == "(1+2)"
    example = {"numbers": [8, 4, 6, 1]}
    assert [check(example, f"The answer is {text}") for text in ("**(8-4)*6*1**.", "(8-4)*6*1 = 24.")] == [1, 1]
    assert stated("") == ""


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2+3*4", 14),
        ("(2+3)*4", 20),
        ("8/(3-8/3)", 24),
        ("2-3-4", -5),
        ("16/4/2", 2),
        ("-2*-3", 6),
        ("1.5×2", 3),
        ("−4", -4),
        ("[1+2]*3", 9),
        ("0.1+0.2", Fraction(3, 10)),
        ("8÷2", 4),
        ("  7 ", 7),
    ],
)
def test_arithmetic(text, value):
    assert evaluate(text).value == value


NOT_ARITHMETIC = [
    "",
    "()",
    "1+",
    "1/0",
    "1/(2-2)",
    "2**3",
    "9**9**9**9",
    "2^3",
    "1 2",
    "(1",
    "1)",
    "x",
    '__import__("os")',
    "1e9",
    "1_0",
    "0x10",
    "\u0661+\u0661",
    "\u00b2",
    "\uff11",
    "1;2",
    "1,2",
    "(" * 10**6 + ")" * 10**6,
    "(" * 200 + "1" + ")" * 200,
    "-" * 400 + "1",
    "9" * 400,
    "1.",
    ".5",
    "1..2",
    "1\x00",
    "2//3",
    "7%2",
    "a.b",
    "[1",
    "(1]+2)(",
    "lambda: 1",
]


@pytest.mark.parametrize("text", NOT_ARITHMETIC, ids=range(len(NOT_ARITHMETIC)))
def test_what_is_not_arithmetic_is_refused_quickly(text):
    start = time.perf_counter()
    with pytest.raises(BadExpression):
        evaluate(text)
    assert check({"numbers": [1, 1, 2, 3]}, text) == 0
    assert check({"numbers": [1, 1, 2, 3]}, f"<answer>{text}</answer>") == 0
    assert time.perf_counter() - start < 1


def test_arithmetic_agrees_with_python():
    """Random expressions against Python's own precedence (by its syntax tree, in fractions)."""
    import random

    def value(node):
        if isinstance(node, ast.BinOp):
            signs = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
            return OPERATIONS[signs[type(node.op)]](value(node.left), value(node.right))
        return -value(node.operand) if isinstance(node, ast.UnaryOp) else Fraction(node.value)

    draw = random.Random(1)

    def expression(depth):
        if depth == 0 or draw.random() < 0.2:
            return str(draw.randint(0, 20))
        text = f"{expression(depth - 1)} {draw.choice('+-*/')} {expression(depth - 1)}"
        return draw.choice((text, f"({text})", f"-({text})"))

    compared = 0
    for _ in range(300):
        text = expression(4)
        try:
            wanted = value(ast.parse(text, mode="eval").body)
        except ZeroDivisionError:
            with pytest.raises(BadExpression, match="zero"):
                evaluate(text)
            continue
        assert evaluate(text).value == wanted
        compared += 1
    assert compared > 150
