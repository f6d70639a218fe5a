"""What rewards say of the reference answers themselves: a wrong column or key shows before anything is trained."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxpost.assemble.prompts import Placed
from jaxpost.rewards.answers import MathAnswer, MultipleChoice, reference_of
from jaxpost.rewards.code import CodeTests
from jaxpost.rewards.combine import leaves
from jaxpost.rewards.contract import Example, RewardFn, Sample, absent, field, name_of
from jaxpost.rewards.functions import FromFile
from jaxpost.rewards.gym import GymAnswer
from jaxpost.rewards.puzzles import Reaches, solve
from jaxpost.rewards.style import TargetLength
from jaxpost.rewards.verify import MathVerify

SCORED = 64
"""Reference answers that are scored before a run starts; that there is one is looked up in every row."""
SHOWN = 3
SOLVED = (4, 8)
"""Puzzles of at most so many numbers are solved for a reference, and so many of them: the search is exhaustive."""


@dataclass(frozen=True)
class Verdict:
    """What one reward says of reference answers."""

    name: str
    keys: tuple[str, ...]
    """Fields of an example that it reads; () where a user's function reads what it likes."""
    scores: np.ndarray
    """One a problem; NaN where it raised."""
    places: tuple[str, ...]
    """Where those problems stand."""
    full: float | None
    """What a reference answer must score; None: not known."""
    fault: str | None = None
    """What the first row that raised said."""

    @property
    def short(self) -> list[str]:
        """Places of the references that do not score full."""
        if self.full is None:
            return []
        return [where for where, score in zip(self.places, self.scores, strict=True) if not score >= self.full]


def judge(reward: RewardFn, problems: Sequence[Placed], *, functions: bool = False) -> Iterator[Verdict]:
    """Every simple reward that reads the example, on answers that say the reference in the form that it asks for.

    Args:
      functions: also run users' functions, in this process; their answer says example["answer"].
    """
    for leaf in leaves(reward):
        found = _reads(leaf)
        if found is None and not (functions and isinstance(leaf, FromFile)):
            continue
        keys, answer = found or ((), _plain)
        scores, fault = [], None
        for placed in (judged := _judged(leaf, problems)):
            example = placed.problem.example
            try:
                scores.append(float(next(iter(leaf([example], [answer(leaf, example)]).values()))[0]))
            except Exception as error:  # a user's function may raise anything; it is told, not hidden
                scores.append(float("nan"))
                fault = fault or f"{placed.where}: {type(error).__name__}: {error}"
        # Of code there is no reference; that its tests can be read shows without a program, which scores 0.
        full = None if isinstance(leaf, FromFile) else 0.0 if isinstance(leaf, TargetLength | CodeTests) else 1.0
        places = tuple(placed.where for placed in judged)
        yield Verdict(name_of(leaf), keys, np.asarray(scores), places, full, fault)


def check_references(reward: RewardFn, problems: Sequence[Placed], *, key: str) -> None:
    """Nothing, if every row has what the rewards read and their reference answers can be right.

    Args:
      problems: in the order of their files.
      key: of the prompts' section, for the message.

    Raises:
      ValueError: rows without a reference, by file and line; or a reward for which no reference answer is right.
    """
    for leaf in leaves(reward):
        found = _reads(leaf)
        for name in found[0] if found else ():
            _check_field(name_of(leaf), name, problems, key)
    for verdict in judge(reward, problems[:SCORED]):
        if len(verdict.scores) and len(verdict.short) == len(verdict.scores):
            first = problems[0]
            what = ", ".join(f"{k} {str(first.problem.example.get(k))[:80]!r}" for k in verdict.keys)
            raise ValueError(
                f"{key}: reward {verdict.name!r} gives none of the first {len(verdict.scores)} reference answers full "
                f"marks, so it can teach nothing; {first.where} has {what}"
                + (f" ({verdict.fault})" if verdict.fault else "")
                + f". Say which column holds the reference: {key}.sources.0.columns '{{{verdict.keys[0]}: COLUMN}}', "
                "or the reward's key"
            )


def _judged(leaf: RewardFn, problems: Sequence[Placed]) -> Sequence[Placed]:
    if not isinstance(leaf, Reaches):
        return problems
    return [p for p in problems if len(p.problem.example.get("numbers", ())) <= SOLVED[0]][: SOLVED[1]]


def _check_field(reward: str, name: str, problems: Sequence[Placed], key: str) -> None:
    missing = [placed for placed in problems if absent(placed.problem.example.get(name))]
    if not missing:
        return
    has = [str(k) for k in missing[0].problem.example if k != "prompt"]
    near = difflib.get_close_matches(name, has, 1)
    where = ", ".join(placed.where for placed in missing[:SHOWN]) + (" ..." if len(missing) > SHOWN else "")
    what = f"map one with {key}.sources.0.columns '{{{name}: {near[0] if near else 'COLUMN'}}}'"
    raise ValueError(
        f"{where}: reward {reward!r} needs {name!r}, which {len(missing)} of {len(problems)} rows lack (they have "
        f"{', '.join(has) or 'nothing else'}); "
        + (what if len(missing) == len(problems) else "give them one or take the rows out")
    )


Answer = Callable[[Any, Example], Sample]


def _reads(leaf: RewardFn) -> tuple[tuple[str, ...], Answer] | None:
    """Fields that a reward reads, and an answer that says the reference; None for rewards of form alone."""
    if isinstance(leaf, MathAnswer | MathVerify):
        return (leaf.key,), _mathematics
    if isinstance(leaf, MultipleChoice):
        return (leaf.key,), _choice
    if isinstance(leaf, Reaches):
        return ("numbers",), _expression
    if isinstance(leaf, TargetLength):
        return (leaf.key,), _length
    if isinstance(leaf, CodeTests):
        return (leaf.key,), lambda leaf, example: Sample("")
    if isinstance(leaf, GymAnswer):
        return ("answer", "task"), lambda leaf, example: Sample(f"<answer>{example['answer']}</answer>")
    return None


FORMS: Mapping[str, str] = {
    "tag": "<answer>{}</answer>",
    "boxed": "\\boxed{{{}}}",
    "hash": "#### {}",
    "phrase": "The answer is {}",
    "number": "{}",
}


def _mathematics(leaf: MathAnswer | MathVerify, example: Example) -> Sample:
    gold = field(example, leaf.key, leaf.name)
    gold = gold[0] if isinstance(gold, list | tuple) else gold
    return Sample(FORMS[leaf.sources[0]].format(reference_of(gold)))


def _choice(leaf: MultipleChoice, example: Example) -> Sample:
    gold = field(example, leaf.key, leaf.name)
    letter = leaf.letters[gold] if isinstance(gold, int) and 0 <= gold < len(leaf.letters) else str(gold).strip("() ")
    return Sample(f"The answer is ({letter})")


def _expression(leaf: Reaches, example: Example) -> Sample:
    numbers = tuple(int(number) for number in field(example, "numbers", leaf.name))
    return Sample(f"<answer>{solve(numbers, int(example.get('target', 24))) or ''}</answer>")


def _length(leaf: TargetLength, example: Example) -> Sample:
    return Sample("", (0,) * int(field(example, leaf.key, leaf.name)))


def _plain(leaf: RewardFn, example: Example) -> Sample:
    return Sample(str(example.get("answer", "")))
