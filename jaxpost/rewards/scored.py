"""Rewards that a model computes on the devices, beside the policy: their place in a combination of rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jaxpost.rewards.contract import Completion, Example, Rewards


@dataclass(frozen=True)
class ModelScore:
    """What scores, and how its numbers become one; no worker process runs it.

    Its columns are computed where the model is (`assemble.rewards.Judge`) and given to `runner.Pool` as known.
    """

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

    def __call__(self, examples: Sequence[Example], completions: Sequence[Completion]) -> Rewards:
        raise TypeError(f"reward {self.name!r} is computed by a model on the devices; give its columns as known")
