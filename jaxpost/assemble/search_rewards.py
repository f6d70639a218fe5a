"""A reward model as the verifier of a search: a process model keeps what it read, others read whole texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxpost.assemble.reward_scores import Encoded, Reduce, RewardModel
from jaxpost.generate.engine import Engine, Weights
from jaxpost.models import heads
from jaxpost.search.contract import Verifier
from jaxpost.search.learned import OutcomeVerifier
from jaxpost.search.process import ProcessVerifier, Written
from jaxpost.search.tree import Aggregate


def reward_verifier(
    model: RewardModel, *, how: Aggregate = "min", cache_tokens: int = 8192, page_size: int = 64, rows: int = 32
) -> Verifier:
    """Judges answers as `model` does; of a process model only what is new of a text is read.

    Args:
      how: one number of an answer's step scores.
      cache_tokens: of a process model's trees; where more is judged, texts are read again.
      rows: most texts that a process model reads together.
    """
    reduce = Reduce()
    if not model.readout.steps:
        return _outcome(model, reduce)

    def write(prompt: Any, answer: str) -> Written:
        return Written(*model.encode(prompt, answer))

    def scores(outputs: np.ndarray) -> np.ndarray:
        return reduce.by_step(model.readout.read(outputs))[0]

    pretrained = model.pretrained
    engine = Engine(
        pretrained.model,
        cache_tokens=cache_tokens,
        page_size=page_size,
        kv_dtype=pretrained.section.compute_dtype,
        mesh=pretrained.mesh,
    )
    policy = model.params["policy"]
    return ProcessVerifier(
        engine, Weights(policy, policy), head=model.params["head"], read=heads.score, write=write, scores=scores,
        how=how, rows=rows,
    )  # fmt: skip


def _outcome(model: RewardModel, reduce: Reduce) -> OutcomeVerifier:
    def write(prompt: Any, answer: str) -> tuple[Encoded, int]:
        encoded = model.encode(prompt, answer)
        return encoded, len(encoded.tokens)

    def score(encoded: Sequence[Encoded]) -> list[float]:
        return [reduce(found)[0] for found in model.scores(encoded)]

    return OutcomeVerifier(write, score)
