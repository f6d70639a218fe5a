"""What a reward is: a function from examples and completions to named columns of numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64

Example = Mapping[str, Any]
"""One row of the prompts' data: the reference answer, a puzzle's numbers ..."""

Rewards = dict[str, Float64[np.ndarray, " N"]]
"""Named columns, one number a completion; NaN is "unscored". The first column is the score, the others are what it is
made of, so that a report can show them."""


@runtime_checkable
class Completion(Protocol):
    """What rewards read of a sample: `generate.batching.Completion` has it, and `Sample` is the least that does."""

    @property
    def text(self) -> str: ...
    @property
    def tokens(self) -> Sequence[int]: ...
    @property
    def finish(self) -> str: ...


class Sample(NamedTuple):
    """A completion with nothing but what rewards read."""

    text: str
    tokens: tuple[int, ...] = ()
    finish: str = "stop"


@runtime_checkable
class RewardFn(Protocol):
    """rewards(examples, completions) -> columns of N numbers; examples[i] is the row that completions[i] answers."""

    def __call__(self, examples: Sequence[Example], completions: Sequence[Completion]) -> Rewards: ...


class RowReward:
    """A reward of one row at a time: subclasses are frozen dataclasses with a `name` and a `row` method.

    Being dataclasses, they are compared, printed and sent to worker processes by their fields.
    """

    def prepare(self) -> None:
        """What takes long or may be missing, before the first row; a worker of `runner.Pool` calls it once."""

    def row(self, example: Example, completion: Completion) -> float:
        """The score of one completion."""
        raise TypeError(f"{type(self).__name__} scores no rows; define row(example, completion)")

    def __call__(self, examples: Sequence[Example], completions: Sequence[Completion]) -> Rewards:
        if len(examples) != len(completions):
            raise ValueError(f"reward {name_of(self)!r}: {len(examples)} examples for {len(completions)} completions")
        scores = [self.row(example, completion) for example, completion in zip(examples, completions, strict=True)]
        return {name_of(self): np.asarray(scores, np.float64)}


def name_of(reward: RewardFn) -> str:
    """A simple reward's name: its own, or its function's."""
    return str(getattr(reward, "name", None) or getattr(reward, "__name__", type(reward).__name__))


def absent(value: Any) -> bool:
    """Whether nothing is given: no value, no text but spaces, or a list of such; no answer could ever equal it.

    >>> absent(None), absent(" "), absent([""]), absent(0), absent(["", "4"])
    (True, True, True, False, False)
    """
    if isinstance(value, list | tuple):
        return all(map(absent, value))
    return value is None or (isinstance(value, str) and not value.strip())


def field(example: Example, key: str, name: str) -> Any:
    """example[key], or a sentence that says which keys there are.

    Raises:
      ValueError: the example has no such key, or nothing under it.
    """
    value = example.get(key)
    if absent(value):
        if key in example:
            raise ValueError(f"reward {name!r} needs {key!r} in each example; this one has nothing under it: {value!r}")
        raise ValueError(f"reward {name!r} needs {key!r} in each example; this one has {sorted(example)}")
    return value
