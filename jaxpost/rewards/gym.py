"""Problems of the package reasoning-gym, with scorers of our own.

Several of the package's own scorers run the model's answer as Python or give nonsense credit, so none is ever called:
only tasks with one right answer are taken, and answers are compared here.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from jaxpost.rewards.answers import final_answer
from jaxpost.rewards.contract import Completion, Example, RowReward, field
from jaxpost.rewards.latex import equal
from jaxpost.rewards.puzzles import Problems, stated

Kind = Literal["number", "text"]
_NUMBERS = (
    "aiw", "basic_arithmetic", "binary_alternation", "chain_sum", "count_bits", "count_primes", "dice", "gcd",
    "largest_island", "lcm", "leg_counting", "letter_counting", "number_sequence", "products",
    "rotten_oranges", "self_reference", "simple_equations",
)  # fmt: skip
_TEXTS = (
    "base_conversion", "bitwise_arithmetic", "caesar_cipher", "course_schedule", "family_relationships",
    "isomorphic_strings", "needle_haystack", "ransom_note", "spell_backward", "string_manipulation",
    "string_splitting", "syllogism",
)  # fmt: skip
TASKS: dict[str, Kind] = {**dict.fromkeys(_NUMBERS, "number"), **dict.fromkeys(_TEXTS, "text")}
"""The tasks that can be used, with how their answers are compared."""
ENDLESS = 2**30


@dataclass(frozen=True)
class GymProblems(Problems):
    """Endless problems of one task: {"prompt", "answer", "task"}; problem i of seed s is the package's for s + i.

    So seeds that lie closer together than the problems that are used share problems.

    Raises:
      ValueError: the task is not in TASKS.
      ModuleNotFoundError: reasoning-gym is not installed.
    """

    task: str
    seed: int = 0

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(
                f"the task {self.task!r} has no safe scorer here; choose one of {', '.join(sorted(TASKS))}"
            )
        if importlib.util.find_spec("reasoning_gym") is None:
            raise ModuleNotFoundError(f"the task {self.task!r} needs reasoning-gym: pip install 'jaxpost[gym]'")

    @property
    def version(self) -> str:
        """Of the package: another may make other problems of a seed."""
        return importlib.metadata.version("reasoning-gym")

    def example(self, index: int) -> dict[str, Any]:
        entry = _dataset(self.task, self.seed)[index]
        return {"prompt": str(entry["question"]), "answer": str(entry["answer"]), "task": self.task}


@lru_cache(maxsize=64)
def _dataset(task: str, seed: int) -> Any:
    return importlib.import_module("reasoning_gym").create_dataset(task, size=ENDLESS, seed=seed)


@dataclass(frozen=True)
class GymAnswer(RowReward):
    """1 if the final answer is the one of the problem, else 0.

    Numbers are read as in `answers.MathAnswer`; texts stand between the last <answer> tags, in the last box, or on the
    last line, and case, quotes and space around words are no matter.

    Raises (a row, when it is scored):
      ValueError: the example's task is not in TASKS, or it has no answer.
    """

    name: str = "gym"

    def row(self, example: Example, completion: Completion) -> float:
        gold, task = str(field(example, "answer", self.name)), field(example, "task", self.name)
        if task not in TASKS:
            raise ValueError(f"reward {self.name!r}: the task {task!r} has no safe scorer here")
        if TASKS[task] == "number":
            answer = final_answer(completion.text)
            return float(answer is not None and equal(gold, answer))
        return float(plain(stated(completion.text)) == plain(gold))


def plain(text: str) -> str:
    """A text without case, quotes around it, a full stop at its end, and more than one space between words.

    >>> plain(' "THE  End." ')
    'the end'
    """
    return " ".join(text.strip().strip("\"'`").rstrip(".").casefold().split())
