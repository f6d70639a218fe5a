"""Normalisation of activations, always computed in float32."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*B D"], scale: Float[Array, " D"], *, eps: float, offset: float = 0.0
) -> Float[Array, "*B D"]:
    """Root-mean-square norm (1910.07467): x / sqrt(mean(x^2) + eps) * (offset + scale), in x's dtype.

    Args:
        x: activations of any float dtype; the arithmetic is float32.
        scale: one factor per channel.
        eps: added to the mean square.
        offset: added to `scale`; 1 for checkpoints that store scale - 1 (Gemma).

    Example:
        >>> rms_norm(jnp.asarray([[3.0, -3.0]]), jnp.asarray([1.0, 2.0]), eps=0.0).tolist()
        [[1.0, -2.0]]
    """
    wide = x.astype(jnp.float32)
    inverse = lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * inverse * (offset + scale.astype(jnp.float32))).astype(x.dtype)
