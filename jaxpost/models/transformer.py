"""The decoder-only transformer: one Flax module declared from the parameter table, blocks as plain functions.

Letters: B rows, T tokens, D width, N query heads, K key/value heads, H head width, F feed-forward width,
V vocabulary, L repeats of a stack, S cache slots.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxpost.models.attend import (
    BlockCache,
    Cache,
    Context,
    Rotation,
    cached_attention,
    stack_buffers,
    with_stack_buffers,
)
from jaxpost.models.cache import DenseCache, init_cache, reserve
from jaxpost.models.config import BlockConfig, ModelConfig, RopeConfig
from jaxpost.models.layouts import GATE_UP, HEAD, QKV, project
from jaxpost.models.pages import PagedCache, slots
from jaxpost.models.table import parameter_table
from jaxpost.ops import attention as attention_ops
from jaxpost.ops import bits, platform
from jaxpost.ops.linear import linear, linear_transposed, take_rows
from jaxpost.ops.norms import rms_norm
from jaxpost.ops.rope import inverse_frequencies, rotate, rotation, yarn_attention_factor
from jaxpost.types import Constrain, Inputs, Model, Outputs, Params, ParamSpec


class Parameters(nn.Module):
    """Declares the rows of a parameter table below one path, and gives them back as nested dicts.

    Outside initialisation a leaf is read with `get_variable`, which takes whatever is there: an array of
    any dtype or a weight leaf such as LoRA, whose shape `self.param` would refuse.
    """

    rows: tuple[tuple[tuple[str, ...], ParamSpec], ...]

    @nn.compact
    def __call__(self, dtype: Any = jnp.float32) -> dict[str, Any]:
        below: dict[str, Any] = {}
        groups: dict[str, list[tuple[tuple[str, ...], ParamSpec]]] = {}
        for path, spec in self.rows:
            if len(path) > 1:
                groups.setdefault(path[0], []).append((path[1:], spec))
            elif self.is_initializing():
                below[path[0]] = self.param(path[0], spec.init, spec.shape, dtype)
            else:
                below[path[0]] = self.get_variable("params", path[0])
        for name, rows in groups.items():
            below[name] = Parameters(tuple(rows), name=name)(dtype)
        return below


def rope_rotation(config: RopeConfig, head_dim: int, positions: Int[Array, "B T"]) -> Rotation:
    """cos and sin [B, T, H/2] of one block kind's rotary embedding at `positions`."""
    frequencies = inverse_frequencies(
        head_dim,
        theta=config.theta,
        scaling=config.scaling,
        factor=config.factor,
        low_freq_factor=config.low_freq_factor,
        high_freq_factor=config.high_freq_factor,
        original_max_positions=config.original_max_positions,
        beta_fast=config.beta_fast,
        beta_slow=config.beta_slow,
    )
    factor = 1.0
    if config.scaling == "yarn":
        given = config.attention_factor
        factor = yarn_attention_factor(config.factor) if given is None else given
    return rotation(positions, frequencies, factor=factor)


def attention_block(
    config: ModelConfig,
    kind: BlockConfig,
    weights: Params,
    x: Float[Array, "B T D"],
    context: Context,
    cache: BlockCache | None,
    *,
    attend: attention_ops.AttentionFn,
    constrain: Constrain,
) -> tuple[Float[Array, "B T D"], BlockCache | None]:
    """Self-attention of one block: projections, optional head norms, RoPE, cache, attention, output."""
    batch, length, _ = x.shape
    counts = (config.heads, config.kv_heads, config.kv_heads)
    names = ("act_heads", "act_kv_heads", "act_kv_heads")
    q, k, v = (
        constrain(y.reshape(batch, length, count, config.head_dim), ("batch", "length", name, None))
        for y, count, name in zip(project(weights, QKV, x), counts, names, strict=True)
    )
    if config.qk_norm:
        q = rms_norm(q, weights["q_norm"]["scale"], eps=config.norm_eps, offset=config.norm_offset)
        k = rms_norm(k, weights["k_norm"]["scale"], eps=config.norm_eps, offset=config.norm_offset)
    cos, sin = context.rotations[kind.rope]
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    out, cache = cached_attention(config, kind, q, k, v, context, cache, attend)
    out = constrain(out, ("batch", "length", "act_heads", None)).reshape(batch, length, -1)
    [out] = project(weights, ("o_proj",), out)
    return out, cache


def mlp_block(
    config: ModelConfig, weights: Params, x: Float[Array, "B T D"], *, constrain: Constrain
) -> Float[Array, "B T D"]:
    """Gated feed-forward layer: down(act(gate(x)) * up(x)) (2002.05202)."""
    gate, up = (constrain(y, ("batch", "length", "act_mlp")) for y in project(weights, GATE_UP, x))
    activate = jax.nn.silu if config.activation == "silu" else partial(jax.nn.gelu, approximate=True)
    [out] = project(weights, ("down_proj",), activate(gate) * up)
    return out


