"""Llama 2 and 3.x, SmolLM2 and others of the same shape (2307.09288, 2407.21783)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxpost.models.config import ModelConfig
from jaxpost.models.families.common import (
    Fields,
    decoder_keys,
    read_activation,
    read_rope,
    shared_rope,
    uniform_stack,
    write_activation,
    write_rope,
)

KEYS = decoder_keys(attn_norm="input_layernorm", mlp_norm="post_attention_layernorm")


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a Llama config.json. Raises ValueError for a field that we do not compute."""
    f = Fields(hf)
    width, heads, layers = f.integer("hidden_size"), f.integer("num_attention_heads"), f.integer("num_hidden_layers")
    max_positions = f.integer("max_position_embeddings", 2048)
    bias = f.flag("attention_bias", False)
    f.only("attention_dropout", 0.0)
    config = ModelConfig(
        family="llama",
        vocab_size=f.integer("vocab_size"),
        width=width,
        mlp_width=f.integer("intermediate_size"),
        heads=heads,
        kv_heads=f.integer("num_key_value_heads", heads),
        head_dim=f.integer("head_dim", width // heads),
        stacks=uniform_stack(layers, read_rope(f, max_positions)),
        max_positions=max_positions,
        norm_eps=f.number("rms_norm_eps", 1e-6),
        activation=read_activation(f.get("hidden_act", "silu")),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=f.flag("mlp_bias", False),
        tie_embeddings=f.flag("tie_word_embeddings", False),
    )
    f.finish()
    return config


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json of a Llama; inverse of `config_from_hf`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
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
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": config.tie_embeddings,
        **write_rope(shared_rope(config)),
    }
