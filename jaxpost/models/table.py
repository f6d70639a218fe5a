"""The parameter table: one row per array of a model, from which everything else about it follows.

Initialisation, shardings, import and export, adapter targets, memory and FLOPs are all read from these rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpost.models.config import ModelConfig
from jaxpost.ops.linear import is_leaf
from jaxpost.types import ParamSpec

Path = tuple[str, ...]


def _normal(key, shape, dtype):
    """Normal with standard deviation 0.02, the usual start of decoder-only models."""
    return (0.02 * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def _zeros(key, shape, dtype):
    return jnp.zeros(shape, dtype)


def _ones(key, shape, dtype):
    return jnp.ones(shape, dtype)


def _block_rows(config: ModelConfig) -> list[tuple[str, str, tuple[int, ...], tuple[str, ...], Any]]:
    """(module, leaf, shape, axes, init) of one block, without the leading repeats."""
    c = config
    query, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    norm = _zeros if c.norm_offset == 1.0 else _ones
    linears = [
        ("q_proj", c.width, query, ("embed", "heads"), c.qkv_bias),
        ("k_proj", c.width, kv, ("embed", "kv_heads"), c.qkv_bias),
        ("v_proj", c.width, kv, ("embed", "kv_heads"), c.qkv_bias),
        ("o_proj", query, c.width, ("heads", "embed"), c.out_bias),
        ("gate_proj", c.width, c.mlp_width, ("embed", "mlp"), c.mlp_bias),
        ("up_proj", c.width, c.mlp_width, ("embed", "mlp"), c.mlp_bias),
        ("down_proj", c.mlp_width, c.width, ("mlp", "embed"), c.mlp_bias),
    ]
    norms = [("attn_norm", c.width), ("mlp_norm", c.width)]
    norms += [("q_norm", c.head_dim), ("k_norm", c.head_dim)] if c.qk_norm else []
    norms += [("attn_post_norm", c.width), ("mlp_post_norm", c.width)] if c.post_norms else []
    rows: list[tuple[str, str, tuple[int, ...], tuple[str, ...], Any]]
    rows = [(name, "scale", (size,), ("norm",), norm) for name, size in norms]
    for name, inputs, outputs, axes, bias in linears:
        rows.append((name, "kernel", (inputs, outputs), axes, _normal))
        if bias:
            rows.append((name, "bias", (outputs,), axes[1:], _zeros))
    return rows


def parameter_table(config: ModelConfig) -> tuple[ParamSpec, ...]:
    """Every parameter of `config` with path, shape, logical axes and initialiser; kernels are [in, out].

    Arrays of a stack lead with its repeats (axis "layers").

    Example:
        >>> from jaxpost.models.config import BlockConfig, RopeConfig, StackConfig
        >>> stack = StackConfig(repeats=3, period=(BlockConfig(rope=RopeConfig()),))
        >>> config = ModelConfig(family="llama", vocab_size=8, width=4, mlp_width=6, heads=2, kv_heads=1,
        ...                      head_dim=2, stacks=(stack,), max_positions=16)
        >>> [(spec.path, spec.shape) for spec in parameter_table(config) if "q_proj" in spec.path]
        [(('stacks', '0', '0', 'q_proj', 'kernel'), (3, 4, 4))]
    """
    width, vocab = config.width, config.vocab_size
    norm = _zeros if config.norm_offset == 1.0 else _ones
    table = [ParamSpec(("embed", "table"), (vocab, width), ("vocab", "embed"), _normal)]
    for s, stack in enumerate(config.stacks):
        for b in range(len(stack.period)):
            table += [
                ParamSpec(("stacks", str(s), str(b), module, leaf), (stack.repeats, *shape), ("layers", *axes), init)
                for module, leaf, shape, axes, init in _block_rows(config)
            ]
    table.append(ParamSpec(("final_norm", "scale"), (width,), ("norm",), norm))
    if not config.tie_embeddings:
        table.append(ParamSpec(("lm_head", "kernel"), (width, vocab), ("embed", "vocab"), _normal))
    return tuple(table)


def nest(flat: Mapping[Path, Any]) -> dict[str, Any]:
    """{path: leaf} as nested dicts.

    Example:
        >>> nest({("a", "b"): 1, ("a", "c"): 2})
        {'a': {'b': 1, 'c': 2}}
    """
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def flatten(tree: Mapping[str, Any]) -> dict[Path, Any]:
    """Nested dicts as {path: leaf}; weight leaves such as LoRA stay whole. The inverse of `nest`.

    Example:
        >>> flatten({"a": {"b": 1, "c": 2}})
        {('a', 'b'): 1, ('a', 'c'): 2}
    """
    flat: dict[Path, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and not is_leaf(value):
            flat.update({(key, *path): leaf for path, leaf in flatten(value).items()})
        else:
            flat[(key,)] = value
    return flat


def abstract_params(table: Iterable[ParamSpec], dtype: Any = jnp.float32) -> dict[str, Any]:
    """Shapes and dtype of every parameter, nothing allocated: what checkpoints and shardings are planned from."""
    return nest({spec.path: jax.ShapeDtypeStruct(spec.shape, dtype) for spec in table})


def axes_tree(table: Iterable[ParamSpec]) -> dict[str, Any]:
    """Logical axis names of every parameter, as nested dicts of tuples."""
    return nest({spec.path: spec.axes for spec in table})
