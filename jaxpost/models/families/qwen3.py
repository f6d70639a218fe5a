"""Qwen 3, dense (2505.09388): RMS norm of each query and key head, head width free of the model width."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxpost.models.config import BlockConfig, ModelConfig
from jaxpost.models.families.common import (
    Fields,
    decoder_keys,
    group_layers,
    read_activation,
    read_rope,
    read_windows,
    shared_rope,
    write_activation,
    write_rope,
    write_windows,
)

KEYS = decoder_keys(
    attn_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    q_norm="self_attn.q_norm",
    k_norm="self_attn.k_norm",
)


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a Qwen 3 config.json. Raises ValueError for a field that we do not compute."""
    f = Fields(hf)
    heads, layers = f.integer("num_attention_heads"), f.integer("num_hidden_layers")
    max_positions = f.integer("max_position_embeddings", 32768)
    rope = read_rope(f, max_positions)
    bias = f.flag("attention_bias", False)
    f.only("attention_dropout", 0.0)
    config = ModelConfig(
        family="qwen3",
        vocab_size=f.integer("vocab_size"),
        width=f.integer("hidden_size"),
        mlp_width=f.integer("intermediate_size"),
        heads=heads,
        kv_heads=f.integer("num_key_value_heads", heads),
        head_dim=f.integer("head_dim", 128),
        stacks=group_layers([BlockConfig(rope=rope, window=w) for w in read_windows(f, layers)]),
        max_positions=max_positions,
        norm_eps=f.number("rms_norm_eps", 1e-6),
        activation=read_activation(f.get("hidden_act", "silu")),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        tie_embeddings=f.flag("tie_word_embeddings", False),
    )
    f.finish()
    return config


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json of a Qwen 3; inverse of `config_from_hf`."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
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
        "attention_bias": config.qkv_bias,
        "tie_word_embeddings": config.tie_embeddings,
        **write_windows(config),
        **write_rope(shared_rope(config)),
    }
