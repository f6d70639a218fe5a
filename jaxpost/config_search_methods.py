"""The `search` section: one frozen dataclass for each method of test-time search. Imports no jax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Greedy:
    """The most probable token, again and again."""

    kind: Literal["greedy"] = "greedy"
    max_tokens: int = 256


@dataclass(frozen=True, kw_only=True)
class BestOfN:
    """n answers, the best score wins."""

    kind: Literal["best_of_n"] = "best_of_n"
    n: int = 8
    max_tokens: int = 256


SearchMethodSection = Greedy | BestOfN
