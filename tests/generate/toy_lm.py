"""A transformer small enough that every text of a few tokens can be enumerated."""

import itertools
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost.models.config import BlockConfig, ModelConfig, RopeConfig, StackConfig
from jaxpost.models.transformer import build_model
from jaxpost.types import Inputs

VOCAB, EOS, PAGE = 7, 6, 4


@lru_cache
def toy(window: int | None = None, compute_dtype=jnp.float32):
    """A model with sharp, history-dependent predictions, and its parameters."""
    kinds = (BlockConfig(rope=RopeConfig(), window=window), BlockConfig(rope=RopeConfig()))
    config = ModelConfig(
        family="llama", vocab_size=VOCAB, width=16, mlp_width=24, heads=4, kv_heads=2, head_dim=8,
        stacks=(StackConfig(repeats=2, period=kinds),), max_positions=256,
    )  # fmt: skip
    model = build_model(config, compute_dtype=compute_dtype)
    params = model.init(jax.random.key(3))
    return model, jax.tree.map(lambda x: x * 6 if x.ndim > 1 else x, params)


@lru_cache
def learner(window=None):
    model, params = toy(window)

    @jax.jit
    def logits(tokens, lengths):
        offsets = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        inside = (offsets < lengths[:, None]).astype(jnp.int32)
        return model.unembed(params, model.forward(params, Inputs(tokens, offsets * inside, inside)).hidden)

    return logits


def learner_logits(tokens, window=None):
    """[T, V] float64 logits of one text by the plain forward pass."""
    return batch_logits([tokens], window)[0]


def batch_logits(texts, window=None):
    """The same for several texts."""
    room, rows = -(-max(map(len, texts)) // 32) * 32, -(-len(texts) // 512) * 512 if len(texts) > 1 else 1
    tokens = np.zeros((rows, room), np.int32)
    for row, text in zip(tokens, texts, strict=False):
        row[: len(text)] = text
    lengths = np.asarray([len(t) for t in texts] + [1] * (rows - len(texts)), np.int32)
    found = np.asarray(learner(window)(tokens, lengths), np.float64)
    return [found[i, : len(t)] for i, t in enumerate(texts)]


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@lru_cache
def distribution(prompt, length, temperature=1.0):
    """Every text of at most `length` tokens that ends at EOS or there, with its probability."""
    texts = set()
    for text in itertools.product(range(VOCAB), repeat=length):
        texts.add(text[: text.index(EOS) + 1] if EOS in text else text)
    out = {}
    for text, logits in zip(texts, batch_logits([[*prompt, *text] for text in texts]), strict=True):
        logp = log_softmax(logits / temperature)
        out[text] = float(np.exp(sum(logp[len(prompt) - 1 + i, t] for i, t in enumerate(text))))
    return out
