"""What a model costs: parameters and floating-point operations, counted from its configuration.

A product of [m, k] with [k, n] is 2 m k n operations. The forward pass does each matrix once; the backward pass
twice where the matrix is trained (gradient of input and of matrix), once where it is frozen. Norms, activations and
softmax are left out, as is recomputation: utilisation is of the operations that the mathematics needs.
"""

from __future__ import annotations

import math
from typing import Literal

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxpost.models.config import ModelConfig
from jaxpost.models.table import parameter_table

Trained = Literal["full", "lora", "none"]


def param_count(config: ModelConfig) -> int:
    """Number of scalars in the parameters; a tied head counts once.

    Example:
        >>> from jaxpost.models.config import BlockConfig, RopeConfig, StackConfig
        >>> stack = StackConfig(repeats=2, period=(BlockConfig(rope=RopeConfig()),))
        >>> param_count(ModelConfig(family="llama", vocab_size=8, width=4, mlp_width=6, heads=2, kv_heads=1,
        ...                         head_dim=2, stacks=(stack,), max_positions=16))
        292
    """
    return sum(math.prod(spec.shape) for spec in parameter_table(config))


def param_bytes(config: ModelConfig, dtype: DTypeLike) -> int:
    """Bytes of the parameters held in `dtype`."""
    return param_count(config) * jnp.dtype(dtype).itemsize


def cache_bytes(config: ModelConfig, batch: int, capacity: int, dtype: DTypeLike) -> int:
    """Bytes of the keys and values of `batch` rows of `capacity` tokens; a decoded token reads all of them.

    Example:
        >>> from jaxpost.models.config import BlockConfig, RopeConfig, StackConfig
        >>> stack = StackConfig(repeats=2, period=(BlockConfig(rope=RopeConfig()),))
        >>> config = ModelConfig(family="llama", vocab_size=8, width=4, mlp_width=6, heads=2, kv_heads=1,
        ...                      head_dim=2, stacks=(stack,), max_positions=16)
        >>> cache_bytes(config, 3, 10, "bfloat16")  # 2 layers, keys and values, 30 tokens of 1 x 2 numbers
        480
    """
    per_token = 2 * config.num_layers * config.kv_heads * config.head_dim
    return batch * capacity * per_token * jnp.dtype(dtype).itemsize


def matrix_count(config: ModelConfig) -> int:
    """Scalars of the matrices that a token is multiplied with: every kernel and the head, no embedding lookup."""
    kernels = sum(math.prod(spec.shape) for spec in parameter_table(config) if spec.path[-1] == "kernel")
    return kernels + (config.vocab_size * config.width if config.tie_embeddings else 0)


def attended(seq_len: int, window: int | None) -> float:
    """Keys that a token sees, on average over the positions of a row of one segment.

    Example:
        >>> attended(4, None), attended(4, 2)  # 1 2 3 4 and 1 2 2 2
        (2.5, 1.75)
    """
    w = seq_len if window is None else min(window, seq_len)
    return (w * (w + 1) / 2 + (seq_len - w) * w) / seq_len


def attention_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Forward operations of all layers' query-key and weight-value products, for one token."""
    per_key = 2 * 2 * config.heads * config.head_dim
    return sum(
        stack.repeats * per_key * attended(seq_len, kind.window) for stack in config.stacks for kind in stack.period
    )


def flops_per_token(config: ModelConfig, seq_len: int, *, trained: Trained) -> float:
    """Floating-point operations for one token of a row of `seq_len` tokens.

    Args:
        trained: "full" forward and backward, every matrix trained; "lora" forward and backward with frozen
            matrices, the adapters' own small products left out; "none" the forward pass alone.

    Example:
        >>> from jaxpost.models.config import BlockConfig, RopeConfig, StackConfig
        >>> stack = StackConfig(repeats=1, period=(BlockConfig(rope=RopeConfig()),))
        >>> config = ModelConfig(family="llama", vocab_size=8, width=4, mlp_width=6, heads=2, kv_heads=1,
        ...                      head_dim=2, stacks=(stack,), max_positions=16)
        >>> forward = flops_per_token(config, 4, trained="none")
        >>> flops_per_token(config, 4, trained="full") / forward
        3.0
    """
    matrices = 2 * matrix_count(config)
    attention = attention_flops_per_token(config, seq_len)
    passes = {"none": (1, 1), "lora": (2, 3), "full": (3, 3)}[trained]
    return passes[0] * matrices + passes[1] * attention
