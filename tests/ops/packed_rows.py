"""Rows of three packed segments and trailing padding, with random queries, keys and values."""

import jax.numpy as jnp
import numpy as np


def packed(rng, rows, length, *, padding=3):
    """Segments and positions of packed rows that end in padding."""
    segments, positions = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32)
    for b in range(rows):
        cuts = np.sort(rng.choice(np.arange(1, length - padding), 2, replace=False))
        for s, (first, last) in enumerate(zip([0, *cuts], [*cuts, length - padding], strict=True)):
            segments[b, first:last] = s + 1
            positions[b, first:last] = np.arange(last - first)
    return segments, positions


def example(rows=2, length=13, heads=4, kv_heads=2, width=8, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = (jnp.asarray(rng.normal(size=(rows, length, n, width)), jnp.float32) for n in (heads, kv_heads, kv_heads))
    segments, positions = packed(rng, rows, length)
    return q, k, v, jnp.asarray(positions), jnp.asarray(segments)


def places(positions, segments):
    return {"q_positions": positions, "kv_positions": positions, "q_segments": segments, "kv_segments": segments}
