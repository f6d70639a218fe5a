"""Arithmetic for the lab: endless, seeded, and split so that no held-out operands are ever shown."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxpost.rewards.puzzles import Problems


class Step(NamedTuple):
    """One line of working: a operation b = value."""

    a: int
    operation: str
    b: int

    @property
    def value(self) -> int:
        return {"+": self.a + self.b, "-": self.a - self.b, "*": self.a * self.b}[self.operation]

    @property
    def text(self) -> str:
        return f"{self.a}{self.operation}{self.b}={self.value}"


class Problem(NamedTuple):
    """What is asked, the numbers in it, and the steps that lead to the answer (the last step's value)."""

    task: str
    prompt: str
    operands: tuple[int, ...]
    steps: tuple[Step, ...]

    @property
    def answer(self) -> int:
        return self.steps[-1].value

    @property
    def working(self) -> str:
        """The steps, one after another; the last number is the answer."""
        return ";".join(step.text for step in self.steps)


def _digits(rng: np.random.Generator) -> tuple[int, int]:
    """Tens and ones of a number of two digits, neither of them 0."""
    return 10 * int(rng.integers(1, 10)), int(rng.integers(1, 10))


def _apart(rng: np.random.Generator, task: str, operation: str) -> Problem:
    """a + b or a - b: tens and ones apart, then together."""
    (tens, ones), (tens_b, ones_b) = _digits(rng), _digits(rng)
    first, second = Step(tens, operation, tens_b), Step(ones, operation, ones_b)
    joined = (abs(second.value), "+" if second.value >= 0 else "-")
    a, b = tens + ones, tens_b + ones_b
    steps = (first, second, Step(first.value, joined[1], joined[0]))
    return Problem(task, f"{a}{operation}{b}", (a, b), steps)


def _sum(rng: np.random.Generator) -> Problem:
    return _apart(rng, "sum", "+")


def _difference(rng: np.random.Generator) -> Problem:
    return _apart(rng, "difference", "-")


def _product(rng: np.random.Generator) -> Problem:
    (tens, ones), b = _digits(rng), int(rng.integers(3, 10))
    steps = (Step(tens, "*", b), Step(ones, "*", b), Step(tens * b, "+", ones * b))
    return Problem("product", f"{tens + ones}*{b}", (tens + ones, b), steps)


TASKS = {"sum": _sum, "difference": _difference, "product": _product}
"""Name -> a problem drawn from a generator of random numbers."""


@lru_cache(maxsize=2**16)
def held_out(operands: tuple[int, ...], share: float) -> bool:
    """Whether these operands, in any order, belong to the held-out split: a hash decides, whatever the seed."""
    digest = hashlib.blake2b(" ".join(map(str, sorted(operands))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


@dataclass(frozen=True)
class LabProblems(Problems):
    """Sums, differences and products: problem i is a function of (seed, i).

    Numbers have no zeros, so that no step of a working, which takes tens and ones apart, is itself a problem: what is
    held out is shown nowhere.

    A row is {"prompt", "answer", "task", "operands", "completion"}; the completion is the working, or in a share
    `direct` of the rows the bare answer, which is quicker to write and less often right.
    """

    seed: int = 0
    split: Literal["train", "test"] = "train"
    tasks: tuple[str, ...] = tuple(TASKS)
    share: float = 0.2
    """Of operands that are held out."""
    direct: float = 0.5

    def __post_init__(self) -> None:
        unknown = set(self.tasks) - set(TASKS)
        if unknown or not self.tasks:
            raise ValueError(f"tasks are some of {', '.join(TASKS)}, not {', '.join(sorted(unknown)) or 'none'}")
        if not 0 < self.share < 1 or not 0 <= self.direct <= 1:
            raise ValueError(f"needs 0 < share < 1 and 0 <= direct <= 1, not {self.share} and {self.direct}")

    def problem(self, index: int) -> tuple[Problem, bool]:
        """Problem `index`, and whether its completion is the bare answer. Tasks take turns."""
        rng = np.random.default_rng((self.seed, index, ("train", "test").index(self.split)))
        draw = TASKS[self.tasks[index % len(self.tasks)]]
        while True:
            found = draw(rng)
            if held_out(found.operands, self.share) == (self.split == "test"):
                return found, bool(rng.random() < self.direct)

    def example(self, index: int) -> dict[str, Any]:
        found, direct = self.problem(index)
        return {
            "prompt": found.prompt,
            "answer": str(found.answer),
            "task": found.task,
            "operands": list(found.operands),
            "completion": str(found.answer) if direct else found.working,
        }


def distinct(problems: LabProblems, count: int) -> list[dict[str, Any]]:
    """`count` different problems in the order in which they come, equally many of each task (give or take one).

    Raises:
      ValueError: a task has hardly as many.
    """
    turns = len(problems.tasks)
    wanted = {task: len(range(place, count, turns)) for place, task in enumerate(problems.tasks)}
    found: dict[str, dict[str, Any]] = {}
    for index in range(60 * max(count, 100)):
        row = problems.example(index)
        if wanted[row["task"]] and row["prompt"] not in found:
            found[row["prompt"]] = row
            wanted[row["task"]] -= 1
            if len(found) == count:
                break
    for task, missing in wanted.items():
        if missing:
            raise ValueError(f"{missing} more different problems of the task {task} are not to be found")
    return list(found.values())
