"""GGUF files in: weights dequantised, architecture and tokenizer rebuilt as a Hugging Face folder. Needs no torch.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, read through the `gguf` package.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from jaxpost.models.config import ModelConfig
from jaxpost.models.families import config_from_hf, config_to_hf
from jaxpost.models.table import parameter_table
from jaxpost.weights.files import TensorInfo, replaced_folder, write_checkpoint
from jaxpost.weights.gguf_tokenizer import write_tokenizer
from jaxpost.weights.huggingface import sources

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""GGUF `general.architecture` values that are read; each is also a family's name."""

_NAMES = {
    ("embed", "table"): "token_embd.weight",
    ("final_norm", "scale"): "output_norm.weight",
    ("lm_head", "kernel"): "output.weight",
    ("attn_norm", "scale"): "blk.{layer}.attn_norm.weight",
    ("mlp_norm", "scale"): "blk.{layer}.ffn_norm.weight",
    ("q_norm", "scale"): "blk.{layer}.attn_q_norm.weight",
    ("k_norm", "scale"): "blk.{layer}.attn_k_norm.weight",
} | {
    (module, leaf): f"blk.{{layer}}.{name}.{kind}"
    for module, name in {
        "q_proj": "attn_q",
        "k_proj": "attn_k",
        "v_proj": "attn_v",
        "o_proj": "attn_output",
        "gate_proj": "ffn_gate",
        "up_proj": "ffn_up",
        "down_proj": "ffn_down",
    }.items()
    for leaf, kind in (("kernel", "weight"), ("bias", "bias"))
}
_ROPE_FACTORS = "rope_freqs.weight"


def convert(
    gguf_path: Path | str,
    out_folder: Path | str,
    progress: Callable[[int, int], None] | None = None,
    *,
    dtype: Any = np.float32,
    overwrite: bool = False,
) -> ModelConfig:
    """Write a GGUF model as a Hugging Face folder (config, safetensors, tokenizer); returns its architecture.

    Quantised tensors are dequantised one at a time; the query and key rows, which GGUF interleaves for Llama,
    are put back in halves. The folder appears at once when all is written.

    Args:
        gguf_path: a single .gguf file.
        out_folder: where to; must not exist unless `overwrite`.
        progress: called with (tensors written, all tensors).
        dtype: of the written weights.
        overwrite: replace an existing folder.

    Raises:
        FileNotFoundError: no such file.
        FileExistsError: the folder exists.
        ValueError: an architecture, tokenizer, tensor or quantisation that is not read, naming it.
    """
    path = Path(gguf_path)
    reader, meta = _open(path)
    try:
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        config = _config(meta, tensors)
        names = _match(config, tensors)
        infos = [
            TensorInfo(hf_name, tuple(int(n) for n in reversed(tensors[name].shape)), np.dtype(dtype))
            for hf_name, name in names.items()
        ]
        done = 0

        def fetch(info: TensorInfo) -> np.ndarray:
            nonlocal done
            name = names[info.name]
            array = _dequantize(tensors[name])
            if config.family == "llama" and (".attn_q." in name or ".attn_k." in name):
                array = _deinterleave(array, config.head_dim)
            done += 1
            if progress is not None:
                progress(done, len(infos))
            return array.astype(info.dtype, copy=False)

        with replaced_folder(Path(out_folder), overwrite=overwrite) as new:
            special = write_tokenizer(meta, new)
            hf = config_to_hf(config) | special | {"dtype": str(np.dtype(dtype))}
            (new / "config.json").write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")
            generation = json.dumps(special, indent=2)
            (new / "generation_config.json").write_text(generation + "\n", encoding="utf-8")
            write_checkpoint(new, infos, fetch, max_shard_bytes=5_000_000_000)
    except ValueError as err:
        raise ValueError(f"{path}: {err}") from err
    return config


