"""Mistral 7B (2310.06825) and others of the same shape: a Llama whose layers may all have one sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxpost.models.config import BlockConfig, ModelConfig
from jaxpost.models.families.common import (
    Fields,
    decoder_keys,
    group_layers,
    layer_blocks,
    read_activation,
    read_rope,
    shared_rope,
    shared_window,
    write_activation,
    write_rope,
)

KEYS = decoder_keys(attn_norm="input_layernorm", mlp_norm="post_attention_layernorm")
WINDOW = 4096
"""What an absent `sliding_window` means; a null one means none."""


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a Mistral config.json. Raises ValueError for a field that we do not compute."""
    f = Fields(hf)
    width, heads, layers = f.integer("hidden_size"), f.integer("num_attention_heads"), f.integer("num_hidden_layers")
    max_positions = f.integer("max_position_embeddings", 131072)
    rope = read_rope(f, max_positions)
    window = f.integer("sliding_window", None) if "sliding_window" in hf else WINDOW
    f.only("attention_dropout", 0.0)
    config = ModelConfig(
        family="mistral",
        vocab_size=f.integer("vocab_size"),
        width=width,
        mlp_width=f.integer("intermediate_size"),
        heads=heads,
        kv_heads=f.integer("num_key_value_heads", heads),
        head_dim=f.integer("head_dim", width // heads),
        stacks=group_layers([BlockConfig(rope=rope, window=window)] * layers),
        max_positions=max_positions,
        norm_eps=f.number("rms_norm_eps", 1e-6),
        activation=read_activation(f.get("hidden_act", "silu")),
        tie_embeddings=f.flag("tie_word_embeddings", False),
    )
    f.finish()
    return config


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json of a Mistral; inverse of `config_from_hf`. Raises ValueError where only some layers have a window."""
    if len({block.window for block in layer_blocks(config)}) > 1:
        raise ValueError("a mistral checkpoint cannot express windows on some layers only")
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": write_activation(config.activation),
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "sliding_window": shared_window(config),
        "tie_word_embeddings": config.tie_embeddings,
        **write_rope(shared_rope(config)),
    }
