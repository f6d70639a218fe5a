"""Losses of given answers that need no reference policy.

With C = log pi(y_c | x) of the chosen and R of the rejected answer, y_c and y_r their lengths, s the logistic function:

| function | loss | |
|---|---|---|
| `orpo` | -C / y_c - lambda log s(log odds_c - log odds_r), odds = p / (1 - p), log p = C / y_c | ORPO 2403.07691 |
| `simpo` | -log s(b C / y_c - b R / y_r - gamma) | SimPO 2405.14734 |
| `alphapo` | `simpo` with (b / alpha) (1 - p^-alpha) for b log p | AlphaPO 2501.03884 |
| `cpo` | -log s(b C - b R) - nll_coef C / y_c | CPO 2401.08417 |
| `nll` | -C, each token, each answer or each sum counting alike | RPO's second term 2404.19733 |
| `xpo` | log pi(y) of answers that the reference drew | XPO's exploration 2405.21046 |

The first four are (pairs, hyper) -> [B P], the others (answers, hyper) -> Term. RPO is `dpo` + `nll`; XPO is `dpo` +
alpha `xpo` on pairs of the policy's own answer and the reference's.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpost.losses.preference.divergences import power_reward
from jaxpost.losses.preference.pairs import Answers, AnswerStats, Sides
from jaxpost.losses.preference.shapes import logistic, per_token
from jaxpost.types import Hyper, Term

SURE = -1e-6
"""Log probability above which odds are held: at p = 1 they are infinite."""


def orpo(pairs: Sides, hyper: Hyper) -> Float[Array, "B P"]:
    """-log p_c - lambda log s(log odds_c - log odds_r), p the geometric mean of an answer's token probabilities.

    Odds are p / (1 - p), of probabilities per token (2403.07691, equations 3 to 7).

    Args:
      hyper: "odds_weight", the lambda.

    Example:
      >>> row = lambda *x: jnp.array([x])
      >>> half = AnswerStats(2 * jnp.log(row(0.5)), row(2.0))  # p = 1/2 a token: odds of 1
      >>> round(float(orpo(Sides(half, half, row(1.0), row(1.0)), {"odds_weight": 1.0})[0, 0]), 4)  # 2 log 2
      1.3863
    """
    chosen, rejected = (jnp.minimum(per_token(x.logprob, x), SURE) for x in (pairs.chosen, pairs.rejected))
    log_odds = lambda logp: logp - jnp.log(-jnp.expm1(logp))  # noqa: E731
    ratio = log_odds(chosen) - log_odds(rejected)
    return -per_token(pairs.chosen.logprob, pairs.chosen) - hyper["odds_weight"] * jax.nn.log_sigmoid(ratio)


def simpo(pairs: Sides, hyper: Hyper) -> Float[Array, "B P"]:
    """-log s(b C / y_c - b R / y_r - gamma): simple preference optimisation (2405.14734).

    Args:
      hyper: "beta"; "gamma", the margin that the chosen answer has to have (some libraries give gamma / beta);
        "label_smoothing".
    """
    chosen, rejected = likelihoods(pairs, hyper, 0.0)
    return logistic(chosen - rejected - hyper["gamma"], hyper)


def alphapo(pairs: Sides, hyper: Hyper) -> Float[Array, "B P"]:
    """-log s(q_c - q_r - gamma), q = (b / alpha) (1 - p^-alpha), log p = log pi(y) / |y| (2501.03884).

    Args:
      hyper: those of `simpo`, which alpha = 0 is; "alpha", of either sign.
    """
    chosen, rejected = likelihoods(pairs, hyper, hyper["alpha"])
    return logistic(chosen - rejected - hyper["gamma"], hyper)


def likelihoods(pairs: Sides, hyper: Hyper, alpha: Array | float) -> tuple[Array, Array]:
    """AlphaPO's rewards of both sides."""
    chosen, rejected = (power_likelihood(side, {**hyper, "alpha": alpha}) for side in (pairs.chosen, pairs.rejected))
    return chosen, rejected


def power_likelihood(stats: AnswerStats, hyper: Hyper) -> Float[Array, "*S"]:
    """(b / alpha) (1 - p^-alpha), log p = log pi(y) / |y|: the reward of AlphaPO."""
    return hyper["beta"] * power_reward(per_token(stats.logprob, stats), hyper["alpha"])


def cpo(pairs: Sides, hyper: Hyper) -> Float[Array, "B P"]:
    """-log s(b (C - R)) - nll_coef C / y_c: contrastive preference optimisation (2401.08417).

    The paper writes the second term as a sum over tokens; its code has the mean.

    Args:
      hyper: "beta", "nll_coef", "label_smoothing".
    """
    preference = logistic(hyper["beta"] * (pairs.chosen.logprob - pairs.rejected.logprob), hyper)
    return preference - hyper["nll_coef"] * per_token(pairs.chosen.logprob, pairs.chosen)


NLLMean = Literal["answer", "token", "sum"]


def nll(answers: Answers, hyper: Hyper, *, mean: NLLMean = "answer") -> Term:
    """-log pi(y) of the best answers: keeps their likelihood up beside a loss that compares.

    Args:
      mean: "answer", per token and then over answers, as RPO has it (2404.19733, equation 1); "token", over all tokens
        of the batch, as in fine-tuning; "sum", over answers of whole answers.
    """
    best = answers.valid & (answers.ranks == 0)
    value = -answers.stats.logprob if mean == "sum" else -per_token(answers.stats.logprob, answers.stats)
    return Term(value, jnp.where(best, answers.stats.length if mean == "token" else 1.0, 0.0))


def xpo(answers: Answers, hyper: Hyper) -> Term:
    """log pi(y) of answers that the reference drew: what XPO adds, alpha times, to `dpo` (2405.21046, algorithm 1).

    Pushing down what the reference says makes the policy explore; with alpha = 0 it is online DPO.

    Raises:
      ValueError: the batch does not say which answers those are (`AnswerBatch.from_reference`).
    """
    if answers.from_reference is None:
        raise ValueError("xpo reads the answers that the reference drew, but the batch has no from_reference")
    return Term(answers.stats.logprob, jnp.where(answers.valid, answers.from_reference, 0.0))
