"""Heads: numbers read off a model's final hidden states, for a critic, a reward model or a process reward model.

A head is a network of its own beside the policy, {"kernel": [D, K], "bias": [K]}, described by a parameter table like a
model's and so initialised, sharded and saved alike. It belongs to no family: every model's hidden states are [... D].

With N members of M outputs each, K = N M and output n M + m is member n's m-th: an ensemble of linear heads shares the
model below, and its members differ by where they start.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpost.types import Params, ParamSpec


def head_table(width: int, outputs: int = 1, *, bias: bool = False, std: float | None = None) -> tuple[ParamSpec, ...]:
    """The rows of a head's parameter table.

    Args:
      width: D, of the hidden states.
      outputs: K, the numbers read at each token.
      bias: transformers' token-classification heads have one, its sequence-classification heads do not.
      std: of the kernel's normal start; None: 1 / sqrt(D + 1) (2009.01325); 0: all scores start at 0.

    Raises:
      ValueError: less than one output, or a negative deviation.

    Example:
      >>> [(row.path, row.shape) for row in head_table(16, 2, bias=True)]
      [(('kernel',), (16, 2)), (('bias',), (2,))]
    """
    scale = 1.0 / math.sqrt(width + 1) if std is None else std
    if outputs < 1 or scale < 0:
        raise ValueError(f"a head of {outputs} outputs with deviation {scale}: give at least one, and no negative one")

    def start(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        drawn = jax.random.normal(key, shape, jnp.float32) if scale else jnp.zeros(shape, jnp.float32)
        return (scale * drawn).astype(dtype)

    rows = [ParamSpec(("kernel",), (width, outputs), (None, None), start)]
    if bias:
        rows.append(ParamSpec(("bias",), (outputs,), (None,), lambda _, shape, dtype: jnp.zeros(shape, dtype)))
    return tuple(rows)


def init_head(key: Array, table: tuple[ParamSpec, ...]) -> Params:
    """A head's first parameters, in float32.

    Example:
      >>> round(float(jnp.std(init_head(jax.random.key(0), head_table(399, 100))["kernel"])), 2)
      0.05
    """
    keys = jax.random.split(key, len(table))
    return {row.path[0]: row.init(k, row.shape, jnp.float32) for k, row in zip(keys, table, strict=True)}


def score(head: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "*B K"]:
    """hidden @ kernel + bias in float32, whatever the model computes in.

    Example:
      >>> score({"kernel": jnp.ones((3, 1))}, jnp.arange(6.0).reshape(2, 3)).tolist()
      [[3.0], [12.0]]
    """
    values = hidden.astype(jnp.float32) @ head["kernel"].astype(jnp.float32)
    return values + head["bias"].astype(jnp.float32) if "bias" in head else values
