"""bfloat16 arrays that a program only slices and writes into, kept as their bits.

XLA's CPU backend computes in float32: up to jax 0.10 it converts the whole of a bfloat16 array before it scatters
into it or slices it in a loop, and back. As unsigned integers of the same bits the array is moved as it is.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Shaped

from jaxpost.ops import platform


def stored_dtype(dtype: DTypeLike) -> jnp.dtype:
    """What values of `dtype` are stored as on this platform.

    Example:
        >>> with platform.target("cpu"):
        ...     stored_dtype(jnp.bfloat16), stored_dtype(jnp.float32)
        (dtype('uint16'), dtype('float32'))
    """
    hide = platform.choices().bfloat16_as_bits and jnp.dtype(dtype) == jnp.bfloat16
    return jnp.dtype(jnp.uint16 if hide else dtype)


def hide(x: Shaped[Array, "*S"]) -> Shaped[Array, "*S"]:
    """bfloat16 as `stored_dtype` says; other dtypes as they are. No gradient passes through bits."""
    stored = stored_dtype(x.dtype)
    return x if stored == x.dtype else lax.bitcast_convert_type(x, stored)


def show(x: Shaped[Array, "*S"]) -> Shaped[Array, "*S"]:
    """What `hide` was given."""
    return lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x
