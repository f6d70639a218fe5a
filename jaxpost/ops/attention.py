"""Causal attention over packed or padded rows, with grouped queries, windows and soft caps.

One function, several implementations: `xla` runs anywhere and is the definition; `cudnn` and `splash` are the
vendor's kernels. Which one "auto" means is decided in `ops.platform`.

Letters: B rows, T queries, S keys, N query heads, K key/value heads, G = N / K queries per group, H head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxpost.ops import platform
from jaxpost.ops.masks import MASKED, Rules, batched_product, visible
from jaxpost.ops.sparse_attention import sparse_attention

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "splash")

AttentionFn = Callable[..., Array]
"""`attention` with its implementation chosen: the same arguments; what a model calls."""


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B _ _ H"],
    v: Float[Array, "B _ _ H"],
    *,
    q_positions: Int[Array, "B T"],
    kv_positions: Int[Array, "B S"],
    q_segments: Int[Array, "B T"],
    kv_segments: Int[Array, "B S"],
    q_prefixes: Int[Array, "B T"] | None = None,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    kv_heads_first: bool = False,
) -> Float[Array, "B T N H"]:
    """softmax(scale q k^T, soft-capped and masked by `visible`) v, the softmax in float32.

    A soft cap c replaces a score s by c tanh(s / c) (2408.00118). A query that sees no key gives zeros. Scores
    exist for a block of queries at a time and are recomputed in the backward pass (2205.14135), so no [T, S]
    array is kept.

    Where a row attends to itself (T = S, no cache), the tokens of a segment must stand in order of position, as
    packing and padding leave them: keys right of a block of queries, or left of its windows, are not computed. With
    shared prefixes, where most tokens may not see each other, `ops.sparse_attention` may compute it.

    Args:
        q: queries after RoPE; head n belongs to key/value head n // G.
        k, v: keys and values, [B K S H] if `kv_heads_first`, as a cache keeps them.
        q_positions, kv_positions: position within the segment.
        q_segments, kv_segments: 0 for padding and empty slots.
        q_prefixes: a segment earlier in the row that a query's own continues, 0 for none.
        window: tokens seen, the query's own included; None for all.

    Example:
        >>> x, p, s = jnp.ones((1, 3, 2, 4)), jnp.arange(3)[None], jnp.ones((1, 3), int)
        >>> attention(x, x[:, :, :1], x[:, :, :1], q_positions=p, kv_positions=p, q_segments=s, kv_segments=s,
        ...           scale=0.5).shape
        (1, 3, 2, 4)
    """
    itself, kv_heads = not kv_heads_first and q.shape[1] == k.shape[1], k.shape[1 if kv_heads_first else 2]
    batch, length, heads, width = q.shape
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} key/value heads evenly")
    rules = Rules(scale=scale, window=window, softcap=softcap)
    size = platform.choices().sparse_chunk
    if q_prefixes is not None and itself and size is not None and length > size:
        return sparse_attention(rules, size, q, k, v, q_positions, q_segments, q_prefixes)
    if not kv_heads_first:
        k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    # Batch and heads lead, a group's queries are rows of one product: on a CPU 1.7 times faster than one per head.
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, width).transpose(0, 2, 3, 1, 4)
    places = Block(q_positions, kv_positions, q_segments, kv_segments, q_prefixes)
    # A shared prefix may stand further away than its positions say.
    near = window if q_prefixes is None else None
    outs = []
    for first, last in _chunks(length) if itself else [(0, length)]:
        low, high = (0, k.shape[2]) if not itself else (0 if near is None else max(0, first - near + 1), last)
        block = places.part(slice(first, last), slice(low, high))
        outs.append(_in_blocks(rules, grouped[:, :, :, first:last], k[:, :, low:high], v[:, :, low:high], block))
    out = outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=3)
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape)


def _chunks(length: int) -> list[tuple[int, int]]:
    """Ranges of queries that get programs of their own, each with the keys that it may see."""
    choices = platform.choices()
    count = min(-(-length // choices.causal_chunk), choices.causal_chunks)
    width = -(-length // count)
    return [(first, min(first + width, length)) for first in range(0, length, width)]


class Block(NamedTuple):
    """Where some queries and keys stand."""

    q_positions: Int[Array, "B T"]
    kv_positions: Int[Array, "B S"]
    q_segments: Int[Array, "B T"]
    kv_segments: Int[Array, "B S"]
    q_prefixes: Int[Array, "B T"] | None = None

    def part(self, queries: slice, keys: slice) -> Block:
        """Some of the queries and some of the keys."""
        prefixes = None if self.q_prefixes is None else self.q_prefixes[:, queries]
        return Block(
            self.q_positions[:, queries],
            self.kv_positions[:, keys],
            self.q_segments[:, queries],
            self.kv_segments[:, keys],
            prefixes,
        )


def _in_blocks(
    rules: Rules,
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    block: Block,
) -> Float[Array, "B K G T H"]:
    """Attention of all queries, at most `query_block` of them at one time."""
    size, length = platform.choices().query_block, q.shape[3]
    if length <= size:
        return _attend(rules, q, k, v, block)
    count = -(-length // size)

    def split(x: Array, axis: int) -> Array:
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, count * size - length)
        x = jnp.pad(x, padding)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)

    def one(part: tuple[Array, Array, Array, Array | None]) -> Array:
        rows, positions, segments, prefixes = part
        here = Block(positions, block.kv_positions, segments, block.kv_segments, prefixes)
        return _attend(rules, rows, k, v, here)

    # Padding queries have segment 0 and see nothing.
    prefixes = None if block.q_prefixes is None else split(block.q_prefixes, 1)
    out = lax.map(one, (split(q, 3), split(block.q_positions, 1), split(block.q_segments, 1), prefixes))
    return jnp.moveaxis(out, 0, 3).reshape(*q.shape[:3], count * size, q.shape[4])[:, :, :, :length]


def _scores(rules: Rules, rows: Float[Array, "B K R H"], k: Float[Array, "B K S H"]) -> Float[Array, "B K R S"]:
    """Scaled and soft-capped scores, before the mask."""
    scores = batched_product(rows, k.astype(rows.dtype), (3, 3)) * rules.scale
    return scores if rules.softcap is None else rules.softcap * jnp.tanh(scores / rules.softcap)


def _masked(rules: Rules, scores: Float[Array, "B K R S"], block: Block) -> Float[Array, "B K R S"]:
    # A query's place is repeated for the heads of its group: a mask that is spread over them after the comparisons
    # keeps a CPU from vector instructions (the backward pass takes 1.7 times as long).
    groups = scores.shape[2] // block.q_positions.shape[1]
    repeat = lambda x: jnp.tile(x, (1, groups))  # noqa: E731
    prefixes = None if block.q_prefixes is None else repeat(block.q_prefixes)
    rows = repeat(block.q_positions), block.kv_positions, repeat(block.q_segments), block.kv_segments, prefixes
    return jnp.where(visible(*rows, window=rules.window)[:, None], scores, MASKED)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    rules: Rules,
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    block: Block,
) -> Float[Array, "B K G T H"]:
    """Attention of one block of queries; its backward pass recomputes the scores from q, k and their normaliser."""
    return _attend_forward(rules, q, k, v, block)[0]


def _attend_forward(rules: Rules, q: Array, k: Array, v: Array, block: Block) -> tuple[Array, tuple]:
    rows = q.reshape(*q.shape[:2], -1, q.shape[4])
    scores = _masked(rules, _scores(rules, rows, k), block)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    sees = top > MASKED / 2
    out = batched_product(weights.astype(v.dtype), v, (3, 2)) * jnp.where(sees, 1 / total, 0.0)
    out = checkpoint_name(out.astype(q.dtype).reshape(q.shape), platform.ATTENTION_RESIDUALS)
    # Where nothing is seen, 0 makes every exp(score - normaliser) of the backward pass 0 as well.
    normaliser = checkpoint_name(jnp.where(sees, top + jnp.log(total), 0.0), platform.ATTENTION_RESIDUALS)
    return out, (q, k, v, block, out, normaliser)


def _attend_backward(rules: Rules, residuals: tuple, d_out: Array) -> tuple:
    q, k, v, block, out, normaliser = residuals
    rows, out, d_out = (x.reshape(*q.shape[:2], -1, q.shape[4]) for x in (q, out, d_out))
    scores = _scores(rules, rows, k)
    weights = jnp.exp(_masked(rules, scores, block) - normaliser)
    d_weights = batched_product(d_out, v.astype(d_out.dtype), (3, 3))
    overlap = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    d_scores = weights * (d_weights - overlap) * rules.scale
    if rules.softcap is not None:
        d_scores = d_scores * (1 - jnp.square(scores / rules.softcap))
    d_scores = d_scores.astype(q.dtype)
    d_q = batched_product(d_scores, k.astype(q.dtype), (3, 2)).astype(q.dtype).reshape(q.shape)
    d_k = batched_product(d_scores, rows, (2, 2)).astype(k.dtype)
    d_v = batched_product(weights.astype(d_out.dtype), d_out, (2, 2)).astype(v.dtype)
    return d_q, d_k, d_v, None


_attend.defvjp(_attend_forward, _attend_backward)


def select(impl: str = "auto", *, mesh: jax.sharding.Mesh | None = None) -> AttentionFn:
    """The attention function that `impl` names on this platform.

    Args:
        impl: "auto" is `ops.platform`'s choice; on a TPU host with several devices it needs the mesh for splash.
        mesh: what the arrays are spread over; bound into splash, which runs per device.

    Raises:
        ValueError: an unknown name.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"attention {impl!r} is none of {', '.join(IMPLEMENTATIONS)}")
    chosen = platform.choices().attention if impl == "auto" else impl
    if impl == "auto" and chosen == "splash" and mesh is None and jax.device_count() > 1:
        chosen = "xla"
    if chosen == "xla":
        return attention
    from jaxpost.ops import kernels  # Pallas for TPU is slow to import and of use to few programs.

    return kernels.cudnn_attention if chosen == "cudnn" else partial(kernels.splash_attention, mesh=mesh)
