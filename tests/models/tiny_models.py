"""Configurations of two blocks that between them use every feature of the architecture."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from jaxpost.models.config import BlockConfig, ModelConfig, RopeConfig, StackConfig
from jaxpost.models.table import nest
from jaxpost.types import Inputs

VOCAB = 37
LLAMA = ModelConfig(
    family="llama",
    vocab_size=VOCAB,
    width=16,
    mlp_width=24,
    heads=4,
    kv_heads=2,
    head_dim=8,
    stacks=(StackConfig(repeats=2, period=(BlockConfig(rope=RopeConfig()),)),),
    max_positions=64,
)
LOCAL = BlockConfig(rope=RopeConfig(theta=100.0), window=3)
GLOBAL = BlockConfig(rope=RopeConfig(theta=1e4, scaling="linear", factor=2.0))
GEMMA = replace(
    LLAMA,
    family="gemma3",
    stacks=(StackConfig(repeats=2, period=(LOCAL, GLOBAL)), StackConfig(repeats=1, period=(LOCAL,))),
    norm_offset=1.0,
    activation="gelu_tanh",
    qk_norm=True,
    post_norms=True,
    embed_scale=4.0,
    attention_scale=0.3,
    attention_softcap=5.0,
    final_softcap=3.0,
)
QWEN = replace(LLAMA, family="qwen2", qkv_bias=True, out_bias=True, mlp_bias=True, tie_embeddings=False)
CONFIGS = {"llama": LLAMA, "gemma": GEMMA, "qwen": QWEN}


def random_params(model, seed=0):
    """Weights large enough that every part of the model matters; by NumPy, which compiles nothing."""
    rng = np.random.default_rng(seed)
    center = {"scale": 1 - model.config.norm_offset}
    return nest({
        spec.path: jnp.asarray(rng.normal(center.get(spec.path[-1], 0.0), 0.2, spec.shape), jnp.float32)
        for spec in model.table
    })  # fmt: skip


def rows(*lengths, width=None, left=False, seed=0):
    """Random tokens, one sequence a row, padded to `width` on the right or left."""
    rng = np.random.default_rng(seed)
    width = max(lengths) if width is None else width
    tokens, positions, segments = (np.zeros((len(lengths), width), np.int32) for _ in range(3))
    for b, n in enumerate(lengths):
        inside = slice(width - n, width) if left else slice(0, n)
        tokens[b, inside] = rng.integers(0, VOCAB, n)
        positions[b, inside] = np.arange(n)
        segments[b, inside] = 1
    return Inputs(jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(segments))
