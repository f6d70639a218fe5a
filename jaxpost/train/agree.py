"""What one process found out, told to all."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxpost.rewards.contract import Completion, Example
from jaxpost.rewards.runner import Problem, Scored


def told(found: Any) -> Any:
    """Process 0's JSON value on every process; all of them must call it, at the same place of the program."""
    if jax.process_count() == 1:
        return found
    data = np.frombuffer(json.dumps(found).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    padded = np.zeros(size, np.uint8)
    padded[: min(size, data.size)] = data[:size]
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))))


def scored_once(score: Callable[..., Scored]) -> Callable[..., Scored]:
    """A reward that process 0 computes and tells the others: rewards need not be deterministic."""

    def shared(examples: Sequence[Example], completions: Sequence[Completion]) -> Scored:
        if jax.process_count() == 1:
            return score(examples, completions)
        found = None
        if jax.process_index() == 0:
            result = score(examples, completions)
            columns = {name: [repr(float(x)) for x in column] for name, column in result.rewards.items()}
            found = [columns, [list(problem) for problem in result.problems]]
        columns, problems = told(found)
        rewards = {name: np.array([float(x) for x in column], np.float64) for name, column in columns.items()}
        return Scored(rewards, tuple(Problem(*problem) for problem in problems))

    return shared
