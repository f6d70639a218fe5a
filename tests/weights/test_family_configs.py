"""config.json of published models in, and out again so that transformers reads the same."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import transformers

from jaxpost.models.config import BlockConfig, RopeConfig
from jaxpost.models.families import FAMILIES, config_from_hf, config_to_hf
from jaxpost.models.families.common import group_layers, layer_blocks
from jaxpost.models.table import parameter_table
from jaxpost.weights.huggingface import sources

SMOLLM2 = {
    "_name_or_path": "x", "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.04,
    "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
    "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None,
    "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers.js_config": {"a": 1},
    "transformers_version": "4.42.3", "use_cache": True, "vocab_size": 49152,
}  # fmt: skip
LLAMA32 = {
    "attention_bias": False, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192,
    "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32,
    "num_hidden_layers": 16, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "tie_word_embeddings": True, "vocab_size": 128256,
}  # fmt: skip
QWEN25 = {
    "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN25_YARN = QWEN25 | {
    "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
}  # fmt: skip
QWEN3 = {
    "attention_bias": False, "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
    "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
GEMMA3_1B = {
    "attention_bias": False, "attn_logit_softcapping": None, "cache_implementation": "hybrid",
    "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
    "intermediate_size": 6912, "max_position_embeddings": 32768, "model_type": "gemma3_text",
    "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1, "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144,
}  # fmt: skip
GEMMA3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "mm_tokens_per_image": 256,
    "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
                    "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                    "sliding_window": 1024},
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}  # fmt: skip
MISTRAL = {
    "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
    "vocab_size": 32000,
}  # fmt: skip
PUBLISHED = {
    "mistral": MISTRAL,
    "mistral-no-window": MISTRAL | {"sliding_window": None},
    "mistral-default-window": {name: value for name, value in MISTRAL.items() if name != "sliding_window"},
    "smollm2": SMOLLM2,
    "llama-3.2": LLAMA32,
    "qwen2.5": QWEN25,
    "qwen2.5-yarn": QWEN25_YARN,
    "qwen2-windows": QWEN25 | {"use_sliding_window": True, "sliding_window": 4096},
    "qwen3": QWEN3,
    "gemma3-1b": GEMMA3_1B,
    "gemma3-4b": GEMMA3_4B,
}


def as_transformers_reads(hf: dict, folder) -> dict:
    """What transformers makes of a config.json, without what only describes the file."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf))
    config = transformers.AutoConfig.from_pretrained(folder)
    config = getattr(config, "text_config", config)
    kept = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
        hidden_act hidden_activation max_position_embeddings rms_norm_eps attention_bias mlp_bias sliding_window
        query_pre_attn_scalar layer_types tie_word_embeddings final_logit_softcapping attn_logit_softcapping
        rope_parameters"""
    out = {name: getattr(config, name) for name in kept.split() if hasattr(config, name)}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return out | {"head_dim": head_dim}


@pytest.mark.parametrize("name", PUBLISHED)
def test_written_config_means_the_same_to_transformers(name, tmp_path):
    config = config_from_hf(PUBLISHED[name])
    expected = as_transformers_reads(PUBLISHED[name], tmp_path / "a")
    got = as_transformers_reads(config_to_hf(config), tmp_path / "b")
    got.pop("rope_scaling", None)
    for rope in _ropes(expected) + _ropes(got):
        rope.pop("type", None)  # the older spelling of rope_type
        if rope["rope_type"] == "yarn":  # transformers' defaults, which we write out
            rope.setdefault("beta_fast", 32.0)
            rope.setdefault("beta_slow", 1.0)
    assert got == expected
    assert config_from_hf(config_to_hf(config)) == config


def _ropes(config: dict) -> list[dict]:
    rope = config["rope_parameters"]
    return [rope] if "rope_type" in rope else list(rope.values())


def test_published_architectures_are_read_right():
    smol = config_from_hf(SMOLLM2)
    assert (smol.width, smol.heads, smol.kv_heads, smol.head_dim, smol.num_layers) == (576, 9, 3, 64, 30)
    assert smol.tie_embeddings
    assert smol.stacks[0].period[0].rope == RopeConfig(theta=100_000.0)
    llama = config_from_hf(LLAMA32).stacks[0].period[0].rope
    assert llama == RopeConfig(theta=5e5, scaling="llama3", factor=32.0, original_max_positions=8192)
    assert config_from_hf(QWEN25).qkv_bias
    windows = [b.window for b in layer_blocks(config_from_hf(PUBLISHED["qwen2-windows"]))]
    assert windows == [None] * 21 + [4096] * 3
    mistral = [{b.window for b in layer_blocks(config_from_hf(PUBLISHED[n]))} for n in PUBLISHED if "mistral" in n]
    assert mistral == [{4096}, {None}, {4096}]
    gemma = config_from_hf(GEMMA3_1B)
    assert [(s.repeats, len(s.period)) for s in gemma.stacks] == [(4, 6), (2, 1)]
    assert [b.window for b in layer_blocks(gemma)][4:7] == [512, None, 512]
    assert gemma.embed_scale == 1152**0.5
    assert gemma.attention_scale == 1 / 16
    four = config_from_hf(GEMMA3_4B)
    ropes = {b.window: b.rope for b in layer_blocks(four)}
    assert ropes == {1024: RopeConfig(theta=1e4), None: RopeConfig(theta=1e6, scaling="linear", factor=8.0)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_parameter_has_one_tensor_name(name):
    config = config_from_hf(PUBLISHED[name])
    names = [n for source in sources(config, parameter_table(config)) for n in source.names]
    assert len(names) == len(set(names))
    per_layer = [n for n in names if ".layers." in n]
    layers = sorted({int(n.split(".")[2]) for n in per_layer})
    assert layers == list(range(config.num_layers))
    assert len(per_layer) % config.num_layers == 0


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            {"model_type": "gpt2"},
            r"model_type 'gpt2' is not supported; supported families: llama, qwen2, qwen3, gemma3",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE type 'dynamic'"),
        ({"rope_scaling": {"type": "linear"}}, "RoPE setting 'factor' is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "short_factor": [1.0]}}, "short_factor"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "truncate"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"hidden_act": "relu"}, "activation 'relu'"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"num_experts": 8}, "num_experts = 8"),
        ({"hidden_size": "big"}, "hidden_size = 'big' must be a whole number"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"tie_word_embeddings": "yes"}, "must be true or false"),
    ],
)
def test_what_is_not_computed_is_refused(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        config_from_hf(SMOLLM2 | change)


@pytest.mark.parametrize(
    ("base", "change", "complaint"),
    [
        (QWEN3, {"layer_types": ["full_attention"]}, "1 entries for 28 layers"),
        (QWEN3, {"layer_types": ["linear_attention"] * 28}, "linear_attention"),
        (QWEN3, {"layer_types": ["sliding_attention"] * 28}, "use_sliding_window"),
        (GEMMA3_1B, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (GEMMA3_1B, {"rope_parameters": {"rope_type": "default"}}, "full_attention and sliding_attention"),
    ],
)
def test_what_a_family_does_not_compute_is_refused(base, change, complaint):
    with pytest.raises(ValueError, match=complaint):
        config_from_hf(base | change)


@pytest.mark.parametrize(
    ("base", "change", "lost"),
    [
        (SMOLLM2, {"qk_norm": True}, "qk_norm"),
        (SMOLLM2, {"final_softcap": 30.0, "embed_scale": 2.0}, "embed_scale, final_softcap"),
        (QWEN25, {"qkv_bias": False}, "qkv_bias"),
        (QWEN3, {"out_bias": True}, "out_bias"),
        (GEMMA3_1B, {"norm_offset": 0.0}, "norm_offset"),
    ],
)
def test_a_family_refuses_to_write_what_its_format_cannot_say(base, change, lost):
    with pytest.raises(ValueError, match=f"cannot express this model's {lost}"):
        config_to_hf(replace(config_from_hf(base), **change))


def test_layers_are_grouped_into_the_fewest_blocks():
    a, b, c = (BlockConfig(rope=RopeConfig(), window=w) for w in (1, 2, None))
    for layers, groups in {
        (a, a, a, a): [(4, 1)],
        (a, b, a, b, a, b): [(3, 2)],
        (a, a, b, a, a, b, a): [(2, 3), (1, 1)],
        (a, a, a, b, b, c): [(3, 1), (2, 1), (1, 1)],
        (c,): [(1, 1)],
    }.items():
        stacks = group_layers(layers)
        assert tuple(block for s in stacks for _ in range(s.repeats) for block in s.period) == layers
        assert sum(len(s.period) for s in stacks) == sum(p for _, p in groups)


def test_every_family_is_tested_here():
    assert {hf["model_type"] for hf in PUBLISHED.values()} == set(FAMILIES)
