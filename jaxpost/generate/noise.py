"""The random number of a token: a function of what the token is, never of where it was computed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt32

_BITS = 23


def row_keys(
    seed: UInt32[Array, " B"], draw: Int[Array, " B"], example: Int[Array, " B"], sample: Int[Array, " B"]
) -> Key[Array, " B"]:
    """One key a row: fold_in(fold_in(fold_in(key(seed), draw), example), sample).

    Threefry whatever jax's default generator: the others do not give the same numbers in a batch as alone.

    Args:
      seed: [B] uint32.
      draw: [B] the rollout step or epoch.
      example: [B] identity of the prompt.
      sample: [B] number of the sample among the prompt's.

    Example:
      >>> import jax.numpy as jnp
      >>> ids = jnp.arange(2)
      >>> keys = row_keys(jnp.zeros(2, jnp.uint32), ids, ids, ids)
      >>> bool(keys[1] == row_keys(jnp.zeros(1, jnp.uint32), ids[1:], ids[1:], ids[1:])[0])
      True
    """

    def key(seed: Array, draw: Array, example: Array, sample: Array) -> Array:
        base = jax.random.key(seed, impl="threefry2x32")
        for number in (draw, example, sample):
            base = jax.random.fold_in(base, number.astype(jnp.uint32))
        return base

    return jax.vmap(key)(seed, draw, example, sample)


def uniforms(keys: Key[Array, " B"], positions: Int[Array, " B"]) -> Float[Array, " B"]:
    """Each row's number in (0, 1) for the token at `positions[b]` of its text: (2 k + 1) / 2^24, exact in float32.

    k has 23 bits, so the mean is 1/2 and 0, which would draw the first token of any probability at all, never comes.

    Args:
      keys: [B] from `row_keys`.
      positions: [B] place of the token to be drawn, counted from the prompt's first token.
    """

    def number(key: Array, position: Array) -> Array:
        bits = jax.random.bits(jax.random.fold_in(key, position.astype(jnp.uint32)), (), jnp.uint32)
        return (bits >> jnp.uint32(32 - _BITS)).astype(jnp.float32) * 2.0**-_BITS + 2.0 ** -(_BITS + 1)

    return jax.vmap(number)(keys, positions)
