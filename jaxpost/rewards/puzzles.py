"""Puzzles with exact checkers, and endless generators of them: problem i is a function of (seed, i)."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from jaxpost.rewards.answers import MAX_READ, after_thinking, boxes
from jaxpost.rewards.contract import Completion, Example, RowReward, field
from jaxpost.text.arithmetic import BadExpression, evaluate


@dataclass(frozen=True)
class Reaches(RowReward):
    """1 if the stated expression has the value example["target"] (24 where it has none) and uses example["numbers"].

    The expression stands between the last <answer> tags, in the last box, or is the last line with text; "= target"
    may follow it. It is parsed, never run, and worked out in fractions.
    """

    use: Literal["all", "some"] = "all"
    """Each number exactly once, or at most once."""
    name: str = "reaches"

    def row(self, example: Example, completion: Completion) -> float:
        available = Counter(Fraction(number) for number in field(example, "numbers", self.name))
        target = Fraction(example.get("target", 24))
        left, equals, right = stated(completion.text).strip(" *`.").partition("=")
        try:
            value, numbers = evaluate(left)
            if value != target or (equals and evaluate(right).value != target):
                return 0.0
        except BadExpression:
            return 0.0
        used = Counter(numbers)
        return float(used == available if self.use == "all" else used <= available)


def stated(text: str) -> str:
    """The expression that a text states, after its thinking."""
    text = after_thinking(text)[-MAX_READ:]
    if "</answer>" in text and "<answer>" in (before := text.rpartition("</answer>")[0]):
        text = before.rpartition("<answer>")[2]
    elif found := boxes(text):
        text = found[-1]
    else:
        lines = [line for line in text.splitlines() if line.strip()]
        text = re.sub(r"^\s*(?:the\s+)?(?:final\s+)?answer(?:\s+is)?\s*:?", "", lines[-1] if lines else "", flags=re.I)
    return text.replace("\\times", "*").replace("\\cdot", "*").replace("\\div", "/").replace("$", "").strip()


@lru_cache(maxsize=4096)
def solve(numbers: tuple[int | Fraction, ...], target: int | Fraction = 24) -> str | None:
    """An expression of + - * / that uses each number once and has this value, or None: exhaustive, in fractions.

    >>> solve((1, 1, 1, 1)) is None, evaluate(solve((3, 3, 8, 8))).value
    (True, Fraction(24, 1))
    """
    named = [(Fraction(x), str(x) if Fraction(x).denominator == 1 else f"({x})") for x in numbers]
    return _solve(named, Fraction(target))


def _solve(items: list[tuple[Fraction, str]], target: Fraction) -> str | None:
    """Joins any two of the items and goes on with one less."""
    if len(items) == 1:
        return items[0][1] if items[0][0] == target else None
    for i in range(len(items)):
        for j in range(i):
            (a, x), (b, y) = items[i], items[j]
            rest = [item for k, item in enumerate(items) if k not in (i, j)]
            joined = [
                (a + b, f"({x} + {y})"),
                (a * b, f"({x} * {y})"),
                (a - b, f"({x} - {y})"),
                (b - a, f"({y} - {x})"),
            ]
            joined += [(a / b, f"({x} / {y})")] if b else []
            joined += [(b / a, f"({y} / {x})")] if a else []
            for item in joined:
                if found := _solve([*rest, item], target):
                    return found
    return None


class Problems:
    """Endless problems: subclasses are frozen dataclasses with a `seed` and `example(index)`."""

    def example(self, index: int) -> dict[str, Any]:
        """Problem `index`, the same whenever it is asked for."""
        raise TypeError(f"{type(self).__name__} makes no problems; define example(index)")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        index = 0
        while True:
            yield self.example(index)
            index += 1


@dataclass(frozen=True)
class Arithmetic(Problems):
    """a + b, a - b, a * b with operands low .. high: {"prompt", "answer", "operands", "operation"}.

    A share `held_out` of the unordered pairs of operands belongs to the split "test", the rest to "train", whatever
    the seed and operation, so no test problem is a training problem turned around.
    """

    seed: int = 0
    low: int = 1
    high: int = 50
    operations: str = "+-"
    split: Literal["all", "train", "test"] = "all"
    held_out: float = 0.1
    negative: bool = True
    """Whether a - b may be below 0; if not, the larger operand comes first."""

    def __post_init__(self) -> None:
        if self.low > self.high or not self.operations or set(self.operations) - set("+-*"):
            raise ValueError(f"needs low <= high and some of '+-*', not {self.low}, {self.high}, {self.operations!r}")
        pairs = ((a, b) for a in range(self.low, self.high + 1) for b in range(self.low, a + 1))
        if self.split != "all" and not any(self._has(a, b) for a, b in pairs):
            raise ValueError(f"no pair of {self.low} .. {self.high} is in the split {self.split!r}; see held_out")

    def _has(self, a: int, b: int) -> bool:
        if self.split == "all":
            return True
        digest = hashlib.blake2b(f"{min(a, b)} {max(a, b)}".encode(), digest_size=8).digest()
        return (int.from_bytes(digest, "big") < self.held_out * 2**64) == (self.split == "test")

    def example(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng((self.seed, index, 1))
        while True:
            a, b = (int(x) for x in rng.integers(self.low, self.high + 1, 2))
            if self._has(a, b):
                break
        operation = self.operations[int(rng.integers(len(self.operations)))]
        if operation == "-" and not self.negative:
            a, b = max(a, b), min(a, b)
        answer = {"+": a + b, "-": a - b, "*": a * b}[operation]
        prompt = f"What is {a} {operation} {b}?"
        return {"prompt": prompt, "answer": str(answer), "operands": [a, b], "operation": operation}


@dataclass(frozen=True)
class Game24(Problems):
    """Four numbers 1 .. high from which + - * / make 24: {"prompt", "numbers", "target"}; each has a solution."""

    seed: int = 0
    high: int = 13

    def __post_init__(self) -> None:
        if self.high < 4:  # 1 2 3 4 is the first that has one
            raise ValueError(f"high = {self.high}: at least 4, or there may be no problem at all")

    def example(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng((self.seed, index, 24))
        while True:
            numbers = tuple(sorted(int(x) for x in rng.integers(1, self.high + 1, 4)))
            if solve(numbers):
                return {"prompt": _ask(numbers, 24), "numbers": list(numbers), "target": 24}


@dataclass(frozen=True)
class Countdown(Problems):
    """Numbers and a target that + - * / over all of them reach: {"prompt", "numbers", "target"}.

    The target is the value of an expression drawn at random whose steps are all whole numbers >= 0, so each problem
    has a solution; targets are low .. high.
    """

    seed: int = 0
    count: int = 4
    largest: int = 50
    low: int = 10
    high: int = 100

    def __post_init__(self) -> None:
        if self.count < 2 or not self.low <= self.largest or not 0 < self.low <= self.high:
            raise ValueError(f"needs count >= 2 and 0 < low <= high, low <= largest, not {self}")

    def example(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng((self.seed, index, 100))
        while True:
            numbers = [int(x) for x in rng.integers(1, self.largest + 1, self.count)]
            target = self._reach(rng, numbers)
            if self.low <= target <= self.high:
                return {"prompt": _ask(numbers, target), "numbers": numbers, "target": target}

    @staticmethod
    def _reach(rng: np.random.Generator, numbers: Sequence[int]) -> int:
        """The value of a random expression of all the numbers."""
        left = list(numbers)
        while len(left) > 1:
            a, b = (left.pop(int(rng.integers(len(left)))) for _ in range(2))
            steps = [a + b, abs(a - b), a * b]
            if min(a, b) > 0 and max(a, b) % min(a, b) == 0:
                steps.append(max(a, b) // min(a, b))
            left.append(steps[int(rng.integers(len(steps)))])
        return left[0]


def _ask(numbers: Sequence[int], target: int) -> str:
    return (
        f"Use each of the numbers {', '.join(map(str, numbers))} exactly once, with +, -, *, / and parentheses, "
        f"to make {target}. Give the expression in <answer> </answer>."
    )