def block(
    config: ModelConfig,
    kind: BlockConfig,
    weights: Params,
    x: Float[Array, "B T D"],
    context: Context,
    cache: BlockCache | None,
    *,
    attend: attention_ops.AttentionFn,
    constrain: Constrain,
) -> tuple[Float[Array, "B T D"], BlockCache | None]:
    """One pre-norm residual block; `post_norms` adds a norm to each branch's output (Gemma)."""

    def norm(name: str, y: Array) -> Array:
        return rms_norm(y, weights[name]["scale"], eps=config.norm_eps, offset=config.norm_offset)

    branch, cache = attention_block(
        config, kind, weights, norm("attn_norm", x), context, cache, attend=attend, constrain=constrain
    )
    if config.post_norms:
        branch = norm("attn_post_norm", branch)
    x = constrain(x + branch, ("batch", "length", "act_embed"))
    branch = mlp_block(config, weights, norm("mlp_norm", x), constrain=constrain)
    if config.post_norms:
        branch = norm("mlp_post_norm", branch)
    return constrain(x + branch, ("batch", "length", "act_embed")), cache


def _remat(body: Callable, remat: platform.Remat) -> Callable:
    """Wraps a scan body so that the backward pass recomputes what `remat` says."""
    chosen = platform.choices().remat if remat == "auto" else remat
    if chosen == "none":
        return body
    # By name and not by primitive: of a product's parts (a low-rank update) only the sum is kept.
    names = (platform.LINEAR_OUTPUT, platform.ATTENTION_RESIDUALS)
    policy = jax.checkpoint_policies.save_only_these_names(*names) if chosen == "dots" else None
    # Inside a scan nothing can be merged across iterations, so the barrier against it only costs time.
    return jax.checkpoint(body, policy=policy, prevent_cse=False)


