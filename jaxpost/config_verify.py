"""The `verifier` section of a search: who judges, and how several judges become one. Imports no jax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxpost.config_rewards import RewardSection


@dataclass(frozen=True, kw_only=True)
class RuleVerifier:
    """Reward functions as the verifier. They see the problem's gold answer, so this is an oracle: for experiments."""

    kind: Literal["rule"] = "rule"
    name: str = "rule"
    weight: float = 1.0
    """In a mean."""
    reward: RewardSection = RewardSection()


VerifierPart = RuleVerifier


@dataclass(frozen=True, kw_only=True)
class VerifierSection:
    """One judge, or several composed; none where a method asks nobody."""

    parts: tuple[VerifierPart, ...] = ()
    combine: Literal["product", "mean", "min"] = "product"
    """product: of scores within [0, 1]; mean: weighted."""
