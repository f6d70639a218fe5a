"""Whether answers are right, where that is known: for the report alone, no search sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxpost.assemble.rewards import make_pool
from jaxpost.config_rewards import RewardSection
from jaxpost.rewards.answers import MathAnswer
from jaxpost.rewards.contract import Sample
from jaxpost.rewards.puzzles import Reaches
from jaxpost.rewards.runner import Pool
from jaxpost.search.contract import Candidate


class Gold:
    """gold(row of the problem, candidates) -> for each whether it is right, None where that cannot be said."""

    def __init__(self, section: RewardSection | None):
        self._pool: Pool | None = None if section is None else make_pool(section, key="gold")
        self.faults: list[str] = []

    def __call__(self, example: Mapping[str, Any], candidates: Sequence[Candidate]) -> list[bool | None]:
        if not candidates:
            return []
        samples = [_sample(candidate) for candidate in candidates]
        if self._pool is not None:
            scored = self._pool([example] * len(samples), samples)
            self.faults += [str(problem) for problem in scored.problems]
            scores = next(iter(scored.rewards.values()))
            return [None if np.isnan(score) else bool(score >= 1.0) for score in scores]
        rule = (
            Reaches() if example.get("numbers") else MathAnswer() if example.get("answer") not in (None, "") else None
        )
        if rule is None:
            return [None] * len(samples)
        try:
            return [rule.row(example, sample) >= 1.0 for sample in samples]
        except (ValueError, TypeError) as error:
            self.faults.append(str(error))
            return [None] * len(samples)

    def close(self) -> None:
        """Ends the worker processes."""
        if self._pool is not None:
            self._pool.close()


def _sample(candidate: Candidate) -> Sample:
    node = candidate.node
    if node is None:
        return Sample(candidate.text)
    tokens = tuple(token for piece in node.path for token in piece.tokens)
    return Sample(candidate.text, tokens, "stop" if node.complete else "length")
