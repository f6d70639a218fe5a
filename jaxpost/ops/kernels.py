"""Vendors' attention kernels behind the signature of `ops.attention.attention`: cuDNN and TPU splash.

Both compute what the xla implementation computes; their extra demands are checked here and told in a sentence.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxpost import sharding
from jaxpost.ops import platform
from jaxpost.ops.attention import attention, visible

LANES = 128
"""Splash tiles are multiples of this many tokens."""


def cudnn_attention(
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
    """Attention by cuDNN's fused kernel, on NVIDIA GPUs; same arguments and meaning as `ops.attention.attention`.

    Raises:
        ValueError: for what the kernel cannot do: soft caps, and any dtype but float16 and bfloat16.
    """
    if softcap is not None:
        raise ValueError("attention 'cudnn' has no soft cap: use attention 'xla' for this model")
    if q.dtype not in (jnp.float16, jnp.bfloat16):
        raise ValueError(f"attention 'cudnn' computes in float16 or bfloat16, not {q.dtype}: set compute_dtype")
    if kv_heads_first:
        k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    mask = visible(q_positions, kv_positions, q_segments, kv_segments, q_prefixes, window=window)
    out = jax.nn.dot_product_attention(
        q, k.astype(q.dtype), v.astype(q.dtype), mask=mask[:, None], scale=scale, implementation="cudnn"
    )
    # The kernel averages over all keys where a query may see none.
    return jnp.where(jnp.any(mask, axis=-1)[:, :, None, None], out, jnp.zeros((), out.dtype))


def splash_attention(
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
    mesh: Mesh | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Attention by the TPU's sparse flash kernel: never [T, T] in memory, blocks outside the mask not computed.

    The kernel runs per device inside `shard_map`: rows over data and fsdp, heads over tensor, and with a seq
    axis the queries over seq while every device holds all keys of its rows. Causality and windows are by index
    within the row, so the tokens of a segment must stand in order, as packing and padding leave them. Calls
    with a cache (`kv_heads_first`) are a few queries against many keys and go to the xla implementation, as do
    shared prefixes (`q_prefixes`), which the kernel's segments cannot express.

    Args:
        mesh: the mesh that the arrays live on; None on a single device.
        interpret: run the kernel in Pallas's interpreter, for tests without a TPU.

    Raises:
        ValueError: rows or heads that the mesh does not divide.
    """
    if kv_heads_first or q_prefixes is not None:
        return attention(
            q, k, v, q_positions=q_positions, kv_positions=kv_positions, q_segments=q_segments,
            kv_segments=kv_segments, q_prefixes=q_prefixes, scale=scale, window=window, softcap=softcap,
            kv_heads_first=kv_heads_first,
        )  # fmt: skip
    length = q.shape[1]
    if k.shape[1] != length:
        raise ValueError(f"attention 'splash' needs as many keys as queries without a cache: {k.shape[1]} != {length}")
    shards = _Shards(mesh, q.shape, k.shape[2])
    padded = -(-length // (LANES * shards.seq)) * LANES * shards.seq
    segments = jnp.pad(q_segments, ((0, 0), (0, padded - length)))
    if k.shape[2] % shards.tensor:
        # Fewer key/value heads than tensor shards: every query head brings its own copy.
        k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    # The kernel does not scale queries.
    heads_first = [_pad_length(x, padded).swapaxes(1, 2) for x in ((q * scale).astype(q.dtype), k, v)]
    kernel = _kernel(
        padded, q.shape[2] // shards.tensor, seq_shards=shards.seq, window=window, softcap=softcap, interpret=interpret
    )
    out = shards.run(kernel, *heads_first, segments)
    out = out.swapaxes(1, 2)[:, :length]
    return jnp.where((q_segments != 0)[:, :, None, None], out, jnp.zeros((), out.dtype))


class _Shards:
    """How one attention call is split over a mesh; sizes are 1 without one."""

    def __init__(self, mesh: Mesh | None, q_shape: tuple[int, ...], kv_heads: int) -> None:
        self.mesh = mesh
        self.tensor = self.seq = 1
        if mesh is None:
            return
        self.batch, self.length, self.heads = (
            sharding.spec((axis,), mesh=mesh) for axis in ("batch", "length", "act_heads")
        )
        self.tensor, self.seq, rows = (self._ways(s) for s in (self.heads, self.length, self.batch))
        if q_shape[0] % rows:
            raise ValueError(f"attention 'splash': {q_shape[0]} rows cannot be dealt to {rows} shards of the batch")
        if q_shape[2] % self.tensor:
            raise ValueError(f"attention 'splash': {q_shape[2]} heads cannot be split by tensor={self.tensor}")

    def _ways(self, spec: PartitionSpec) -> int:
        names = [n for part in spec if part is not None for n in ((part,) if isinstance(part, str) else part)]
        return math.prod(self.mesh.shape[n] for n in names) if self.mesh is not None else 1

    def run(self, kernel: splash_kernel.SplashAttentionKernel, q: Array, k: Array, v: Array, segments: Array) -> Array:
        """The kernel over rows [B N T H], each device with its own part."""

        def local(kernel, q, k, v, q_segments, kv_segments):
            def row(q, k, v, q_segments, kv_segments):
                return kernel(q, k, v, segment_ids=splash_kernel.SegmentIds(q_segments, kv_segments))

            return jax.vmap(row)(q, k, v, q_segments, kv_segments)

        if self.mesh is None:
            return local(kernel, q, k, v, segments, segments)
        batch, length, heads = (s[0] if len(s) else None for s in (self.batch, self.length, self.heads))
        whole = PartitionSpec(batch, heads, None, None)
        parts = PartitionSpec(batch, heads, length, None)
        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(
                kernel.manual_sharding_spec(NamedSharding(self.mesh, PartitionSpec(None, length))),
                parts,
                whole,
                whole,
                PartitionSpec(batch, length),
                PartitionSpec(batch, None),
            ),
            out_specs=parts,
            check_vma=False,
        )(kernel, q, k, v, segments, segments)


def _pad_length(x: Array, length: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))


def _kernel(
    length: int, heads: int, *, seq_shards: int, window: int | None, softcap: float | None, interpret: bool
) -> splash_kernel.SplashAttentionKernel:
    """The kernel for `heads` query heads over `length` tokens, tiles as large as the length allows."""
    shape = (length, length)
    if window is None:
        mask = splash_mask.CausalMask(shape)
    else:
        mask = splash_mask.LocalMask(shape, window_size=(window - 1, 0), offset=0)
    q_block = math.gcd(length // seq_shards, platform.choices().splash_block)
    kv_block = math.gcd(length, platform.choices().splash_block)
    blocks = splash_kernel.BlockSizes(
        block_q=q_block,
        block_kv=kv_block,
        block_kv_compute=kv_block,
        block_q_dkv=q_block,
        block_kv_dkv=kv_block,
        block_kv_dkv_compute=kv_block,
        block_q_dq=q_block,
        block_kv_dq=kv_block,
    )
    make = partial(splash_kernel.make_splash_mha, head_shards=1, q_seq_shards=seq_shards)
    # The mask tables are constants of the program, whatever is being traced around them.
    with jax.ensure_compile_time_eval():
        return make(
            splash_mask.MultiHeadMask([mask] * heads),
            block_sizes=blocks,
            attn_logits_soft_cap=softcap,
            residual_checkpoint_name=platform.ATTENTION_RESIDUALS,
            interpret=interpret,
        )
