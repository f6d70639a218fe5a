"""What an architecture is: one frozen description that every family maps to. Imports no jax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding of one block kind (2104.09864)."""

    theta: float = 10_000.0
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    """llama3 only."""
    high_freq_factor: float = 4.0
    """llama3 only."""
    original_max_positions: int = 8192
    """llama3 and yarn: context length of pre-training."""
    beta_fast: float = 32.0
    """yarn only."""
    beta_slow: float = 1.0
    """yarn only."""
    attention_factor: float | None = None
    """yarn only: factor on cos and sin; None: 0.1 ln(factor) + 1."""


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """One kind of block within a stack's period."""

    rope: RopeConfig
    window: int | None = None
    """Sliding window: a token sees itself and the `window - 1` before it; None: all before it."""


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """`repeats` times the blocks of `period`, in order; run by one scan over the repeats."""

    repeats: int
    period: tuple[BlockConfig, ...]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer. Never holds a mesh, a device or a dtype of computation."""

    family: str
    vocab_size: int
    width: int
    mlp_width: int
    heads: int
    kv_heads: int
    head_dim: int
    stacks: tuple[StackConfig, ...]
    max_positions: int
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    """Added to every norm's scale (Gemma stores scale - 1)."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMS norm of each query and key head before RoPE."""
    post_norms: bool = False
    """A second norm on the output of attention and of the MLP, before the residual (Gemma)."""
    embed_scale: float = 1.0
    """Factor on token embeddings (Gemma: sqrt(width), rounded to the parameters' dtype)."""
    attention_scale: float = 0.0
    """Factor on query-key products; 0: 1 / sqrt(head_dim)."""
    attention_softcap: float | None = None
    final_softcap: float | None = None
    tie_embeddings: bool = True

    @property
    def num_layers(self) -> int:
        return sum(s.repeats * len(s.period) for s in self.stacks)

    def layer_index(self, stack: int, repeat: int, block: int) -> int:
        """Number of a block counted from the input, as checkpoints count it."""
        before = sum(s.repeats * len(s.period) for s in self.stacks[:stack])
        return before + repeat * len(self.stacks[stack].period) + block
