"""The critic's loss.

With V the value now, V_old the value when advantages were computed and R the target (`rl.returns.gae`):

  l = 1/2 (V - R)^2;  clipped: 1/2 max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2) (1707.06347's code)
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jaxpost.losses.aggregate import Aggregate, token_mean
from jaxpost.losses.supervised import next_tokens
from jaxpost.types import Hyper, Params, RolloutBatch, Term, Terms

ValueFn = Callable[[Params, RolloutBatch], Float[Array, "B T"]]
"""(params, batch) -> the value after reading the tokens up to and including each position."""


def squared_error(
    values: Float[Array, "*S"],
    old_values: Float[Array, "*S"],
    returns: Float[Array, "*S"],
    *,
    clip: float | Float[Array, ""] | None = None,
) -> tuple[Float[Array, "*S"], Bool[Array, "*S"]]:
    """1/2 (V - R)^2, or with a clip the larger of it and the clipped value's; and where the clipped one was larger.

    Example:
      >>> [x.tolist() for x in squared_error(jnp.array([1.0]), jnp.array([0.0]), jnp.array([1.0]), clip=0.5)]
      [[0.125], [True]]
    """
    plain = 0.5 * (values - returns) ** 2
    if clip is None:
        return plain, jnp.zeros(plain.shape, bool)
    held = 0.5 * (old_values + jnp.clip(values - old_values, -clip, clip) - returns) ** 2
    return jnp.maximum(plain, held), held > plain


def value_loss(
    values_of: ValueFn,
    params: Params,
    frozen: Params,
    batch: RolloutBatch,
    key: PRNGKeyArray,
    hyper: Hyper,
    *,
    aggregate: Aggregate = token_mean,
) -> tuple[Terms, Terms]:
    """The critic's squared error on the tokens that the policy is trained on.

    Args:
      values_of: the critic, of all `params`: a network of its own, or a head on the policy's.
      hyper: "value_coef", default 1; "value_clip" turns the clip on.

    Returns: the term "value_error"; metrics "value", "return" and "value_clip_fraction".

    Raises:
      ValueError: the batch lacks returns, or, with a clip, old values.
    """
    weights = next_tokens(batch)[1]
    clip = hyper.get("value_clip")
    if batch.returns is None or (clip is not None and batch.old_values is None):
        raise ValueError("the critic's loss needs the batch's returns, and with value_clip its old_values too")
    following = lambda x: jnp.where(weights != 0, jnp.roll(x, -1, axis=1), 0.0)  # noqa: E731
    values = jnp.where(weights != 0, values_of(params, batch).astype(jnp.float32), 0.0)
    returns = following(batch.returns)
    old = values if batch.old_values is None else following(batch.old_values)
    error, clipped = squared_error(values, old, returns, clip=clip)
    term = aggregate(error, weights, batch.segment_ids)._replace(coef=hyper.get("value_coef", 1.0))
    watched = {"value": jax.lax.stop_gradient(values), "return": returns, "value_clip_fraction": clipped}
    metrics = {name: Term(x.astype(jnp.float32), weights) for name, x in watched.items()}
    return {"value_error": term}, metrics
