"""Every algorithm that a preset can name finds the known optimum of a bandit and of a small decision process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from toy_online import LETTERS, PROMPT, VOCAB, first_table, log_policy, probability, records, scored_by, toy_config, toy_job
from toy_online import table_of, train as train_table

from jaxpost.config_rl import (
    CISPOLoss,
    CriticSection,
    GAEAdvantage,
    GRPOAdvantage,
    GSPOLoss,
    KLSection,
    LearnerSection,
    MaskedCorrection,
    OnlineSection,
    PPOLoss,
    ProcessAdvantage,
    ReinforceAdvantage,
    ReinforceLoss,
    ReinforcePlusPlusAdvantage,
    ReMaxAdvantage,
    RLOOAdvantage,
    RolloutSection,
    TruncatedCorrection,
)
from jaxpost.train.online import run_online


@pytest.fixture(autouse=True, scope="module")
def quick_compiler() -> Iterator[None]:
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


BANDIT, PROCESS = (4,), (1, 4)
"""Prompts: "?" pays for an answer that begins with b, "a?" for the answer ba and no other."""


def pay(example: Any, completion: Any) -> float:
    right = completion.text[:1] == "b" if len(example["prompt"]) == 1 else completion.text == "ba"
    return float(right)


def pay_steps(example: Any, completion: Any) -> float:
    """The same for an answer in part: what begins right is worth half."""
    return max(pay(example, completion), 0.5 * (completion.text[:1] == "b"))


ROLLOUT = RolloutSection(prompts=8, samples=8, max_tokens=2)
ONE, TWO = LearnerSection(microbatch_rows=8), LearnerSection(microbatch_rows=4, minibatches=2)
PASSES = LearnerSection(microbatch_rows=4, minibatches=2, epochs=2)
REINFORCE = ReinforceLoss()
EARLY = replace(ROLLOUT, overlap=1)

ALGORITHMS: dict[str, dict[str, Any]] = {
    "reinforce": {"advantage": ReinforceAdvantage(baseline="none"), "loss": REINFORCE},
    "reinforce, batch mean": {"advantage": ReinforceAdvantage(baseline="batch_mean"), "loss": REINFORCE},
    "reinforce, running mean": {"advantage": ReinforceAdvantage(decay=0.8), "loss": REINFORCE},
    "rloo": {"advantage": RLOOAdvantage(), "loss": ReinforceLoss(aggregate="sequence_mean")},
    "remax": {"advantage": ReMaxAdvantage(), "loss": REINFORCE},
    "reinforce++": {
        "advantage": ReinforcePlusPlusAdvantage(),
        "kl": KLSection(coef=0.01, where="reward", estimator="k1"),
        "learner": TWO,
    },
    "reinforce++ baseline": {
        "advantage": ReinforcePlusPlusAdvantage(group_baseline=True),
        "kl": KLSection(coef=0.01, estimator="k2"),
    },
    "grpo": {
        "loss": PPOLoss(aggregate="sequence_mean"),
        "kl": KLSection(coef=0.01),
        "rollout": replace(ROLLOUT, uninformative="count"),
    },
    "grpo, batch deviation, two passes": {"advantage": GRPOAdvantage(scale="batch"), "learner": PASSES},
    "grpo process": {"advantage": ProcessAdvantage(separator="b")},
    "dr_grpo": {
        "advantage": GRPOAdvantage(scale="none"),
        "loss": PPOLoss(aggregate="constant_mean"),
        "rollout": replace(ROLLOUT, uninformative="count"),
    },
    "dapo": {
        "loss": PPOLoss(clip_high=0.28, truncated="keep"),
        "rollout": replace(ROLLOUT, max_refills=2),
        "learner": TWO,
    },
    "gspo": {"loss": GSPOLoss(aggregate="sequence_mean", clip_low=0.2, clip_high=0.27), "learner": TWO},
    "cispo": {"loss": CISPOLoss(), "learner": TWO},
    "cispo, both sides": {"loss": CISPOLoss(sides="both", clip_low=0.5, clip_high=0.5), "learner": TWO},
    "ppo, head": {"advantage": GAEAdvantage(), "critic": CriticSection(clip=None), "learner": TWO},
    "ppo, separate critic": {
        "advantage": GAEAdvantage(trace=0.9, whiten=False),
        "critic": CriticSection(network="separate", coef=1.0),
        "learner": PASSES,
    },
    "truncated correction": {"rollout": EARLY, "correction": TruncatedCorrection()},
    "masked correction": {
        "rollout": EARLY,
        "correction": MaskedCorrection(level="sequence_mean", low=0.2, high=5.0),
        "loss": REINFORCE,
    },
    "sampler's ratios": {"rollout": EARLY, "learner": replace(ONE, old_logprobs="sampler")},
    "entropy bonus": {"loss": PPOLoss(entropy_coef=0.003)},
    "two-sided clip": {"loss": PPOLoss(dual_clip=3.0), "learner": PASSES},
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_finds_the_optimum(name: str, tmp_path: Path) -> None:
    sections = {"rollout": ROLLOUT, "learner": ONE, "train": OnlineSection(steps=36, save_every=0), **ALGORITHMS[name]}
    score = scored_by(pay_steps if "process" in name else pay)
    table = train_table(toy_config(tmp_path, **sections), score, prompts=(BANDIT, PROCESS))
    assert np.exp(log_policy(table, BANDIT))[LETTERS.index("b")] > 0.9
    assert probability(table, "ba", PROCESS) > 0.9