def _open(path: Path) -> tuple[gguf.GGUFReader, dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        reader = gguf.GGUFReader(path)
        return reader, {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, OSError) as err:
        raise ValueError(f"{path} is not a readable GGUF file ({err})") from err


def _config(meta: Mapping[str, Any], tensors: Mapping[str, gguf.ReaderTensor]) -> ModelConfig:
    arch = meta.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise ValueError(f"the architecture {arch!r} is not read from GGUF; supported: {', '.join(ARCHITECTURES)}")
    if meta.get("split.count", 1) > 1:
        raise ValueError("the model is split over several GGUF files; merge them first (llama-gguf-split --merge)")

    def get(name: str, default: Any = None) -> Any:
        value = meta.get(f"{arch}.{name}", default)
        if value is None:
            raise ValueError(f"the metadata {arch}.{name} is missing")
        # Stored as float32: take the shortest decimal, so that 1e-5 is 1e-05 and not 9.99999974e-06.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    width, heads = get("embedding_length"), get("attention.head_count")
    head_dim = get("attention.key_length", width // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if get(name, head_dim) != head_dim:
            raise ValueError(f"{arch}.{name} = {get(name)} differs from the head width {head_dim}; not supported")
    if "token_embd.weight" not in tensors:
        raise ValueError("the tensor token_embd.weight is missing")
    hf = {
        "model_type": arch,
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": width,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_parameters": _rope(meta, arch, get("rope.freq_base", 10_000.0), head_dim, tensors),
    }
    if arch != "qwen2":  # whose queries, keys and values always have biases
        hf["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if arch == "llama":
        hf["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    return config_from_hf(hf)


def _rope(
    meta: Mapping[str, Any], arch: str, theta: float, head_dim: int, tensors: Mapping[str, gguf.ReaderTensor]
) -> dict[str, Any]:
    """transformers' rope_parameters from GGUF's metadata and, for Llama 3.x, its tensor of frequency factors."""
    settings: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    kind = meta.get(f"{arch}.rope.scaling.type", "none")
    if kind in ("linear", "yarn"):
        settings |= {"rope_type": kind, "factor": float(meta[f"{arch}.rope.scaling.factor"])}
        if kind == "yarn":
            original = meta[f"{arch}.rope.scaling.original_context_length"]
            settings["original_max_position_embeddings"] = int(original)
    elif kind != "none":
        raise ValueError(f"{arch}.rope.scaling.type = {kind!r} is not supported (only none, linear, yarn)")
    if _ROPE_FACTORS not in tensors:
        return settings
    # The file holds the quotient of plain and scaled frequencies; Llama 3.1 to 3.3 differ in `factor` alone.
    factors = np.asarray(tensors[_ROPE_FACTORS].data, np.float64).reshape(-1)
    llama3 = {"factor": float(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((8192 / wavelength - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    expected = 1.0 / ((1.0 - smooth) / llama3["factor"] + smooth)
    if kind != "none" or factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise ValueError(f"{_ROPE_FACTORS} is not the RoPE scaling of Llama 3.x; no other is known")
    return settings | llama3 | {"rope_type": "llama3", "original_max_position_embeddings": 8192}


def _match(config: ModelConfig, tensors: Mapping[str, gguf.ReaderTensor]) -> dict[str, str]:
    """{Hugging Face tensor name: GGUF tensor name}. Raises ValueError for missing and unknown tensors."""
    names: dict[str, str] = {}
    for source in sources(config, parameter_table(config)):
        spec = source.spec
        for repeat, hf_name in enumerate(source.names):
            layer = config.layer_index(int(spec.path[1]), repeat, int(spec.path[2])) if source.stacked else 0
            names[hf_name] = _NAMES[spec.path[-2], spec.path[-1]].format(layer=layer)
    missing = sorted(set(names.values()) - set(tensors))
    extra = sorted(set(tensors) - set(names.values()) - {_ROPE_FACTORS})
    if missing or extra:
        what = f"lacks the tensor {missing[0]}" if missing else f"holds the unknown tensor {extra[0]}"
        raise ValueError(f"{what} for a {config.family} model of {config.num_layers} layers")
    return names


def _dequantize(tensor: gguf.ReaderTensor) -> np.ndarray:
    try:
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as err:
        raise ValueError(f"{tensor.name} has the quantisation {tensor.tensor_type.name}, which is not read") from err
    return array.reshape(tuple(int(n) for n in reversed(tensor.shape)))


def _deinterleave(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Undo the interleaving of Llama's query and key rows.

    llama.cpp's RoPE rotates neighbouring rows (2i, 2i + 1) of a head; ours, as transformers', rows (i, i + H/2).

    >>> _deinterleave(np.asarray([0, 2, 1, 3]), 4)
    array([0, 1, 2, 3])
    """
    heads = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return heads.swapaxes(1, 2).reshape(rows.shape)
