"""Tiny architectures of every family, and random parameters for them."""

from __future__ import annotations

import numpy as np

from jaxpost.models.config import ModelConfig
from jaxpost.models.table import nest, parameter_table

TINY = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
TINY_FAMILIES = {
    "llama": {**TINY, "model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-tied": {**TINY, "model_type": "llama", "head_dim": 8, "tie_word_embeddings": True},
    "mistral": {**TINY, "model_type": "mistral", "sliding_window": 4},
    "qwen2": {**TINY, "model_type": "qwen2"},
    "qwen3": {**TINY, "model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": True},
    "gemma3": {**TINY, "model_type": "gemma3_text", "num_hidden_layers": 8, "head_dim": 8, "sliding_window": 4},
}


def random_params(config: ModelConfig, dtype=np.float32, seed: int = 0):
    """NumPy parameters without structure."""
    rng = np.random.default_rng(seed)
    return nest({s.path: rng.normal(size=s.shape).astype(np.float32).astype(dtype) for s in parameter_table(config)})
