"""Which keys a query may see, and what else every implementation of attention shares.

Letters: B rows, T queries, S keys, K key/value heads, M, N, P the axes of a product.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

# Finite, so that a row without any visible key gives zeros and no NaN, in the gradient too.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
"""Score of a key that a query does not see."""


class Rules(NamedTuple):
    """Static part of one attention call."""

    scale: float
    window: int | None
    softcap: float | None


def visible(
    q_positions: Int[Array, "B T"],
    kv_positions: Int[Array, "B S"],
    q_segments: Int[Array, "B T"],
    kv_segments: Int[Array, "B S"],
    q_prefixes: Int[Array, "B T"] | None = None,
    *,
    window: int | None = None,
) -> Bool[Array, "B T S"]:
    """Which keys a query may see: those of its own segment, not after it, within its window, never padding.

    Causality is by position within the segment, not by slot, so that packed rows, caches with holes and
    padding on either side need nothing special. A window counts the token itself. A segment that continues another
    one (`q_prefixes` names it, 0 for none) sees that one's keys by the same rule.

    Example:
        >>> p, s = jnp.asarray([[0, 1, 0]]), jnp.asarray([[1, 1, 2]])
        >>> visible(p, p, s, s).astype(int).tolist()
        [[[1, 0, 0], [1, 1, 0], [0, 0, 1]]]
    """
    behind = q_positions[:, :, None] - kv_positions[:, None, :]
    related = q_segments[:, :, None] == kv_segments[:, None, :]
    if q_prefixes is not None:
        related |= q_prefixes[:, :, None] == kv_segments[:, None, :]
    mask = (behind >= 0) & related & (kv_segments != 0)[:, None, :]
    return mask if window is None else mask & (behind < window)


def batched_product(
    x: Float[Array, "B K _ _"], y: Float[Array, "B K _ _"], contract: tuple[int, int]
) -> Float[Array, "B K M P"]:
    """x y summed over one axis of each, batched over rows and key/value heads, accumulated in float32."""
    return lax.dot_general(
        x, y, (((contract[0],), (contract[1],)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32
    )
