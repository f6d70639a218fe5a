"""Rewards that a model computes on the devices, beside the policy: their place in a combination of rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jaxpost.rewards.contract import Completion, Example, Rewards, name_of
from jaxpost.rewards.verdicts import Mode


class OffPool:
    """A reward that no worker process runs: its columns are computed elsewhere and given to `runner.Pool` as known."""

    def __call__(self, examples: Sequence[Example], completions: Sequence[Completion]) -> Rewards:
        raise TypeError(f"reward {name_of(self)!r} is computed by a model; give its columns as known")


@dataclass(frozen=True)
class ModelScore(OffPool):
    """A reward model: what scores, and how its numbers become one (`assemble.judge`)."""

    name: str = "model"
    path: tuple[str, ...] = ()
    """Folders or hub ids; several are an ensemble."""
    template: str = "{prompt}"
    members: Literal["mean", "min", "mean_std"] = "mean"
    penalty: float = 1.0
    steps: Literal["min", "last", "prod", "mean"] = "min"
    objectives: tuple[float, ...] = ()
    tokens: int = 16_384
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class JudgeScore(OffPool):
    """A model that is asked for a verdict in words (`rewards.verdicts`), here or at an address."""

    name: str = "judge"
    mode: Mode = "point"
    path: str = ""
    server: str = ""
    template: str = "{prompt}"
    low: int = 1
    high: int = 10
    criteria: tuple[str, ...] = ()
    probability: bool = True
    verdicts: int = 1
    max_tokens: int = 512
    temperature: float = 0.0
    rows: int = 32
