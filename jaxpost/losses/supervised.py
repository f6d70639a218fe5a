"""Losses on given answers.

Position t predicts token t + 1 of the same segment. With p_t the model's probability of that token and w_t the
batch's weight of it, each loss is sum_t w_t l_t / sum_t w_t, the sums running over the whole batch:

- cross-entropy: l = -(1 - e) log p - e mean_v log p_v + z (log Z)^2, e the label smoothing, z the z-loss weight;
- DFT: l = -sg(p) log p (2508.05629), sg stopping the gradient.

Weights are known before the forward pass, so the loss is summed by `ops.logprobs.weighted_sum`, which
differentiates the head while its logits are at hand.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxpost.ops import platform
from jaxpost.ops.logprobs import TokenFn, stats_of_logits, weighted_sum
from jaxpost.types import AnswerBatch, Hyper, Inputs, Model, Params, RolloutBatch, Term, Terms, TokenBatch


def next_tokens(batch: TokenBatch | RolloutBatch | AnswerBatch) -> tuple[Int[Array, "B T"], Float[Array, "B T"]]:
    """Target and weight of every position: the next token of the same segment, 0 where there is none.

    Example:
      >>> row = lambda *x: jnp.array([x])
      >>> batch = TokenBatch(row(5, 6, 7), row(0, 1, 0), row(1, 1, 2), row(0.0, 1.0, 1.0), jnp.array([0]))
      >>> next_tokens(batch)[1]  # 6 follows 5; 7 starts another segment
      Array([[1., 0., 0.]], dtype=float32)
    """
    targets = jnp.roll(batch.tokens, -1, axis=1)
    following = jnp.roll(batch.segment_ids, -1, axis=1).at[:, -1].set(0)
    inside = (batch.segment_ids == following) & (batch.segment_ids > 0)
    return targets, jnp.where(inside, jnp.roll(batch.weights, -1, axis=1), 0.0)


def cross_entropy(
    model: Model,
    params: Params,
    frozen: Params,
    batch: TokenBatch,
    key: PRNGKeyArray,
    hyper: Hyper,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    chunk_tokens: int | None = None,
) -> tuple[Terms, Terms]:
    """-(1 - e) log p - e mean_v log p_v + z (log Z)^2, weighted by token.

    Args:
      params: {"policy": the model's parameters}.
      z_loss: z, keeps log Z near 0 (2204.02311).
      label_smoothing: e in [0, 1), spread evenly over the vocabulary, the target included (1512.00567).
      chunk_tokens: tokens whose logits exist at one time, over all devices; None: one device's, by the platform.

    Returns:
      Terms {"cross_entropy"}; metrics {"nll" (-log p, nats), "accuracy" (the target is the likeliest token)}
      and, with a z-loss, "logz_squared".

    Example:
      >>> from jaxpost.types import Outputs
      >>> uniform = Model(None, (), None, lambda p, x: Outputs(jnp.zeros((1, 3, 2))), lambda p, h: h @ p, None)
      >>> row = lambda *x: jnp.array([x])
      >>> batch = TokenBatch(row(5, 6, 7), row(0, 1, 2), row(1, 1, 1), row(0.0, 1.0, 1.0), jnp.array([0]))
      >>> policy = jnp.ones((2, 10))
      >>> terms, _ = cross_entropy(uniform, {"policy": policy}, {}, batch, jax.random.key(0), {})
      >>> round(float(terms["cross_entropy"].value), 4)  # log 10
      2.3026
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")

    def per_token(logits: Array, targets: Array) -> tuple[Array, Any]:
        stats = stats_of_logits(logits, targets)
        value = -stats.logprob
        if label_smoothing:
            mean_logprob = jnp.mean(logits, axis=-1) - stats.logz
            value = (1.0 - label_smoothing) * value - label_smoothing * mean_logprob
        return value + z_loss * stats.logz**2 if z_loss else value, stats

    return _summed("cross_entropy", model, params, batch, per_token, z_loss=z_loss, chunk_tokens=chunk_tokens)


def dft(
    model: Model,
    params: Params,
    frozen: Params,
    batch: TokenBatch,
    key: PRNGKeyArray,
    hyper: Hyper,
    *,
    z_loss: float = 0.0,
    chunk_tokens: int | None = None,
) -> tuple[Terms, Terms]:
    """-sg(p) log p + z (log Z)^2: dynamic fine-tuning (2508.05629), which removes the 1/p from the gradient.

    Arguments and results are those of `cross_entropy`; the term is called "dft".
    """

    def per_token(logits: Array, targets: Array) -> tuple[Array, Any]:
        stats = stats_of_logits(logits, targets)
        value = -jax.lax.stop_gradient(jnp.exp(stats.logprob)) * stats.logprob
        return value + z_loss * stats.logz**2 if z_loss else value, stats

    return _summed("dft", model, params, batch, per_token, z_loss=z_loss, chunk_tokens=chunk_tokens)


def _summed(
    name: str,
    model: Model,
    params: Params,
    batch: TokenBatch,
    per_token: TokenFn,
    *,
    z_loss: float,
    chunk_tokens: int | None,
) -> tuple[Terms, Terms]:
    targets, weights = next_tokens(batch)
    policy = params["policy"]
    hidden = model.forward(policy, Inputs(batch.tokens, batch.positions, batch.segment_ids)).hidden
    chunk_tokens = platform.choices().chunk_tokens if chunk_tokens is None else chunk_tokens
    total, stats = weighted_sum(model.unembed, policy, hidden, weights, targets, per_token, chunk_tokens=chunk_tokens)
    # A Term of one element: its value is the mean over these rows, its weight theirs.
    weight = jnp.sum(weights)
    value = total / jnp.where(weight == 0, 1.0, weight)
    metrics = {
        "nll": Term(-stats.logprob, weights),
        "accuracy": Term(stats.correct.astype(jnp.float32), weights),
    }
    if z_loss:
        metrics["logz_squared"] = Term(stats.logz**2, weights)
    return {name: Term(value, weight)}, metrics