class Transformer(nn.Module):
    """Embedding, stacks of blocks and final norm, as pure `init` and `apply` over the table's parameters."""

    config: ModelConfig
    attend: attention_ops.AttentionFn
    constrain: Constrain
    remat: platform.Remat
    compute_dtype: DTypeLike

    def setup(self) -> None:
        table = parameter_table(self.config)
        tops: dict[str, list[tuple[tuple[str, ...], ParamSpec]]] = {}
        for spec in table:
            tops.setdefault(spec.path[0], []).append((spec.path[1:], spec))
        self.modules = {name: Parameters(tuple(rows), name=name) for name, rows in tops.items()}

    def declare(self, dtype: Any) -> None:
        """Initialises every parameter in `dtype`."""
        for module in self.modules.values():
            module(dtype)

    def __call__(self, inputs: Inputs, cache: Cache | None = None) -> Outputs:
        x = self._embed(inputs.tokens)
        positions, segments = inputs.positions, inputs.segment_ids
        if cache is not None:
            # A cached row is one sequence: its tokens differ from padding, not from each other.
            segments = (segments != 0).astype(jnp.int32)
        if cache is not None and inputs.prefix_ids is not None:
            raise ValueError("rows with shared prefixes (prefix_ids) cannot be written to a cache")
        kv_positions, kv_segments, place, fresh = positions, segments, None, False
        if isinstance(cache, PagedCache):
            place, fresh = slots(cache, positions, segments != 0), cache.fresh
        elif cache is not None:
            cache, place = reserve(cache, positions, segments != 0)
            # Past the last slot a write would fall onto others' slots: fail loudly.
            x = jnp.where(cache.length <= cache.capacity, x, jnp.nan)
            kv_positions, kv_segments = cache.positions, (cache.positions >= 0).astype(jnp.int32)
        ropes = {kind.rope for stack in self.config.stacks for kind in stack.period}
        rotations = {rope: rope_rotation(rope, self.config.head_dim, positions) for rope in ropes}
        context = Context(positions, segments, kv_positions, kv_segments, rotations, place, fresh, inputs.prefix_ids)
        weights = self.variables["params"]["stacks"]
        for s in range(len(self.config.stacks)):
            x, cache = self._run_stack(s, weights[str(s)], x, context, cache)
        scale = self.modules["final_norm"]()["scale"]
        x = rms_norm(x, scale, eps=self.config.norm_eps, offset=self.config.norm_offset)
        return Outputs(self.constrain(x, ("batch", "length", "act_embed")), cache, {})

    def _embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        table = self.modules["embed"]()["table"]
        # Every device looks up all tokens of its copy in its own columns of the table, then tokens are dealt
        # out again: activations move, and the table and its gradient never leave their shards.
        x = self.constrain(take_rows(table, tokens), ("batch_copies", "length", "embed"))
        if self.config.embed_scale != 1.0:
            x = x * jnp.asarray(self.config.embed_scale, x.dtype)
        return self.constrain(x.astype(self.compute_dtype), ("batch", "length", "act_embed"))

    def _run_stack(
        self, s: int, weights: Params, x: Array, context: Context, cache: Cache | None
    ) -> tuple[Array, Cache | None]:
        """Runs one stack by a scan over its repeats, or one by one where they come as a list (`layouts.unstack`).

        x and the cache are the carry.
        """
        stack = self.config.stacks[s]

        def body(carry, xs):
            x, keys, values = carry
            layer_weights, layer = xs
            if hidden:
                layer_weights = jax.tree.map(bits.show, layer_weights)
            for b, kind in enumerate(stack.period):
                block_cache = None if cache is None else BlockCache(keys[b], values[b], layer)
                x, block_cache = block(
                    self.config, kind, layer_weights[str(b)], x, context, block_cache,
                    attend=self.attend, constrain=self.constrain,
                )  # fmt: skip
                if block_cache is not None:
                    keys = (*keys[:b], block_cache.keys, *keys[b + 1 :])
                    values = (*values[:b], block_cache.values, *values[b + 1 :])
            return (x, keys, values), None

        # Only with a cache, because no gradient passes through bits.
        hidden = cache is not None and not isinstance(weights, list)
        carry = (x, *stack_buffers(cache, s))
        if isinstance(weights, list):
            for layer, layer_weights in enumerate(weights):
                carry, _ = body(carry, (layer_weights, layer))
        else:
            layers = jnp.arange(stack.repeats, dtype=jnp.int32)
            if hidden:
                weights = jax.tree.map(bits.hide, weights)
            carry, _ = lax.scan(_remat(body, self.remat), carry, (weights, layers))
        x, keys, values = carry
        return x, with_stack_buffers(cache, s, keys, values)

    def unembed(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Logits in float32, soft-capped where the architecture says so."""
        # Logits are split by vocabulary over the devices that share the weights (hidden states move, they are
        # small): split by row, the head's gradient would be summed over all devices for every chunk of tokens.
        rows = ("batch_copies", *([None] * (hidden.ndim - 2)))
        hidden = self.constrain(hidden, (*rows, "act_embed"))
        if HEAD in self.variables["params"]:
            logits = linear(hidden, self.variables["params"][HEAD], dtype=jnp.float32)
        elif self.config.tie_embeddings:
            table = self.modules["embed"]()["table"]
            if isinstance(table, jax.Array):
                table = self.constrain(table.astype(hidden.dtype), ("act_vocab", None))
            logits = linear_transposed(hidden, table, dtype=jnp.float32)
        else:
            kernel = self.modules["lm_head"]()["kernel"]
            if isinstance(kernel, jax.Array):
                kernel = self.constrain(kernel.astype(hidden.dtype), (None, "act_vocab"))
            logits = linear(hidden, kernel, dtype=jnp.float32)
        logits = self.constrain(logits, (*rows, "act_vocab"))
        cap = self.config.final_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)


def _identity(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    return x


def build_model(
    config: ModelConfig,
    constrain: Constrain = _identity,
    *,
    attention: str = "auto",
    remat: platform.Remat = "auto",
    compute_dtype: DTypeLike = jnp.float32,
    mesh: jax.sharding.Mesh | None = None,
) -> Model:
    """The pure functions of one architecture.

    Args:
        config: the architecture.
        constrain: shards activations by logical axes; `sharding.make_constrain(mesh)` on a mesh.
        attention: implementation; the mesh is handed to it alone, for kernels that run per device.
        remat: what the backward pass recomputes: "none", "dots" (all but matrix products), "full" or "auto".
        compute_dtype: of activations; parameters keep their own and are cast where they are used.

    Example:
        >>> from jaxpost.models.config import RopeConfig, StackConfig
        >>> stack = StackConfig(repeats=2, period=(BlockConfig(rope=RopeConfig()),))
        >>> model = build_model(ModelConfig(
        ...     family="llama", vocab_size=8, width=4, mlp_width=6, heads=2, kv_heads=1, head_dim=2,
        ...     stacks=(stack,), max_positions=16))
        >>> params = model.init(jax.random.key(0))
        >>> tokens = jnp.asarray([[1, 2, 3]])
        >>> out = model.forward(params, Inputs(tokens, jnp.arange(3)[None], jnp.ones_like(tokens)))
        >>> model.unembed(params, out.hidden).shape
        (1, 3, 8)
    """
    module = Transformer(config, attention_ops.select(attention, mesh=mesh), constrain, remat, compute_dtype)

    def init(key: Array, dtype: Any = jnp.float32) -> Params:
        return module.init(key, dtype, method="declare")["params"]

    def forward(params: Params, inputs: Inputs, cache: Cache | None = None) -> Outputs:
        outputs: Any = module.apply({"params": params}, inputs, cache)
        return outputs

    def unembed(params: Params, hidden: Array) -> Array:
        logits: Any = module.apply({"params": params}, hidden, method="unembed")
        return logits

    def new_cache(batch: int, capacity: int, dtype: Any = compute_dtype) -> DenseCache:
        return init_cache(config, batch, capacity, dtype)

    return Model(config, parameter_table(config), init, forward, unembed, new_cache)
