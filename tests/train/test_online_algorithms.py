"""Every algorithm that a preset can name finds the known optimum of a bandit and of a small decision process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_online import (
    LETTERS,
    PROMPT,
    VOCAB,
    first_table,
    log_policy,
    probability,
    scored_by,
    table_of,
    toy_config,
    toy_job,
)
from toy_online import train as train_table

from jaxpost.config_policy_losses import (
    CISPOLoss,
    GMPOLoss,
    GSPOLoss,
    OnlinePreferenceLoss,
    PPOLoss,
    ReinforceLoss,
    SAPOLoss,
)
from jaxpost.config_preference_losses import DPOLoss, XPOLoss
from jaxpost.config_rl import (
    BestWorst,
    CriticSection,
    GAEAdvantage,
    GDPOAdvantage,
    GRPOAdvantage,
    KLSection,
    LearnerSection,
    MaskedCorrection,
    NashAdvantage,
    OnlineSection,
    OPOAdvantage,
    ProcessAdvantage,
    ReinforceAdvantage,
    ReinforcePlusPlusAdvantage,
    ReMaxAdvantage,
    RLOOAdvantage,
    RolloutSection,
    TruncatedCorrection,
)
from jaxpost.config_rollout import ReferenceOpponent
from jaxpost.train.online import run_online

BANDIT, PROCESS = (4,), (1, 4)
"""Prompts: "?" pays for an answer that begins with b, "a?" for the answer ba and no other."""


def pay(example: Any, completion: Any) -> float:
    right = completion.text[:1] == "b" if len(example["prompt"]) == 1 else completion.text == "ba"
    return float(right)


def pay_steps(example: Any, completion: Any) -> float:
    """The same for an answer in part: what begins right is worth half."""
    return max(pay(example, completion), 0.5 * (completion.text[:1] == "b"))


def pay_first(example: Any, completion: Any) -> float:
    """What begins right."""
    return float(completion.text[:1] == "b")


def pay_second(example: Any, completion: Any) -> float:
    """100 for what goes on right where that is asked for, so that a sum would be this reward alone."""
    return 100.0 * (len(example["prompt"]) > 1 and completion.text[1:2] == "a")


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
    "gmpo": {"loss": GMPOLoss(aggregate="sequence_mean"), "learner": TWO},
    "sapo": {"loss": SAPOLoss(aggregate="sequence_mean"), "learner": PASSES},
    "luspo": {
        "loss": GSPOLoss(aggregate="constant_mean", divisor=1, clip_low=0.2, clip_high=0.27),
        "learner": TWO,
    },
    "opo": {"advantage": OPOAdvantage(), "loss": REINFORCE},
    "gdpo": {"advantage": GDPOAdvantage(columns=("first", "second")), "rollout": replace(ROLLOUT, max_refills=1)},
    "top entropy": {"loss": PPOLoss(top_entropy=0.6), "learner": TWO},
    "gpg": {"advantage": GRPOAdvantage(scale="none"), "loss": REINFORCE},
    "nash": {
        "advantage": NashAdvantage(),
        "loss": REINFORCE,
        "rollout": replace(ROLLOUT, opponent=ReferenceOpponent(samples=3)),
    },
    "xpo": {
        "advantage": BestWorst(),
        "loss": OnlinePreferenceLoss(losses=(DPOLoss(beta=0.1), XPOLoss(weight=1e-3))),
        "rollout": replace(ROLLOUT, opponent=ReferenceOpponent(samples=4)),
    },
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if i % 3 else ()) for i, name in enumerate(ALGORITHMS)]
)
def test_finds_the_optimum(name: str, tmp_path: Path) -> None:
    sections = {"rollout": ROLLOUT, "learner": ONE, "train": OnlineSection(steps=36, save_every=0), **ALGORITHMS[name]}
    score = scored_by(pay_steps if "process" in name else pay, first=pay_first, second=pay_second)
    table = train_table(toy_config(tmp_path, **sections), score, prompts=(BANDIT, PROCESS))
    assert np.exp(log_policy(table, BANDIT))[LETTERS.index("b")] > 0.9
    assert probability(table, "ba", PROCESS) > 0.9


# With a price on leaving the reference the optimum is known exactly

PAY = np.array([0.0, 0.2, 1.0, 0.5, -0.3])
"""Reward of each one-token answer."""
BETA = 0.5


def gibbs(reference: np.ndarray) -> np.ndarray:
    """argmax E[r] - beta KL(pi, reference): reference exp(r / beta), normalised."""
    weight = reference * np.exp(PAY / BETA)
    return weight / weight.sum()


def reversed_gibbs(reference: np.ndarray) -> np.ndarray:
    """argmax E[r] - beta KL(reference, pi): beta reference / (lambda - r), lambda so that it sums to 1."""
    low, high = PAY.max() + 1e-9, PAY.max() + 10
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.sum(BETA * reference / (middle - PAY)) > 1 else (low, middle)
    return BETA * reference / (middle - PAY)


PRICES: dict[str, tuple[dict[str, Any], Any]] = {
    "KL in the reward, k1": ({"kl": KLSection(coef=BETA, where="reward", estimator="k1")}, gibbs),
    "k1 corrected": ({"kl": KLSection(coef=BETA, estimator="k1", gradient="corrected")}, gibbs),
    "k3 corrected, twice": ({"kl": KLSection(coef=BETA, gradient="corrected"), "learner": TWO}, gibbs),
    "k2": ({"kl": KLSection(coef=BETA, estimator="k2")}, gibbs),
    "k3": ({"kl": KLSection(coef=BETA)}, reversed_gibbs),
    "entropy": ({"loss": ReinforceLoss(entropy_coef=BETA)}, lambda reference: gibbs(np.full(VOCAB, 1 / VOCAB))),
}


def against_the_reference(reference: np.ndarray) -> np.ndarray:
    """argmax P(pi beats reference) - beta KL(pi, reference): reference exp(P(y beats reference) / beta)."""
    beats = 1 / (1 + np.exp(-(PAY[:, None] - PAY[None, :]) / 0.3))
    weight = reference * np.exp(beats @ reference / 0.2)
    return weight / weight.sum()


PRICES["nash, against the reference"] = (
    {
        "kl": KLSection(coef=0.2, where="reward", estimator="k1"),
        "advantage": NashAdvantage(preference="logistic", scale=0.3),
        "rollout": RolloutSection(prompts=2, samples=512, max_tokens=1, opponent=ReferenceOpponent(samples=256)),
    },
    against_the_reference,
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if i else ()) for i, name in enumerate(PRICES)]
)
def test_a_price_on_leaving_the_reference_has_the_known_optimum(name: str, tmp_path: Path) -> None:
    sections, optimum = PRICES[name]
    base = {
        "rollout": RolloutSection(prompts=2, samples=256, max_tokens=1),
        "loss": ReinforceLoss(),
        "advantage": ReinforceAdvantage(baseline="batch_mean"),
        "learner": LearnerSection(microbatch_rows=2),
        "train": OnlineSection(steps=60, save_every=0, sample_every=100),
    }
    score = scored_by(lambda example, completion: float(PAY[completion.tokens[0]]))
    job, sampler = toy_job(toy_config(tmp_path, **{**base, **sections}), score)
    sampler.stratified = True
    table = table_of(run_online(job).state)
    reference = np.exp(log_policy(first_table(), PROMPT))
    want = optimum(reference)
    assert np.abs(want - reference).max() > 0.1
    np.testing.assert_allclose(np.exp(log_policy(table, PROMPT)), want, atol=0.025)
