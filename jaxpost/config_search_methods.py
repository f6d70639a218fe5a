"""The `search` section: one frozen dataclass for each method of test-time search. Imports no jax.

A section has the keyword parameters of the function in `jaxpost.search` that its kind names, with the same defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Choice = Literal["best", "weighted", "majority"]
Aggregate = Literal["last", "min", "prod", "mean"]


@dataclass(frozen=True, kw_only=True)
class Greedy:
    """The most probable token, again and again."""

    kind: Literal["greedy"] = "greedy"
    max_tokens: int = 256


@dataclass(frozen=True, kw_only=True)
class Samples:
    """n answers, drawn; the first one counts."""

    kind: Literal["sample"] = "sample"
    n: int = 1
    max_tokens: int = 256


@dataclass(frozen=True, kw_only=True)
class BestOfN:
    """n answers, the best score wins (2110.14168), or the answer whose scores sum to most (2206.02336)."""

    kind: Literal["best_of_n"] = "best_of_n"
    n: int = 16
    max_tokens: int = 256
    choose: Choice = "best"
    aggregate: Aggregate | None = None
    """One number for the scores of steps; None: the verifier's own."""


@dataclass(frozen=True, kw_only=True)
class SelfConsistency:
    """A vote of n answers (2203.11171): counted, weighted, or of the confident ones alone (DeepConf, 2508.15260)."""

    kind: Literal["self_consistency"] = "self_consistency"
    n: int = 16
    max_tokens: int = 256
    weights: Literal["count", "score", "confidence"] = "count"
    measure: Literal["mean", "bottom", "lowest", "tail"] = "mean"
    window: int = 64
    keep: float = 1.0
    early_stop: bool = False
    wave: int = 4


@dataclass(frozen=True, kw_only=True)
class StepBeam:
    """Beam search over steps: of `width` texts the best width / factor go on (2408.03314)."""

    kind: Literal["step_beam"] = "step_beam"
    width: int = 16
    factor: int = 4
    max_steps: int = 40
    max_tokens: int = 128
    """Of one step."""
    separator: str = "\n\n"
    """Text that ends a step."""
    lookahead: int = 0
    """Further steps that are drawn, greedily, to score a step; they are thrown away."""
    aggregate: Aggregate | None = None
    choose: Choice = "best"


@dataclass(frozen=True, kw_only=True)
class DVTS:
    """width / factor independent step beams that keep one text each."""

    kind: Literal["dvts"] = "dvts"
    width: int = 16
    factor: int = 4
    max_steps: int = 40
    max_tokens: int = 128
    separator: str = "\n\n"
    lookahead: int = 0
    aggregate: Aggregate | None = None
    choose: Choice = "best"


@dataclass(frozen=True, kw_only=True)
class Rebase:
    """`width` children a round, dealt to the open texts by softmax of their scores (2408.00724)."""

    kind: Literal["rebase"] = "rebase"
    width: int = 16
    temperature: float = 0.2
    max_steps: int = 40
    max_tokens: int = 128
    separator: str = "\n\n"
    lookahead: int = 0
    aggregate: Aggregate | None = None
    choose: Choice = "weighted"


SearchMethodSection = Greedy | Samples | BestOfN | SelfConsistency | StepBeam | DVTS | Rebase
