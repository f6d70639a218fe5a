"""What the family maps share: reading config.json strictly, RoPE settings, grouping layers, common weight names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jaxpost.models.config import BlockConfig, ModelConfig, RopeConfig, StackConfig


class Key(NamedTuple):
    """Where a parameter lives in a Hugging Face checkpoint.

    `template` names the tensor ("{layer}" stands for the layer's number); `transpose` is set for matrices
    that the checkpoint stores [out, in].
    """

    template: str
    transpose: bool = False


Keys = Mapping[tuple[str, str], Key]
"""Our (module, leaf) -> checkpoint tensor."""


def decoder_keys(**norms: str) -> dict[tuple[str, str], Key]:
    """Weight names that all supported families share; `norms` maps our norm modules to the checkpoint's names.

    >>> decoder_keys(attn_norm="input_layernorm")["q_proj", "kernel"]
    Key(template='model.layers.{layer}.self_attn.q_proj.weight', transpose=True)
    """
    layer = "model.layers.{layer}."
    keys = {
        ("embed", "table"): Key("model.embed_tokens.weight"),
        ("final_norm", "scale"): Key("model.norm.weight"),
        ("lm_head", "kernel"): Key("lm_head.weight", transpose=True),
    }
    for module in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        part = "self_attn" if module in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
        keys[module, "kernel"] = Key(f"{layer}{part}.{module}.weight", transpose=True)
        keys[module, "bias"] = Key(f"{layer}{part}.{module}.bias")
    for module, name in norms.items():
        keys[module, "scale"] = Key(f"{layer}{name}.weight")
    return keys


# Fields that say nothing of the computation: provenance, generation defaults, classification heads.
_DESCRIPTIVE = frozenset(
    [
        "_attn_implementation_autoset",
        "_name_or_path",
        "_sliding_window_pattern",
        "architectures",
        "bos_token_id",
        "cache_implementation",
        "chunk_size_feed_forward",
        "classifier_dropout",
        "dtype",
        "eos_token_id",
        "finetuning_task",
        "id2label",
        "initializer_range",
        "is_llama_config",
        "label2id",
        "max_length",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "sep_token_id",
        "task_specific_params",
        "token_classification_bias",
        "tokenizer_class",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "unk_token_id",
        "use_cache",
    ]
)
_REQUIRED: Any = object()


class Fields:
    """The fields of a config.json; remembers which were read, so that none is silently ignored."""

    def __init__(self, hf: Mapping[str, Any]) -> None:
        self._hf = hf
        self._read: set[str] = set()

    def get(self, name: str, default: Any = _REQUIRED) -> Any:
        """Value of a field; an absent or null one gives `default`. Raises ValueError where there is none."""
        self._read.add(name)
        value = self._hf.get(name)
        if value is None:
            if default is _REQUIRED:
                raise ValueError(f"the field {name!r} is missing")
            return default
        return value

    def integer(self, name: str, default: Any = _REQUIRED) -> Any:
        """A whole number, or `default`. Raises ValueError for anything else."""
        return self._typed(name, default, int, "a whole number")

    def number(self, name: str, default: Any = _REQUIRED) -> Any:
        """A float, or `default`. Raises ValueError for anything else."""
        value = self._typed(name, default, (int, float), "a number")
        return None if value is None else float(value)

    def flag(self, name: str, default: bool) -> bool:
        """true or false. Raises ValueError for anything else."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"{name} = {value!r} must be true or false")
        return value

    def _typed(self, name: str, default: Any, kind: Any, wanted: str) -> Any:
        value = self.get(name, default)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ValueError(f"{name} = {value!r} must be {wanted}")
        return value

    def only(self, name: str, supported: Any) -> None:
        """Accept a field only with the value that we compute. Raises ValueError otherwise."""
        value = self.get(name, supported)
        if value != supported:
            raise ValueError(f"{name} = {value!r} is not supported (only {supported!r})")

    def finish(self) -> None:
        """Refuse fields that were not read and could change the computation (null, false and empty ones cannot)."""
        left = {k: v for k, v in self._hf.items() if k not in self._read and k not in _DESCRIPTIVE and v}
        if left:
            listed = ", ".join(f"{k} = {v!r}"[:100] for k, v in sorted(left.items()))
            raise ValueError(
                f"fields that jaxpost does not know: {listed}; if they do not change the computation, remove them"
            )


def read_activation(name: str) -> Literal["silu", "gelu_tanh"]:
    """Our name of an MLP activation. Raises ValueError for one that we do not compute."""
    known: dict[str, Literal["silu", "gelu_tanh"]] = {
        "silu": "silu",
        "swish": "silu",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_new": "gelu_tanh",
    }
    if name not in known:
        raise ValueError(f"the activation {name!r} is not supported (only {', '.join(known)})")
    return known[name]


def write_activation(name: Literal["silu", "gelu_tanh"]) -> str:
    """The checkpoint's name of an activation."""
    return {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}[name]


def read_rope(fields: Fields, max_positions: int) -> RopeConfig:
    """RoPE settings that hold for every layer: `rope_parameters`, or the older `rope_theta` and `rope_scaling`."""
    scaling, newer = fields.get("rope_scaling", {}), fields.get("rope_parameters", {})
    return rope_from_dict(
        dict(scaling or newer),
        theta=fields.number("rope_theta", newer.get("rope_theta", 10_000.0)),
        max_positions=max_positions,
        original=fields.integer("original_max_position_embeddings", None),
    )


def rope_from_dict(
    settings: Mapping[str, Any], *, theta: float, max_positions: int, original: int | None = None
) -> RopeConfig:
    """One block kind's RoPE from transformers' dictionary; `theta` where the dictionary has none.

    Raises ValueError for a RoPE type or setting that we do not compute.

    >>> rope_from_dict({"rope_type": "linear", "factor": 8.0}, theta=1e6, max_positions=4096).factor
    8.0
    """
    left = {k: v for k, v in settings.items() if v is not None}
    older = left.pop("type", "default")
    kind = left.pop("rope_type", older)
    theta = float(left.pop("rope_theta", theta))
    original = int(original or left.get("original_max_position_embeddings", max_positions))
    left.pop("original_max_position_embeddings", None)
    if float(left.pop("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("partial_rotary_factor other than 1 is not supported")
    if kind == "default":
        rope = RopeConfig(theta=theta)
    elif kind == "linear":
        rope = RopeConfig(theta=theta, scaling="linear", factor=_take(left, "factor"))
    elif kind == "llama3":
        rope = RopeConfig(
            theta=theta,
            scaling="llama3",
            factor=_take(left, "factor"),
            low_freq_factor=_take(left, "low_freq_factor"),
            high_freq_factor=_take(left, "high_freq_factor"),
            original_max_positions=original,
        )
    elif kind == "yarn":
        factor = _take(left, "factor", max_positions / original)
        if not left.pop("truncate", True):
            raise ValueError("yarn with truncate = false is not supported")
        rope = RopeConfig(
            theta=theta,
            scaling="yarn",
            factor=factor,
            original_max_positions=original,
            beta_fast=_take(left, "beta_fast", 32.0) or 32.0,
            beta_slow=_take(left, "beta_slow", 1.0) or 1.0,
            attention_factor=_yarn_attention_factor(left, factor),
        )
    else:
        raise ValueError(f"the RoPE type {kind!r} is not supported (only default, linear, llama3, yarn)")
    if left:
        raise ValueError(f"RoPE settings that the type {kind!r} does not use: {', '.join(sorted(left))}")
    return rope


def _take(left: dict[str, Any], name: str, default: float | None = None) -> float:
    value = left.pop(name, default)
    if value is None:
        raise ValueError(f"the RoPE setting {name!r} is missing")
    return float(value)


def _yarn_attention_factor(left: dict[str, Any], factor: float) -> float | None:
    given, top, bottom = (left.pop(k, None) for k in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is not None:
        return float(given)
    if not (top and bottom) or factor <= 1.0:
        return None
    return (0.1 * top * math.log(factor) + 1.0) / (0.1 * bottom * math.log(factor) + 1.0)


def rope_to_dict(rope: RopeConfig) -> dict[str, Any]:
    """The dictionary that transformers 5 reads under `rope_parameters`; inverse of `rope_from_dict`."""
    out: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.theta}
    if rope.scaling != "none":
        out |= {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling in ("llama3", "yarn"):
        out["original_max_position_embeddings"] = rope.original_max_positions
    if rope.scaling == "llama3":
        out |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.scaling == "yarn":
        out |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        if rope.attention_factor is not None:
            out["attention_factor"] = rope.attention_factor
    return out


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """config.json fields of a RoPE that all layers share, with the names of transformers 5 and 4.

    A reader of the older names would otherwise take its default theta without a word.
    """
    new = rope_to_dict(rope)
    out: dict[str, Any] = {"rope_parameters": new, "rope_theta": rope.theta}
    if rope.scaling != "none":
        out["rope_scaling"] = {k: v for k, v in new.items() if k != "rope_theta"}
    return out


def shared_rope(config: ModelConfig) -> RopeConfig:
    """The one RoPE of a model whose layers all have the same. Raises ValueError where they differ."""
    ropes = {block.rope for block in layer_blocks(config)}
    if len(ropes) != 1:
        raise ValueError(f"the family {config.family!r} cannot store a different RoPE per layer")
    return ropes.pop()


def layer_blocks(config: ModelConfig) -> list[BlockConfig]:
    """The block of every layer, in the order in which checkpoints count them."""
    return [block for stack in config.stacks for _ in range(stack.repeats) for block in stack.period]


def group_layers(blocks: Sequence[BlockConfig]) -> tuple[StackConfig, ...]:
    """Split layers into stacks of repeated periods so that the fewest blocks are compiled.

    Dynamic programme over prefixes: a stack costs its period's length, and half a block for being one more scan.

    >>> local, full = BlockConfig(rope=RopeConfig(), window=4), BlockConfig(rope=RopeConfig())
    >>> [(s.repeats, len(s.period)) for s in group_layers(([local] * 5 + [full]) * 4 + [local] * 2)]
    [(4, 6), (2, 1)]
    """
    kinds = list(dict.fromkeys(blocks))
    ids = [kinds.index(block) for block in blocks]
    best: list[tuple[float, tuple[tuple[int, int, int], ...]]] = [(0.0, ())]
    for end in range(1, len(ids) + 1):
        options = []
        for start in range(end):
            cost, stacks = best[start]
            # Smallest period p, dividing the length, under which layers[start:end] repeats.
            length = end - start
            period = next(p for p in _divisors(length) if ids[start : end - p] == ids[start + p : end])
            options.append((cost + period + 0.5, (*stacks, (start, period, length // period))))
        # Of equally cheap ways take the one whose remainder comes last.
        best.append(min(reversed(options), key=lambda option: option[0]))
    return tuple(
        StackConfig(repeats=repeats, period=tuple(blocks[start : start + period]))
        for start, period, repeats in best[-1][1]
    )


def _divisors(n: int) -> list[int]:
    return [p for p in range(1, n + 1) if n % p == 0]


def uniform_stack(layers: int, rope: RopeConfig) -> tuple[StackConfig, ...]:
    """One stack of equal full-attention layers."""
    return (StackConfig(repeats=layers, period=(BlockConfig(rope=rope),)),)


def read_windows(fields: Fields, layers: int) -> list[int | None]:
    """Sliding window of each layer from Qwen's fields: `use_sliding_window`, `sliding_window`, `max_window_layers`."""
    window = fields.integer("sliding_window", None)
    window = window if fields.flag("use_sliding_window", False) else None
    first, types = fields.integer("max_window_layers", 28), fields.get("layer_types", None)
    if types is None:
        return [window if i >= first else None for i in range(layers)]
    types = check_layer_types(types, layers)
    if window is None and "sliding_attention" in types:
        raise ValueError(
            "layer_types has sliding_attention, but use_sliding_window is off or sliding_window is missing"
        )
    return [window if kind == "sliding_attention" else None for kind in types]


def write_windows(config: ModelConfig) -> dict[str, Any]:
    """Qwen's window fields of a model; inverse of `read_windows`."""
    windows = [block.window for block in layer_blocks(config)]
    used = [w is not None for w in windows]
    return {
        "use_sliding_window": any(used),
        "sliding_window": shared_window(config),
        "max_window_layers": used.index(True) if any(used) else len(used),
        "layer_types": layer_types(config),
    }


def shared_window(config: ModelConfig) -> int | None:
    """The one window width of a model's sliding layers, None without any. Raises ValueError where they differ."""
    widths = {block.window for block in layer_blocks(config)} - {None}
    if len(widths) > 1:
        raise ValueError(f"the family {config.family!r} cannot store windows of different widths")
    return widths.pop() if widths else None


def layer_types(config: ModelConfig) -> list[str]:
    """transformers' name of each layer's attention."""
    return ["full_attention" if b.window is None else "sliding_attention" for b in layer_blocks(config)]


def check_layer_types(types: Sequence[str], layers: int) -> Sequence[str]:
    """Return `types` if there is one known type per layer. Raises ValueError otherwise."""
    unknown = set(types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ValueError(f"layer_types has {', '.join(sorted(unknown))}; only full_attention and sliding_attention")
    if len(types) != layers:
        raise ValueError(f"layer_types has {len(types)} entries for {layers} layers")
    return types
