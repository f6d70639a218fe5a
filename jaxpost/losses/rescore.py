"""What networks say of samples before a step: log-probabilities and values of every token, without gradient.

Results belong to tokens as targets, like the fields of `RolloutBatch`. Rows without any loss weight are not computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpost.losses.policy import hidden_states, stats_of
from jaxpost.losses.supervised import next_tokens
from jaxpost.losses.value import ValueFn
from jaxpost.types import AnswerBatch, Hyper, Model, Params, RolloutBatch

RescoreFn = Callable[[Params, Params, RolloutBatch, Hyper], Float[Array, "B T"]]
"""(params, frozen, batch, hyper) -> one number per token, read at its own place."""


def logprobs(
    model: Model, policy: Params, batch: RolloutBatch | AnswerBatch, hyper: Hyper, *, chunk_tokens: int | None = None
) -> Float[Array, "B T"]:
    """log softmax(logits / T) of every token of the batch, 0 where the loss weight is 0."""
    targets, weights = next_tokens(batch)
    hidden = hidden_states(model, policy, batch)
    how = {"weights": weights, "with_entropy": False, "chunk_tokens": chunk_tokens}
    stats = stats_of(model, policy, hidden, targets, hyper, **how)
    return _at_tokens(jnp.where(weights != 0, stats.logprob, 0.0))


def values(values_of: ValueFn, params: Params, batch: RolloutBatch) -> Float[Array, "B T"]:
    """The critic's value of the state in which each token was chosen, 0 where the loss weight is 0."""
    weights = next_tokens(batch)[1]
    return _at_tokens(jnp.where(weights != 0, values_of(params, batch).astype(jnp.float32), 0.0))


def _at_tokens(x: Array) -> Array:
    """From the position that predicts a token to the token's own."""
    return jnp.roll(x, 1, axis=1).at[:, 0].set(0.0)


def rescore(
    functions: Mapping[str, RescoreFn],
    params: Params,
    frozen: Params,
    batch: RolloutBatch,
    hyper: Hyper,
    *,
    pieces: int = 1,
) -> dict[str, Float[Array, "B T"]]:
    """All functions over a batch, `pieces` microbatches one after another, those without loss weight left out.

    Args:
      functions: name -> what to compute.
      pieces: rows r, r + pieces, ... are computed together, as a train step splits them.
    """

    def piece(part: RolloutBatch) -> dict[str, Array]:
        compute = lambda part: {name: f(params, frozen, part, hyper) for name, f in functions.items()}  # noqa: E731
        nothing = lambda part: {name: jnp.zeros(part.tokens.shape, jnp.float32) for name in functions}  # noqa: E731
        return jax.lax.cond(jnp.any(part.weights != 0), compute, nothing, part)

    rows = batch.tokens.shape[0]
    split = lambda x: x.reshape(rows // pieces, pieces, *x.shape[1:]).swapaxes(0, 1)  # noqa: E731
    join = lambda x: x.swapaxes(0, 1).reshape(rows, *x.shape[2:])  # noqa: E731
    return jax.tree.map(join, jax.lax.map(piece, jax.tree.map(split, batch)))
