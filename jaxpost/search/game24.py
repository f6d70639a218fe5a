"""Puzzles of numbers and a target (game of 24), worked in steps `a op b = c (left: ...)`: an exact checker of every
step, a verifier made of it, and prompts for searches (2305.10601).

All arithmetic is in fractions; what a model writes is parsed, never run.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

from jaxpost.rewards.puzzles import solve, stated
from jaxpost.search.contract import Case, Verdict
from jaxpost.search.pieces import question
from jaxpost.search.tree import Node
from jaxpost.text.arithmetic import BadExpression, evaluate

_NUMBER = r"-?[0-9]{1,12}(?:/[0-9]{1,12}|\.[0-9]{1,6})?"
_STEP = re.compile(rf"({_NUMBER}) ([-+*/]) ({_NUMBER}) = ({_NUMBER}) \(left: ({_NUMBER}(?: {_NUMBER})*)\)")
_PUZZLE = re.compile(r"(?:numbers|Input:)[ \t]+([0-9]{1,6}(?:(?:,[ \t]*|[ \t]+)[0-9]{1,6})+)")
_TARGET = re.compile(r"(?:to make|to reach|target|until only) ([0-9]{1,6})")

Numbers = tuple[Fraction, ...]
"""Sorted."""


class Puzzle(NamedTuple):
    numbers: Numbers
    target: Fraction = Fraction(24)


class Step(NamedTuple):
    """A step as it was written; whether it is right is `apply`'s to say."""

    a: Fraction
    operation: str
    b: Fraction
    value: Fraction
    left: Numbers


def puzzle_of(prompt: Any) -> Puzzle | None:
    """The puzzle that a prompt poses: `numbers 4, 9, 10, 13 ... to make 24` or `Input: 4 9 10 13`; None: none.

    >>> puzzle_of("Use each of the numbers 1, 5 exactly once to make 6.").target
    Fraction(6, 1)
    """
    text = question(prompt)
    found, target = _PUZZLE.findall(text), _TARGET.findall(text)
    if not found:
        return None
    numbers = tuple(sorted(Fraction(x) for x in re.split(r"[,\s]+", found[-1])))
    return Puzzle(numbers, Fraction(target[-1]) if target else Fraction(24))


def read_step(line: str) -> Step | None:
    """`10 - 4 = 6 (left: 6 9 13)`, strictly; None: anything else. Numbers may be 8/3 or 2.5.

    >>> read_step("10 - 4 = 6 (left: 6 9 13)").left
    (Fraction(6, 1), Fraction(9, 1), Fraction(13, 1))
    """
    found = _STEP.fullmatch(line.strip())
    if found is None:
        return None
    try:
        a, b, value = (Fraction(found[i]) for i in (1, 3, 4))
        return Step(a, found[2], b, value, tuple(sorted(Fraction(x) for x in found[5].split(" "))))
    except ZeroDivisionError:
        return None


def apply(numbers: Numbers, step: Step) -> Numbers | None:
    """What is left after a step, None if it is wrong: a and b must be there, the value and what is left exact.

    >>> apply((Fraction(4), Fraction(10)), read_step("10 - 4 = 6 (left: 6)"))
    (Fraction(6, 1),)
    """
    have, used = Counter(numbers), Counter([step.a, step.b])
    if not used <= have or (step.operation == "/" and not step.b):
        return None
    a, b = step.a, step.b
    value = a + b if step.operation == "+" else a - b if step.operation == "-" else a * b
    if step.operation == "/":
        value = a / b
    left = tuple(sorted([*(have - used).elements(), value]))
    return left if value == step.value and left == step.left else None


def reachable(numbers: Numbers, target: Fraction = Fraction(24)) -> bool:
    """Whether + - * / over all the numbers can make the target: exhaustive, in fractions.

    >>> reachable((Fraction(3), Fraction(8), Fraction(3), Fraction(8))), reachable((Fraction(5), Fraction(4)))
    (True, False)
    """
    return solve(numbers, target) is not None


def next_steps(numbers: Numbers) -> list[str]:
    """Every possible next step, as it is to be written; none repeated.

    >>> next_steps((Fraction(2), Fraction(4)))[:2]
    ['2 + 4 = 6 (left: 6)', '2 - 4 = -2 (left: -2)']
    """
    lines: dict[str, None] = {}
    for i, a in enumerate(numbers):
        for j, b in enumerate(numbers):
            if i == j:
                continue
            rest = [x for k, x in enumerate(numbers) if k not in (i, j)]
            values = {"+": a + b, "-": a - b, "*": a * b}
            if b:
                values["/"] = a / b
            for operation, value in values.items():
                if operation in "+*" and j < i:
                    continue
                left = " ".join(map(str, sorted([*rest, value])))
                lines[f"{a} {operation} {b} = {value} (left: {left})"] = None
    return list(lines)


