"""Small functions that several preference losses share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpost.losses.preference.pairs import AnswerStats
from jaxpost.types import Hyper

LARGEST = 40.0
"""Exponents are held at this value, and their gradient is 0 beyond: the norm of what comes out stays finite."""


def known(x: Float[Array, "*S"] | None) -> Float[Array, "*S"]:
    """A number that the loss needs; its piece's `Needs` have to name it."""
    if x is None:
        raise ValueError("this loss reads a number of each answer that was not computed: see objective.Needs")
    return x


def log_ratio(stats: AnswerStats) -> Float[Array, "*S"]:
    """log pi(y | x) - log pi_ref(y | x)."""
    return stats.logprob - known(stats.ref_logprob)


def per_token(x: Float[Array, "*S"], stats: AnswerStats) -> Float[Array, "*S"]:
    """x / |y|, and x where there are no tokens."""
    return x / jnp.where(stats.length == 0, 1.0, stats.length)


def logistic(z: Float[Array, "*S"], hyper: Hyper) -> Float[Array, "*S"]:
    """-(1 - e) log s(z) - e log s(-z), with e = hyper["label_smoothing"] or 0.

    Example:
      >>> round(float(logistic(jnp.array(0.0), {"label_smoothing": 0.3})), 4)  # log 2, whatever e
      0.6931
    """
    smoothing = hyper.get("label_smoothing", 0.0)
    return -(1.0 - smoothing) * jax.nn.log_sigmoid(z) - smoothing * jax.nn.log_sigmoid(-z)


def bounded_exp(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """exp(min(x, LARGEST))."""
    return jnp.exp(jnp.minimum(x, LARGEST))


# The rewards that losses take a policy for


def implicit_reward(stats: AnswerStats, hyper: Hyper) -> Float[Array, "*S"]:
    """beta log(pi / pi_ref)."""
    return hyper["beta"] * log_ratio(stats)


def implicit_reward_per_token(stats: AnswerStats, hyper: Hyper) -> Float[Array, "*S"]:
    """beta / |y| log(pi / pi_ref)."""
    return per_token(implicit_reward(stats, hyper), stats)


def likelihood(stats: AnswerStats, hyper: Hyper) -> Float[Array, "*S"]:
    """beta log pi; beta is 1 where the loss has none."""
    return hyper.get("beta", 1.0) * stats.logprob


def likelihood_per_token(stats: AnswerStats, hyper: Hyper) -> Float[Array, "*S"]:
    """beta / |y| log pi; beta is 1 where the loss has none."""
    return per_token(likelihood(stats, hyper), stats)
