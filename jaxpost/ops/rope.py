"""Rotary position embedding and its scalings to longer contexts."""

from __future__ import annotations

import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Scaling = Literal["none", "linear", "llama3", "yarn"]


def inverse_frequencies(
    head_dim: int,
    *,
    theta: float,
    scaling: Scaling = "none",
    factor: float = 1.0,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    original_max_positions: int = 8192,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> np.ndarray:
    """Radians per position of each pair of channels: f_i = theta^(-2 i / head_dim), then scaled.

    - linear: f / factor (2306.15595).
    - llama3: wavelengths beyond `original_max_positions / low_freq_factor` are divided by `factor`, those below
      `original_max_positions / high_freq_factor` kept, and those between interpolated (2407.21783).
    - yarn: pairs that turn more than `beta_fast` times within the original context are kept, fewer than
      `beta_slow` times are divided by `factor`, with a linear ramp over the pairs between (2309.00071).

    Returns: float32 [head_dim / 2]; constants of the program, computed on the host.

    Example:
        >>> inverse_frequencies(4, theta=100.0).tolist()
        [1.0, 0.10000000149011612]
    """
    if head_dim % 2:
        raise ValueError(f"rotary embedding turns pairs of channels, so head_dim must be even, not {head_dim}")
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    base = (1.0 / np.float32(theta) ** exponent).astype(np.float32)
    if scaling == "linear":
        return (base / np.float32(factor)).astype(np.float32)
    if scaling == "llama3":
        return _llama3(base, factor, low_freq_factor, high_freq_factor, original_max_positions)
    if scaling == "yarn":
        return _yarn(base, theta, factor, beta_fast, beta_slow, original_max_positions)
    return base


def _llama3(base: np.ndarray, factor: float, low: float, high: float, original: int) -> np.ndarray:
    wavelength = 2 * math.pi / base
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * base / factor + smooth * base
    scaled = np.where(wavelength > original / low, base / factor, between)
    return np.where(wavelength < original / high, base, scaled).astype(np.float32)


def _yarn(base: np.ndarray, theta: float, factor: float, fast: float, slow: float, original: int) -> np.ndarray:
    head_dim = 2 * len(base)

    def pair_turning(turns: float) -> float:
        """Index of the pair that makes this many turns within the original context."""
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(pair_turning(fast)), 0)
    last = min(math.ceil(pair_turning(slow)), head_dim - 1)
    # The reference implementations widen an empty range by 0.001 pairs.
    width = last - first if last != first else 0.001
    ramp = np.clip((np.arange(len(base), dtype=np.float32) - first) / width, 0, 1).astype(np.float32)
    return (base / np.float32(factor) * ramp + base * (1 - ramp)).astype(np.float32)


def rotation(
    positions: Int[Array, "*B T"], frequencies: np.ndarray, *, factor: float = 1.0
) -> tuple[Float[Array, "*B T P"], Float[Array, "*B T P"]]:
    """factor * cos and factor * sin of position * frequency, in float32; P pairs of channels."""
    angles = positions.astype(jnp.float32)[..., None] * jnp.asarray(frequencies)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def yarn_attention_factor(factor: float) -> float:
    """Factor on cos and sin that keeps the softmax's temperature: 0.1 ln(factor) + 1 (2309.00071, eq. 22).

    Example:
        >>> yarn_attention_factor(1.0)
        1.0
    """
    return 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0


def rotate(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T P"], sin: Float[Array, "B T P"]
) -> Float[Array, "B T N H"]:
    """Turns channel pairs (i, i + H/2) of every head by its position's angle (2104.09864), in x's dtype.

    Example:
        >>> cos, sin = rotation(jnp.asarray([[0, 1]]), inverse_frequencies(2, theta=1.0))
        >>> [round(v, 4) for v in rotate(jnp.asarray([[[[1.0, 0.0]], [[1.0, 0.0]]]]), cos, sin)[0, 1, 0].tolist()]
        [0.5403, 0.8415]
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    c, s = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * c - second * s, second * c + first * s], axis=-1).astype(x.dtype)
