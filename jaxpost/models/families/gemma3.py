"""Gemma 3 text models (2503.19786): five local layers to one global, norms stored as scale - 1, four norms a layer.

A multimodal checkpoint (model_type "gemma3") is read without its vision part and written as a text model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxpost.models.config import BlockConfig, ModelConfig, RopeConfig
from jaxpost.models.families.common import (
    Fields,
    check_layer_types,
    decoder_keys,
    group_layers,
    layer_blocks,
    layer_types,
    read_activation,
    rope_from_dict,
    rope_to_dict,
    shared_window,
    write_activation,
)

KEYS = decoder_keys(
    attn_norm="input_layernorm",
    attn_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
    q_norm="self_attn.q_norm",
    k_norm="self_attn.k_norm",
)


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a Gemma 3 config.json. Raises ValueError for a field that we do not compute.

    Absent fields take transformers' defaults, since published multimodal files rely on them.
    """
    if hf.get("model_type") == "gemma3":
        tied = {"tie_word_embeddings": hf["tie_word_embeddings"]} if "tie_word_embeddings" in hf else {}
        hf = tied | dict(hf.get("text_config") or {})
    f = Fields(hf)
    width, heads, layers = (
        f.integer("hidden_size", 2304),
        f.integer("num_attention_heads", 8),
        f.integer("num_hidden_layers", 26),
    )
    max_positions = f.integer("max_position_embeddings", 131_072)
    bias = f.flag("attention_bias", False)
    f.only("attention_dropout", 0.0)
    f.only("use_bidirectional_attention", False)
    config = ModelConfig(
        family="gemma3",
        vocab_size=f.integer("vocab_size", 262_208),
        width=width,
        mlp_width=f.integer("intermediate_size", 9216),
        heads=heads,
        kv_heads=f.integer("num_key_value_heads", 4),
        head_dim=f.integer("head_dim", 256),
        stacks=group_layers(_blocks(f, layers, max_positions)),
        max_positions=max_positions,
        norm_eps=f.number("rms_norm_eps", 1e-6),
        norm_offset=1.0,
        activation=read_activation(f.get("hidden_activation", "gelu_pytorch_tanh")),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        post_norms=True,
        embed_scale=width**0.5,
        attention_scale=f.number("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=f.number("attn_logit_softcapping", None),
        final_softcap=f.number("final_logit_softcapping", None),
        tie_embeddings=f.flag("tie_word_embeddings", True),
    )
    f.finish()
    return config


def _blocks(f: Fields, layers: int, max_positions: int) -> list[BlockConfig]:
    pattern = f.integer("sliding_window_pattern", 6)
    default = ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers)]
    types = check_layer_types(f.get("layer_types", default), layers)
    ropes = f.get("rope_parameters", {})
    if ropes and not set(ropes) <= {"full_attention", "sliding_attention"}:
        raise ValueError("rope_parameters of Gemma 3 must hold full_attention and sliding_attention")
    # The older rope_scaling applies to global layers only.
    settings = {"full_attention": f.get("rope_scaling", {}), "sliding_attention": {}}
    thetas = {
        "full_attention": f.number("rope_theta", 1_000_000.0),
        "sliding_attention": f.number("rope_local_base_freq", 10_000.0),
    }
    kinds = {
        kind: BlockConfig(
            rope=rope_from_dict(
                dict(ropes.get(kind) or {}) | settings[kind], theta=thetas[kind], max_positions=max_positions
            ),
            window=None if kind == "full_attention" else f.integer("sliding_window", 4096),
        )
        for kind in settings
    }
    return [kinds[kind] for kind in types]


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json of a Gemma 3 text model; inverse of `config_from_hf`."""
    ropes = {"full_attention": RopeConfig(theta=1_000_000.0), "sliding_attention": RopeConfig(theta=10_000.0)}
    for block in layer_blocks(config):
        ropes["full_attention" if block.window is None else "sliding_attention"] = block.rope
    new = {kind: rope_to_dict(rope) for kind, rope in ropes.items()}
    scaled = ropes["full_attention"].scaling != "none"
    scaling = {k: v for k, v in new["full_attention"].items() if k != "rope_theta"} if scaled else None
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_activation": write_activation(config.activation),
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.qkv_bias,
        "query_pre_attn_scalar": round(config.attention_scale**-2) if config.attention_scale else config.head_dim,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.final_softcap,
        "sliding_window": shared_window(config) or 4096,
        "layer_types": layer_types(config),
        "tie_word_embeddings": config.tie_embeddings,
        "rope_parameters": new,
        # The names of transformers 4, for readers that know only those.
        "rope_theta": ropes["full_attention"].theta,
        "rope_local_base_freq": ropes["sliding_attention"].theta,
        "rope_scaling": scaling,
    }
