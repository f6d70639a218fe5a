"""The engine's device programs: store prompts, score tokens, decode. Pure functions; the engine compiles them.

Letters: B rows, T tokens of a pass, S tokens of a row's history, E steps of a decode chunk, N best tokens told.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxpost.generate.choose import choose, log_probabilities, top_logprobs
from jaxpost.generate.noise import uniforms
from jaxpost.generate.penalties import History
from jaxpost.generate.rows import RowParams
from jaxpost.models.pages import PagedCache, Pools, Tables
from jaxpost.ops.logprobs import token_stats
from jaxpost.types import Inputs, Model, Params


class Part(NamedTuple):
    """Consecutive tokens of some rows: `counts[b]` of them from position `starts[b]` on, right-padded."""

    tokens: Int[Array, "B T"]
    starts: Int[Array, " B"]
    counts: Int[Array, " B"]


class Rows(NamedTuple):
    """Rows that decode. All tokens but the last of each are stored in the cache."""

    tokens: Int[Array, "B S"]
    """Prompt and answer so far, right-padded."""
    prompt_lengths: Int[Array, " B"]
    lengths: Int[Array, " B"]
    limits: Int[Array, " B"]
    """Most tokens of the row, prompt included."""
    live: Bool[Array, " B"]
    keys: UInt32[Array, "B 2"]
    """Data of `noise.row_keys`."""


class Best(NamedTuple):
    """The most probable tokens at each step."""

    logprobs: Float[Array, "B E N"]
    tokens: Int[Array, "B E N"]


class Decoded(NamedTuple):
    """What a chunk gave. Row b has `lengths[b]` tokens now; entry e of `logprobs` belongs to its e-th new one."""

    tokens: Int[Array, "B S"]
    lengths: Int[Array, " B"]
    live: Bool[Array, " B"]
    ended: Bool[Array, " B"]
    """By an end token, which is the last."""
    stuck: Bool[Array, " B"]
    """Nothing could be drawn: every token was banned."""
    logprobs: Float[Array, "B E"]
    best: Best
    steps: Int[Array, ""]


class _Loop(NamedTuple):
    pools: Pools
    out: Decoded


def _inputs(part: Part) -> tuple[Inputs, Bool[Array, "B T"]]:
    offsets = jnp.arange(part.tokens.shape[1], dtype=jnp.int32)
    inside = offsets < part.counts[:, None]
    positions = jnp.where(inside, part.starts[:, None] + offsets, 0)
    return Inputs(part.tokens, positions, inside.astype(jnp.int32)), inside


def store(model: Model, params: Params, pools: Pools, tables: Tables, part: Part, *, fresh: bool) -> Pools:
    """Reads tokens into the cache; `fresh` where every row starts at position 0."""
    inputs, _ = _inputs(part)
    return model.forward(params, inputs, PagedCache(pools, tables, fresh=fresh)).cache.pools


def score(
    model: Model,
    params: Params,
    pools: Pools,
    tables: Tables,
    part: Part,
    targets: Int[Array, "B T"],
    *,
    fresh: bool,
    chunk_tokens: int,
) -> tuple[Pools, Float[Array, "B T"]]:
    """Reads tokens into the cache, and log softmax(logits)[target] of the token after each; 0 on padding."""
    inputs, inside = _inputs(part)
    outputs = model.forward(params, inputs, PagedCache(pools, tables, fresh=fresh))
    stats = token_stats(model.unembed, params, outputs.hidden, targets, chunk_tokens=chunk_tokens)
    return outputs.cache.pools, jnp.where(inside, stats.logprob, 0.0)


def decode(
    model: Model,
    params: Params,
    pools: Pools,
    tables: Tables,
    rows: Rows,
    wishes: RowParams,
    steps: Int[Array, ""],
    keep: Int[Array, ""],
    mask: UInt32[Array, "B Vw"] | None = None,
    *,
    max_steps: int,
    best: int = 0,
) -> tuple[Pools, Decoded]:
    """Draws token after token for all live rows: at most `steps`, and only while more than `keep` rows live.

    A row's tokens and log-probabilities do not depend on the other rows, nor on where chunks end.

    Args:
        wishes: sampling parameters, a row each.
        mask: tokens that a grammar allows at the next step; then `steps` must be 1.
        max_steps: static room for E steps.
        best: static number of most probable tokens to tell.
    """
    batch = rows.tokens.shape[0]
    out = Decoded(
        tokens=rows.tokens,
        lengths=rows.lengths,
        live=rows.live,
        ended=jnp.zeros(batch, bool),
        stuck=jnp.zeros(batch, bool),
        logprobs=jnp.zeros((batch, max_steps), jnp.float32),
        best=Best(jnp.zeros((batch, max_steps, best), jnp.float32), jnp.zeros((batch, max_steps, best), jnp.int32)),
        steps=jnp.zeros((), jnp.int32),
    )

    def go_on(loop: _Loop) -> Bool[Array, ""]:
        return (loop.out.steps < jnp.minimum(steps, max_steps)) & (jnp.sum(loop.out.live) > keep)

    def body(loop: _Loop) -> _Loop:
        return _step(model, params, tables, rows, wishes, mask, best, loop)

    loop = jax.lax.while_loop(go_on, body, _Loop(pools, out))
    return loop.pools, loop.out


def _step(
    model: Model,
    params: Params,
    tables: Tables,
    rows: Rows,
    wishes: RowParams,
    mask: UInt32[Array, "B Vw"] | None,
    best: int,
    loop: _Loop,
) -> _Loop:
    """One token of every live row: read the last one, draw the next."""
    out = loop.out
    batch, width = out.tokens.shape
    last = jnp.maximum(out.lengths - 1, 0)
    token = jnp.take_along_axis(out.tokens, last[:, None], axis=1)
    inputs = Inputs(token, jnp.where(out.live, last, 0)[:, None], out.live.astype(jnp.int32)[:, None])
    read = model.forward(params, inputs, PagedCache(loop.pools, tables))
    logits = model.unembed(params, read.hidden[:, 0])
    history = History(out.tokens, rows.prompt_lengths, out.lengths)
    keys = jax.random.wrap_key_data(rows.keys, impl="threefry2x32")
    choice = choose(logits, wishes, history, uniforms(keys, out.lengths), mask)
    told = out.best
    if best:
        values, ids = top_logprobs(log_probabilities(logits, wishes, history, mask), best)
        told = Best(told.logprobs.at[:, out.steps].set(values), told.tokens.at[:, out.steps].set(ids))
    stuck = out.live & choice.stuck
    draws = out.live & ~stuck
    ended = draws & jnp.any(choice.token[:, None] == wishes.end_ids, axis=1)
    lengths = out.lengths + draws.astype(jnp.int32)
    # Rows that draw nothing write past the end, which drops it.
    at = jnp.where(draws, out.lengths, width)
    decoded = Decoded(
        tokens=out.tokens.at[jnp.arange(batch), at].set(choice.token, mode="drop"),
        lengths=lengths,
        live=draws & ~ended & (lengths < rows.limits),
        ended=out.ended | ended,
        stuck=out.stuck | stuck,
        logprobs=out.logprobs.at[:, out.steps].set(jnp.where(draws, choice.logprob, 0.0)),
        best=told,
        steps=out.steps + 1,
    )
    return _Loop(read.cache.pools, decoded)