def proposals(text: str) -> list[str]:
    """The steps that a reply lists, one a line (a list mark before it is allowed); other lines are none.

    >>> proposals("Possible:\\n- 2 + 4 = 6 (left: 6)\\n8 8")
    ['2 + 4 = 6 (left: 6)']
    """
    lines = [re.sub(r"^\s*(?:[-*]|\d+[.)])\s+(?=\S+ [-+*/] )", "", line).strip() for line in text.splitlines()]
    return list(dict.fromkeys(line for line in lines if read_step(line)))


def judge(puzzle: Puzzle, answer: str, *, whole: bool) -> tuple[float, tuple[float, ...]]:
    """(score, score of each line): 1 while every line is right and the target can still be reached, else 0.

    Lines are steps, then perhaps one that states an expression (`Answer: (10 - 4) * (13 - 9) = 24`), which must use
    every number once. A last line without its end is not judged unless the answer is whole; a whole answer must get
    to the target.

    >>> judge(puzzle_of("Input: 4 6"), "4 * 6 = 24 (left: 24)\\n", whole=True)
    (1.0, (1.0,))
    """
    lines = answer.split("\n")
    lines = [line for line in (lines if whole else lines[:-1]) if line.strip()]
    left, right, got, steps = puzzle.numbers, True, False, []
    for line in lines:
        step = read_step(line)
        if step is None:
            right = right and _states(puzzle, line)
            got = right
        else:
            after = apply(left, step)
            right = right and after is not None and reachable(after, puzzle.target)
            left = left if after is None else after
        steps.append(float(right))
    if whole:
        right = right and (got or left == (puzzle.target,))
        steps = [*steps[:-1], float(right)] if steps else []
    return float(right), tuple(steps)


def _states(puzzle: Puzzle, line: str) -> bool:
    """Whether a line's expression uses each of the puzzle's numbers once and makes the target."""
    left, equals, right = stated(line).partition("=")
    try:
        found = evaluate(left)
        ends = not equals or evaluate(right).value == puzzle.target
    except BadExpression:
        return False
    return ends and found.value == puzzle.target and Counter(found.numbers) == Counter(puzzle.numbers)


@dataclass(frozen=True)
class Solver:
    """A verifier of game-of-24 answers, at no price: 1 where the target is still reachable, 0 where it is not.

    Its verdict on each line is in `steps`. A prompt that poses no puzzle is a sentence.
    """

    def __call__(self, cases: Sequence[Case]) -> Sequence[Verdict | str]:
        return [self._judge(case) for case in cases]

    def _judge(self, case: Case) -> Verdict | str:
        puzzle = puzzle_of(case.problem.prompt)
        if puzzle is None:
            return "the prompt poses no puzzle; `Input: 4 9 10 13` does"
        if len(puzzle.numbers) > 5:
            return f"a puzzle of {len(puzzle.numbers)} numbers takes too long; at most 5 are solved"
        score, steps = judge(puzzle, case.node.answer, whole=case.node.complete)
        return Verdict(score, 0, steps)

    def price(self, case: Case, new_tokens: int) -> int:
        """Nothing: it is a rule."""
        del case, new_tokens
        return 0

    def forget(self, nodes: Sequence[Node]) -> None:
        """It keeps nothing."""


QUESTION = (
    "Join two of the numbers with + - * / and go on with what is left until only {target} is left. Write each step on "
    "a line of its own in the form `a + b = c (left: ...)`.\n"
    "Example:\nInput: 4 4 6 8\n4 + 8 = 12 (left: 4 6 12)\n6 - 4 = 2 (left: 2 12)\n2 * 12 = 24 (left: 24)\n"
    "Answer: (6 - 4) * (4 + 8) = 24\n\nInput: {numbers}"
)
"""What the policy is asked; {numbers}, {target}."""

PROPOSE = (
    "{problem}\n\nSteps so far:\n{steps}\n\nWrite {branch} different possible next steps, one a line, each in the form "
    "`a + b = c (left: ...)`, and nothing else."
)
VALUE = (
    "{problem}\n\nSteps so far:\n{steps}\n\nCan the numbers that are left still make the target, each used once? Try a "
    "few ways. End with one line: sure, likely or impossible."
)
VOTE = (
    "{problem}\n\nWhich of these beginnings is the most promising?\n{choices}\n\nCompare them. End with one line of "
    "the form `Best: N`."
)


def ask(numbers: Sequence[int], target: int = 24) -> str:
    """The prompt of a puzzle.

    >>> ask([4, 9, 10, 13]).splitlines()[-1]
    'Input: 4 9 10 13'
    """
    return QUESTION.replace("{target}", str(target)).replace("{numbers}", " ".join(map(str, numbers)))
