"""How per-token losses become one number: which tokens share a mean.

With l_t the loss and w_t the weight of token t, o_i sample i's tokens and |o_i| = sum_{t in o_i} w_t its length, an
`Aggregate` (values, weights, segments) -> Term has the mean

- `token_mean`: sum_t w_t l_t / sum_t w_t over the whole batch: DAPO's (2503.14476);
- `sequence_mean`: (1/N) sum_i (1/|o_i|) sum_{t in o_i} w_t l_t: GRPO's (2402.03300);
- `constant_mean(L)`: (1/N) sum_i (1/L) sum_{t in o_i} w_t l_t: Dr.GRPO's (2503.20783).

N counts the samples that have any weight. Weights come from the batch alone, so each mean is exact over any number of
microbatches and devices. A mean is linear: the term's value is the given value times a number that comes from weights
and segments, so that a loss may be summed before its values are all known (`ops.logprobs.weighted_sum`).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpost.types import Term

Aggregate = Callable[[Float[Array, "B T"], Float[Array, "B T"], Int[Array, "B T"]], Term]


def segment_sums(x: Float[Array, "B T"], segments: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Every token's segment's sum of x; segment ids lie in 0..T.

    Example:
      >>> segment_sums(jnp.array([[1.0, 2.0, 4.0]]), jnp.array([[1, 1, 2]])).tolist()
      [[3.0, 3.0, 4.0]]
    """
    row = lambda x, s: jax.ops.segment_sum(x, s, x.shape[0] + 1)[s]  # noqa: E731
    return jax.vmap(row)(x, segments)


def _share(weights: Float[Array, "B T"], segments: Int[Array, "B T"]) -> tuple[Array, Array]:
    """w_t / |o_i| and |o_i|, both 0 in samples without weight."""
    length = segment_sums(weights, segments)
    return weights / jnp.where(length == 0, 1.0, length), length


def token_mean(values: Float[Array, "B T"], weights: Float[Array, "B T"], segments: Int[Array, "B T"]) -> Term:
    """Every token of the batch counts alike, so long samples count more."""
    return Term(values, weights)


def sequence_mean(values: Float[Array, "B T"], weights: Float[Array, "B T"], segments: Int[Array, "B T"]) -> Term:
    """Every sample counts alike, so tokens of long samples count less.

    Example:
      >>> term = sequence_mean(jnp.array([[6.0, 0.0, 1.0]]), jnp.ones((1, 3)), jnp.array([[1, 1, 2]]))
      >>> float(jnp.sum(term.value * term.weight) / jnp.sum(term.weight))  # of 3 and 1
      2.0
    """
    return Term(values, _share(weights, segments)[0])


def constant_mean(divisor: int) -> Aggregate:
    """The sum over a sample's tokens divided by one constant for all, usually the longest answer allowed.

    Example:
      >>> term = constant_mean(4)(jnp.array([[6.0, 0.0, 2.0]]), jnp.ones((1, 3)), jnp.array([[1, 1, 2]]))
      >>> float(jnp.sum(term.value * term.weight) / jnp.sum(term.weight))  # of 6/4 and 2/4
      1.0
    """
    if divisor < 1:
        raise ValueError(f"the constant that divides a sample's summed loss must be at least 1, got {divisor}")

    def aggregate(values: Array, weights: Array, segments: Array) -> Term:
        share, length = _share(weights, segments)
        return Term(values * length / divisor, share)

    return aggregate
