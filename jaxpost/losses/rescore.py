"""What networks say of samples before a step: log-probabilities and values of every token, without gradient.

Results belong to tokens as targets, like the fields of `RolloutBatch`. Rows without any loss weight are not computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import or_
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpost.losses.policy import hidden_states, stats_of
from jaxpost.losses.supervised import next_tokens
from jaxpost.losses.value import ValueFn
from jaxpost.types import AnswerBatch, Hyper, Model, Params, RolloutBatch

RescoreFn = Callable[[Params, Params, RolloutBatch, Hyper], Mapping[str, Float[Array, "B T"]]]
"""(params, frozen, batch, hyper) -> by name, one number per token, read at its own place."""


def logprobs(
    model: Model, policy: Params, batch: RolloutBatch | AnswerBatch, hyper: Hyper, *, chunk_tokens: int | None = None
) -> Float[Array, "B T"]:
    """log softmax(logits / T) of every token of the batch, 0 where the loss weight is 0."""
    return _said(model, policy, batch, hyper, with_entropy=False, chunk_tokens=chunk_tokens)["logprobs"]


def logprobs_and_entropy(
    model: Model, policy: Params, batch: RolloutBatch, hyper: Hyper, *, chunk_tokens: int | None = None
) -> dict[str, Float[Array, "B T"]]:
    """In one pass "logprobs", as above, and "entropy", that of softmax(logits / T) where the token was chosen."""
    return _said(model, policy, batch, hyper, with_entropy=True, chunk_tokens=chunk_tokens)


def _said(
    model: Model,
    policy: Params,
    batch: RolloutBatch | AnswerBatch,
    hyper: Hyper,
    *,
    with_entropy: bool,
    chunk_tokens: int | None,
) -> dict[str, Array]:
    targets, weights = next_tokens(batch)
    how: dict[str, Any] = {"weights": weights, "with_entropy": with_entropy, "chunk_tokens": chunk_tokens}
    stats = stats_of(model, policy, hidden_states(model, policy, batch), targets, hyper, **how)
    found = {"logprobs": stats.logprob, "entropy": stats.entropy}
    return {name: _at_tokens(jnp.where(weights != 0, x, 0.0)) for name, x in found.items() if x is not None}


def values(values_of: ValueFn, params: Params, batch: RolloutBatch) -> Float[Array, "B T"]:
    """The critic's value of the state in which each token was chosen, 0 where the loss weight is 0."""
    weights = next_tokens(batch)[1]
    return _at_tokens(jnp.where(weights != 0, values_of(params, batch).astype(jnp.float32), 0.0))


def _at_tokens(x: Array) -> Array:
    """From the position that predicts a token to the token's own."""
    return jnp.roll(x, 1, axis=1).at[:, 0].set(0.0)


def rescore(
    functions: Sequence[RescoreFn],
    params: Params,
    frozen: Params,
    batch: RolloutBatch,
    hyper: Hyper,
    *,
    pieces: int = 1,
) -> dict[str, Float[Array, "B T"]]:
    """What all functions say of a batch, `pieces` microbatches one after another, those without loss weight left out.

    Args:
      functions: what to compute, each under names of its own.
      pieces: rows r, r + pieces, ... are computed together, as a train step splits them.
    """

    def piece(part: RolloutBatch) -> dict[str, Array]:
        compute = lambda part: reduce(or_, (dict(f(params, frozen, part, hyper)) for f in functions))  # noqa: E731
        nothing = lambda part: jax.tree.map(  # noqa: E731
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute, part)
        )
        return jax.lax.cond(jnp.any(part.weights != 0), compute, nothing, part)

    rows = batch.tokens.shape[0]
    split = lambda x: x.reshape(rows // pieces, pieces, *x.shape[1:]).swapaxes(0, 1)  # noqa: E731
    join = lambda x: x.swapaxes(0, 1).reshape(rows, *x.shape[2:])  # noqa: E731
    return jax.tree.map(join, jax.lax.map(piece, jax.tree.map(split, batch)))
