"""Pairs of the lab model's own answers to one problem, one right and one wrong, as arithmetic finds them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxpost.generate.samples import Completion
from jaxpost.recipes.lab.model import REWARD
from jaxpost.recipes.lab.search.samples import write_lines

Draw = Callable[[Sequence[dict[str, Any]], Sequence[int]], list[Completion]]
"""(problems, their numbers in the noise) -> as many completions of each, those of one problem together."""
TOGETHER = 64
"""Problems that are asked at a time."""


def pairs_of(problem: dict[str, Any], found: Sequence[Completion], *, most: int, rng: Any) -> list[dict[str, str]]:
    """Right answers each with a wrong one, no answer in two pairs, up to `most` of them.

    Answers that were cut off are left out: as training text they would have an end that was never drawn.
    """
    scores = REWARD([problem] * len(found), list(found))[REWARD.name]
    sides: dict[bool, dict[str, None]] = {True: {}, False: {}}
    for answer, score in zip(found, scores, strict=True):
        if answer.finish == "stop" and answer.text.strip():
            sides[bool(score)][answer.text] = None
    right, wrong = ([list(side)[i] for i in rng.permutation(len(side))] for side in (sides[True], sides[False]))
    return [
        {"prompt": problem["prompt"], "chosen": good, "rejected": bad}
        for good, bad in zip(right[:most], wrong[:most], strict=False)
    ]


def write_pairs(
    path: Path, problems: Sequence[dict[str, Any]], draw: Draw, *, count: int | None, most: int, answers: int, seed: int
) -> Path:
    """A file of pairs; one that is there is kept.

    Args:
      problems: asked in an order of the seed until there are `count` pairs; None: all.
      draw: completions, `answers` of each problem.

    Raises:
      ValueError: the problems give fewer pairs.
    """
    if path.is_file():
        return path
    rng = np.random.default_rng((seed, 5))
    order, rows = rng.permutation(len(problems)).tolist(), []
    for begin in range(0, len(order), TOGETHER):
        numbers = order[begin : begin + TOGETHER]
        found = draw([problems[n] for n in numbers], numbers)
        for place, number in enumerate(numbers):
            own = found[place * answers : (place + 1) * answers]
            rows += pairs_of(problems[number], own, most=most, rng=rng)
        if count is not None and len(rows) >= count:
            break
    if not rows or (count is not None and len(rows) < count):
        raise ValueError(
            f"{answers} answers to each of {len(problems)} problems make {len(rows)} pairs, {count} are wanted; ask "
            "for fewer pairs, or for more answers to a problem"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_lines(path, rows[:count])
    return path
