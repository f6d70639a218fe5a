"""Rewards made of rewards: the first column is the combination, the parts' columns follow under their names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from jaxpost.rewards.contract import Completion, Example, RewardFn, Rewards, name_of

Column = Float64[np.ndarray, " N"]


@dataclass(frozen=True)
class Combined:
    """A function of the parts' scores (each part's first column). An unscored part leaves the row unscored.

    Raises:
      ValueError: there are no parts, or two different parts have one name.
    """

    parts: tuple[RewardFn, ...]
    name: str = "reward"

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError(f"reward {self.name!r} has no parts")

    def formula(self, scores: Sequence[Column]) -> Column:
        """The combined score of N rows from the parts' scores."""
        raise TypeError(f"{type(self).__name__} combines nothing; define formula(scores)")

    def combine(self, parts: Sequence[Rewards]) -> Rewards:
        """The parts' columns, led by the combined one; a part's column of a name that is taken is "PART/NAME"."""
        out: Rewards = {self.name: self.formula([next(iter(part.values())) for part in parts])}
        for reward, part in zip(self.parts, parts, strict=True):
            own = name_of(reward)
            for name, column in part.items():
                shown = name
                if name == self.name:
                    shown = f"{own}/{name}"
                elif name in out and not np.array_equal(out[name], column, equal_nan=True):
                    if name == own:
                        raise ValueError(f"two rewards are named {name!r} in {self.name!r}; rename one of them")
                    shown = f"{own}/{name}"
                out[shown] = column
        return out

    def __call__(self, examples: Sequence[Example], completions: Sequence[Completion]) -> Rewards:
        return evaluate(self, lambda part: part(examples, completions))


def evaluate(reward: RewardFn, score: Callable[[RewardFn], Rewards]) -> Rewards:
    """A reward's columns when `score` gives those of each reward that is not a combination."""
    if isinstance(reward, Combined):
        return reward.combine([evaluate(part, score) for part in reward.parts])
    return score(reward)


def leaves(reward: RewardFn) -> list[RewardFn]:
    """The rewards that a combination is made of in the end, from left to right."""
    return [leaf for part in reward.parts for leaf in leaves(part)] if isinstance(reward, Combined) else [reward]


@dataclass(frozen=True)
class Sum(Combined):
    """sum_i w_i r_i; weights are 1 where none are given."""

    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights and len(self.weights) != len(self.parts):
            raise ValueError(f"reward {self.name!r}: {len(self.weights)} weights for {len(self.parts)} parts")

    def formula(self, scores: Sequence[Column]) -> Column:
        weights = np.asarray(self.weights or (1.0,) * len(scores), np.float64)
        return np.sum(weights[:, None] * np.stack(scores), axis=0)


@dataclass(frozen=True)
class Product(Combined):
    """prod_i r_i."""

    def formula(self, scores: Sequence[Column]) -> Column:
        return np.prod(np.stack(scores), axis=0)


@dataclass(frozen=True)
class Min(Combined):
    """min_i r_i."""

    def formula(self, scores: Sequence[Column]) -> Column:
        return np.min(np.stack(scores), axis=0)


@dataclass(frozen=True)
class Gate(Combined):
    """parts = (condition, value): the value where condition >= threshold, else `otherwise`."""

    threshold: float = 1.0
    otherwise: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.parts) != 2:
            raise ValueError(f"reward {self.name!r}: a gate has two parts, a condition and a value")

    def formula(self, scores: Sequence[Column]) -> Column:
        condition, value = scores
        out = np.where(condition >= self.threshold, value, self.otherwise)
        return np.where(np.isnan(condition) | np.isnan(value), np.nan, out)


@dataclass(frozen=True)
class Clip(Combined):
    """parts = (r,): r cut to [low, high]."""

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.parts) != 1 or self.low > self.high:
            raise ValueError(f"reward {self.name!r}: clip has one part and low <= high, not {self.low}, {self.high}")

    def formula(self, scores: Sequence[Column]) -> Column:
        return np.clip(scores[0], self.low, self.high)


@dataclass(frozen=True)
class Scale(Combined):
    """parts = (r,): coef * r + shift."""

    coef: float = 1.0
    shift: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.parts) != 1:
            raise ValueError(f"reward {self.name!r}: scale has one part, not {len(self.parts)}")

    def formula(self, scores: Sequence[Column]) -> Column:
        return self.coef * scores[0] + self.shift
