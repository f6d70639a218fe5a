"""Importance weights between the policy that sampled and the learner's policy before the step.

Sampler and learner may differ: by lower precision, by another engine, by some steps of age. With the sampler's
log-probability log mu, a token's weight is w_t = pi_old / mu, and a whole sample's w = prod_t w_t, or the geometric
mean of its tokens. Weights are factors of the loss and never differentiated:

- truncated: min(w, cap), biased but of bounded variance;
- masked: w where low <= w <= high, and 0 elsewhere: what differs too much is not learnt from (2510.18855).
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpost.losses.aggregate import segment_sums
from jaxpost.losses.kl import LIMIT

Number = float | Float[Array, ""]
Correction = Callable[[Float[Array, "B T"], Float[Array, "B T"], Int[Array, "B T"]], Float[Array, "B T"]]
"""(log pi_old - log mu, weights, segments) -> each token's importance weight."""


def token_weights(gap: Float[Array, "B T"], weights: Float[Array, "B T"], segments: Int[Array, "B T"]) -> Array:
    """w_t = pi_old / mu of every token; 1 where the token has no weight."""
    return jnp.exp(jnp.clip(jnp.where(weights != 0, gap, 0.0), -LIMIT, LIMIT))


def sequence_weights(gap: Float[Array, "B T"], weights: Float[Array, "B T"], segments: Int[Array, "B T"]) -> Array:
    """w = prod_t w_t of every token's sample, over its tokens with weight.

    Example:
      >>> w = sequence_weights(jnp.log(jnp.array([[2.0, 3.0, 5.0]])), jnp.ones((1, 3)), jnp.array([[1, 1, 2]]))
      >>> [round(float(x), 3) for x in w[0]]
      [6.0, 6.0, 5.0]
    """
    total = segment_sums(jnp.where(weights != 0, gap, 0.0), segments)
    return jnp.exp(jnp.clip(total, -LIMIT, LIMIT))


def mean_sequence_weights(gap: Float[Array, "B T"], weights: Float[Array, "B T"], segments: Int[Array, "B T"]) -> Array:
    """(prod_t w_t)^(1/n) of every token's sample, n its tokens with weight: comparable between lengths."""
    on = weights != 0
    total = segment_sums(jnp.where(on, gap, 0.0), segments)
    count = segment_sums(on.astype(gap.dtype), segments)
    return jnp.exp(jnp.clip(total / jnp.maximum(count, 1.0), -LIMIT, LIMIT))


def truncated(level: Correction = token_weights, *, cap: Number = 2.0) -> Correction:
    """min(w, cap).

    Example:
      >>> truncated(cap=2.0)(jnp.log(jnp.array([[0.5, 4.0]])), jnp.ones((1, 2)), jnp.ones((1, 2), int)).round(3)
      Array([[0.5, 2. ]], dtype=float32)
    """
    return lambda gap, weights, segments: jnp.minimum(level(gap, weights, segments), cap)


def masked(level: Correction = token_weights, *, low: Number = 0.5, high: Number = 2.0) -> Correction:
    """w where low <= w <= high, else 0.

    Example:
      >>> masked(high=3.0)(jnp.log(jnp.array([[2.0, 4.0]])), jnp.ones((1, 2)), jnp.ones((1, 2), int)).round(3)
      Array([[2., 0.]], dtype=float32)
    """

    def correct(gap: Array, weights: Array, segments: Array) -> Array:
        w = level(gap, weights, segments)
        return jnp.where((w >= low) & (w <= high), w, 0.0)

    return correct


def effective_sample_size(mean: Number, mean_of_squares: Number) -> Number:
    """(sum w)^2 / (n sum w^2) = mean(w)^2 / mean(w^2), in (0, 1]: the share of samples that importance weights leave.

    Its arguments are means over the whole batch, so that a batch in pieces gives the batch's own number.

    Example:
      >>> effective_sample_size(1.0, 2.0)  # one of two samples has all the weight
      0.5
    """
    return mean * mean / mean_of_squares


def ratio_statistics(log_ratio: Float[Array, "B T"], weights: Float[Array, "B T"]) -> dict[str, Float[Array, ""]]:
    """Mean, extremes and effective sample size of ratios over the tokens that have weight, of a whole batch at once.

    For the loop to watch: sampler against learner, or old against new. Extremes are no means, so a loss cannot report
    them. Without any token: mean, extremes and size 1.

    Example:
      >>> stats = ratio_statistics(jnp.log(jnp.array([[2.0, 0.5, 9.0]])), jnp.array([[1.0, 1.0, 0.0]]))
      >>> [round(float(stats[name]), 3) for name in ("mean", "max", "min", "effective_sample_size")]
      [1.25, 2.0, 0.5, 0.735]
    """
    on = weights != 0
    log_ratio = jnp.where(on, log_ratio, 0.0)
    ratio = jnp.exp(jnp.clip(log_ratio, -LIMIT, LIMIT))
    count = jnp.sum(on)
    divisor = jnp.maximum(count, 1).astype(ratio.dtype)
    mean, square = (jnp.where(count > 0, jnp.sum(jnp.where(on, x, 0.0)) / divisor, 1.0) for x in (ratio, ratio**2))
    return {
        "mean": mean,
        "max": jnp.where(count > 0, jnp.max(jnp.where(on, ratio, 0.0)), 1.0),
        "min": jnp.where(count > 0, jnp.min(jnp.where(on, ratio, jnp.inf)), 1.0),
        "mean_abs_log": jnp.sum(jnp.abs(log_ratio)) / divisor,
        "effective_sample_size": jnp.asarray(effective_sample_size(mean, square)),
    }
