"""Sampling from a model with a dense cache: one prefill, then a jitted loop of one token a step.

The sampler runs the learner's own forward, so its log-probabilities are the learner's. Noise follows the
meaning of a draw, not its place: the key of a token is fold_in(seed, example id, position), so a sample
does not depend on the batch it was drawn in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from jaxpost.types import Inputs, Model, Params

_LENGTH_BUCKET = 64


class Rollout(NamedTuple):
    """Sampled tokens, right-padded. Row b holds `lengths[b]` of them, the end token included."""

    tokens: Int[Array, "B T"]
    logprobs: Float[Array, "B T"]
    """log p(token) under softmax(logits / T), or under softmax(logits) for greedy rows; 0 past the end."""
    lengths: Int[Array, " B"]
    finished: Bool[Array, " B"]
    """The row ended with an end token; otherwise it was cut at `max_tokens`."""


class Completion(NamedTuple):
    """One answer on the host."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: str
    """"stop" (end token, which is kept in `tokens`) or "length"."""


class _Loop(NamedTuple):
    step: Int[Array, ""]
    token: Int[Array, " B"]
    logprob: Float[Array, " B"]
    done: Bool[Array, " B"]
    cache: object
    out: Rollout


def choose(
    logits: Float[Array, "B V"],
    keys: Key[Array, " B"],
    temperature: Float[Array, ""],
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Draws one token a row from softmax(logits / T) by the Gumbel-max trick; T = 0 takes the best.

    argmax(logits / T + g) with g = -log(-log u) is distributed as softmax(logits / T).

    Args:
      logits: [B V] float32.
      keys: [B] one key a row.
      temperature: scalar, >= 0; traced.

    Returns:
      tokens [B] int32 and their log-probabilities [B] under the distribution drawn from.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> keys = jax.random.split(jax.random.key(0), 1)
      >>> token, _ = choose(jnp.array([[0.0, 5.0, 1.0]]), keys, jnp.float32(0))
      >>> int(token[0])
      1
    """
    greedy = temperature == 0
    scaled = logits / jnp.where(greedy, jnp.ones_like(temperature), temperature)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:], logits.dtype))(keys)
    token = jnp.argmax(jnp.where(greedy, scaled, scaled + noise), axis=-1).astype(jnp.int32)
    chosen = jnp.take_along_axis(scaled, token[:, None], axis=-1)[:, 0]
    return token, chosen - jax.nn.logsumexp(scaled, axis=-1)


def sample_tokens(
    model: Model,
    params: Params,
    prompts: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    example_ids: Int[Array, " B"],
    key: PRNGKeyArray,
    temperature: Float[Array, ""],
    *,
    max_tokens: int,
    eos_ids: Sequence[int],
    cache_dtype: DTypeLike = jnp.float32,
) -> Rollout:
    """Continues right-padded prompts until an end token or `max_tokens`.

    Args:
      prompts: [B T] int32, right-padded; row b has `lengths[b]` >= 1 tokens.
      example_ids: [B] int32 identity of each prompt: with `key` and the position it makes the noise.
      temperature: traced scalar; 0 is greedy.
      max_tokens: most new tokens a row; static.
      eos_ids: token ids that end a row; static.

    Returns:
      A Rollout with T = max_tokens.
    """
    batch, width = prompts.shape
    slots = jnp.arange(width, dtype=jnp.int32)
    inside = slots[None] < lengths[:, None]
    positions = jnp.where(inside, slots[None], 0)
    cache = model.init_cache(batch, width + max_tokens, cache_dtype)
    first = model.forward(params, Inputs(prompts, positions, inside.astype(jnp.int32)), cache)
    last = jnp.take_along_axis(first.hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    row_keys = jax.vmap(partial(jax.random.fold_in, key))(example_ids)
    ends = jnp.asarray(eos_ids, jnp.int32)

    def draw(hidden: Float[Array, "B D"], position: Int[Array, " B"]) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
        return choose(model.unembed(params, hidden), jax.vmap(jax.random.fold_in)(row_keys, position), temperature)

    def unfinished(loop: _Loop) -> Bool[Array, ""]:
        return (loop.step < max_tokens) & ~jnp.all(loop.done)

    def body(loop: _Loop) -> _Loop:
        live = ~loop.done
        out = Rollout(
            loop.out.tokens.at[:, loop.step].set(jnp.where(live, loop.token, 0)),
            loop.out.logprobs.at[:, loop.step].set(jnp.where(live, loop.logprob, 0.0)),
            loop.out.lengths + live.astype(jnp.int32),
            loop.out.finished | (live & jnp.isin(loop.token, ends)),
        )
        position = lengths + loop.step
        inputs = Inputs(loop.token[:, None], position[:, None], jnp.ones((batch, 1), jnp.int32))
        step = model.forward(params, inputs, loop.cache)
        token, logprob = draw(step.hidden[:, 0], position + 1)
        return _Loop(loop.step + 1, token, logprob, out.finished, step.cache, out)

    token, logprob = draw(last, lengths)
    start = _Loop(jnp.zeros((), jnp.int32), token, logprob, lengths <= 0, first.cache, _empty(batch, max_tokens))
    return jax.lax.while_loop(unfinished, body, start).out


def _empty(batch: int, max_tokens: int) -> Rollout:
    return Rollout(
        jnp.zeros((batch, max_tokens), jnp.int32),
        jnp.zeros((batch, max_tokens), jnp.float32),
        jnp.zeros((batch,), jnp.int32),
        jnp.zeros((batch,), bool),
    )


def make_sampler(
    model: Model,
    *,
    eos_ids: Sequence[int],
    context: int,
    rows: int = 8,
    jit: Callable[..., Callable] = jax.jit,
    cache_dtype: DTypeLike = jnp.float32,
) -> Callable[..., list[Completion]]:
    """Makes sample(params, prompts, *, max_tokens, temperature, seed, first_id=0) -> completions, in order.

    Prompts are lists of token ids; they are sorted by length into batches of `rows`, padded to a multiple of
    64 tokens, so few shapes are compiled. Under a mesh pass a `jit` that lays the outputs out replicated and
    a number of rows that the mesh's batch axes divide.

    Raises (from the returned function):
      ValueError: an empty prompt, or one that with `max_tokens` does not fit `context`; named by its number.
    """

    run = jit(
        partial(sample_tokens, model, eos_ids=tuple(eos_ids), cache_dtype=cache_dtype), static_argnames=("max_tokens",)
    )

    def sample(
        params: Params,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        first_id: int = 0,
    ) -> list[Completion]:
        _check(prompts, max_tokens, temperature, context)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        done: dict[int, Completion] = {}
        for at in range(0, len(order), rows):
            chunk = order[at : at + rows]
            padded = chunk + [chunk[-1]] * (rows - len(chunk))
            width = -(-max(len(prompts[i]) for i in chunk) // _LENGTH_BUCKET) * _LENGTH_BUCKET
            tokens = np.zeros((rows, width), np.int32)
            for row, i in enumerate(padded):
                tokens[row, : len(prompts[i])] = prompts[i]
            lengths = np.asarray([len(prompts[i]) for i in padded], np.int32)
            ids = np.asarray([first_id + i for i in padded], np.int32)
            rollout = run(
                params, tokens, lengths, ids, jax.random.key(seed), np.float32(temperature), max_tokens=max_tokens
            )
            done.update(zip(chunk, _to_host(rollout, len(chunk)), strict=True))
        return [done[i] for i in range(len(prompts))]

    return sample


def _check(prompts: Sequence[Sequence[int]], max_tokens: int, temperature: float, context: int) -> None:
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; ask for at least 1 new token")
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}; it must be 0 (greedy) or above")
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {number} is empty: give at least one token (a chat template adds some)")
        if len(prompt) + max_tokens > context:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens; with max_tokens={max_tokens} it does not fit the "
                f"model's context of {context}: shorten it or lower max_tokens"
            )


def _to_host(rollout: Rollout, count: int) -> list[Completion]:
    host = jax.device_get(rollout)
    return [
        Completion(
            tuple(int(t) for t in host.tokens[row, : host.lengths[row]]),
            tuple(float(p) for p in host.logprobs[row, : host.lengths[row]]),
            "stop" if host.finished[row] else "length",
        )
        for row in range(count)
    ]
