"""The engine's device programs: store prompts, score tokens, decode. Pure functions; the engine compiles them.

Letters: B rows, T tokens of a pass, S tokens of a row's history, E new tokens of a decode chunk, N best tokens told,
K guesses a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxpost.generate.choose import choose, log_probabilities, top_logprobs
from jaxpost.generate.noise import uniforms
from jaxpost.generate.penalties import History, edit_logits
from jaxpost.generate.rows import RowParams
from jaxpost.generate.speculative import Lookup, look_up
from jaxpost.models.pages import PagedCache, Pools, Tables
from jaxpost.sharding import make_constrain
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
    """The most probable tokens at each place."""

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
    passes: Int[Array, ""]
    """Times that the model was run."""
    guessed: Int[Array, " B"]
    right: Int[Array, " B"]
    """Guessed tokens that were drawn."""


class _Guesses(NamedTuple):
    """The first `counts[b]` are to be tried."""

    tokens: Int[Array, "B K"]
    counts: Int[Array, " B"]


class _Loop(NamedTuple):
    pools: Pools
    out: Decoded
    guesses: _Guesses


class _Job(NamedTuple):
    """What stays the same over a chunk."""

    params: Params
    tables: Tables
    rows: Rows
    wishes: RowParams
    mask: UInt32[Array, "B Vw"] | None
    pause: UInt32[Array, "B Vw"] | None
    ends: Int[Array, " B"]
    """Most tokens of each row when the chunk ends."""
    mesh: Mesh | None


def _inputs(part: Part) -> tuple[Inputs, Bool[Array, "B T"]]:
    offsets = jnp.arange(part.tokens.shape[1], dtype=jnp.int32)
    inside = offsets < part.counts[:, None]
    positions = jnp.where(inside, part.starts[:, None] + offsets, 0)
    return Inputs(part.tokens, positions, inside.astype(jnp.int32)), inside


def store(
    model: Model, params: Params, pools: Pools, tables: Tables, part: Part, *, fresh: bool, mesh: Mesh | None = None
) -> Pools:
    """Reads tokens into the cache; `fresh` where every row starts at position 0."""
    inputs, _ = _inputs(part)
    return model.forward(params, inputs, PagedCache(pools, tables, fresh, mesh)).cache.pools


def measure(
    model: Model, params: Params, pools: Pools, tables: Tables, part: Part, at: Int[Array, "B M"], head: Params,
    *, read: Callable[[Params, Array], Array], fresh: bool, mesh: Mesh | None = None,
) -> tuple[Pools, Float[Array, "B M K"]]:  # fmt: skip
    """Reads tokens into the cache, and a head's outputs after some of them: read(head, hidden [B M D])."""
    inputs, _ = _inputs(part)
    outputs = model.forward(params, inputs, PagedCache(pools, tables, fresh, mesh))
    return outputs.cache.pools, read(head, jnp.take_along_axis(outputs.hidden, at[:, :, None], axis=1))


class Scores(NamedTuple):
    """log softmax(logits / heat) of the token after each token read, and of the most probable ones there."""

    logprobs: Float[Array, "B T"]
    best: Best


def score(
    model: Model,
    params: Params,
    pools: Pools,
    tables: Tables,
    part: Part,
    targets: Int[Array, "B T"],
    heat: Float[Array, " B"],
    *,
    fresh: bool,
    best: int,
    chunk_tokens: int,
    mesh: Mesh | None = None,
) -> tuple[Pools, Scores]:
    """Reads tokens into the cache, and scores the token after each; padding's scores mean nothing.

    Args:
        heat: what each row's logits are divided by.
        best: static number of most probable tokens to tell.
        chunk_tokens: most tokens of all rows whose logits exist at one time.
    """
    inputs, _ = _inputs(part)
    outputs = model.forward(params, inputs, PagedCache(pools, tables, fresh, mesh))
    batch, length = targets.shape
    width = min(length, max(1, chunk_tokens // batch))
    count = -(-length // width)

    def split(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, count * width - length), *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(batch, count, width, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(batch, count * width, *x.shape[3:])[:, :length]

    def one(chunk: tuple[Array, Array]) -> Scores:
        hidden, target = chunk
        logprobs = jax.nn.log_softmax(model.unembed(params, hidden) / heat[:, None, None], axis=-1)
        told = jnp.take_along_axis(logprobs, target[..., None], axis=-1)[..., 0]
        values, tokens = jax.lax.top_k(logprobs, best)
        return Scores(told, Best(values, tokens.astype(jnp.int32)))

    return outputs.cache.pools, jax.tree.map(join, jax.lax.map(one, (split(outputs.hidden), split(targets))))


class Ranked(NamedTuple):
    """The most probable next tokens of each row, best first."""

    logprobs: Float[Array, "B N"]
    tokens: Int[Array, "B N"]


def rank(
    model: Model,
    params: Params,
    pools: Pools,
    tables: Tables,
    rows: Rows,
    wishes: RowParams,
    *,
    best: int,
    mesh: Mesh | None = None,
) -> tuple[Pools, Ranked]:
    """Reads each row's last token and ranks the next: by log softmax(logits), changed by penalties and bans.

    The order is transformers' for beams: penalties act on log-probabilities, which are not normalised again.
    """
    last = jnp.maximum(rows.lengths - 1, 0)[:, None]
    token = jnp.take_along_axis(rows.tokens, last, axis=1)
    inputs = Inputs(token, jnp.where(rows.live[:, None], last, 0), rows.live.astype(jnp.int32)[:, None])
    inputs = jax.tree.map(lambda x: _by_row(x, mesh), inputs)
    read = model.forward(params, inputs, PagedCache(pools, tables, mesh=mesh))
    logprobs = jax.nn.log_softmax(_by_row(model.unembed(params, read.hidden[:, 0]), mesh, "rows"), axis=-1)
    history = History(rows.tokens, rows.prompt_lengths, rows.lengths)
    return read.cache.pools, Ranked(*top_logprobs(edit_logits(logprobs, wishes, history), best))


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
    pause: UInt32[Array, "B Vw"] | None = None,
    *,
    max_steps: int,
    best: int = 0,
    lookup: Lookup | None = None,
    mesh: Mesh | None = None,
) -> tuple[Pools, Decoded]:
    """Draws tokens for all live rows until one has `steps` new ones, and only while more than `keep` rows live.

    A row's tokens and log-probabilities do not depend on the other rows, on where chunks end, or on guesses.

    Args:
        wishes: sampling parameters, a row each.
        mask: tokens that a grammar allows at the next step; then `steps` must be 1.
        pause: tokens after which a row draws no more in this chunk.
        max_steps, best: static room for E new tokens, and number of most probable ones to tell.
        lookup: guesses, verified together in one pass; passes without any read one token a row.
        mesh: static: what pools and rows are spread over.
    """
    steps = jnp.minimum(steps, max_steps)
    out = _nothing_yet(rows, max_steps, best)
    job = _Job(params, tables, rows, wishes, mask, pause, jnp.minimum(rows.limits, rows.lengths + steps), mesh)

    def go_on(loop: _Loop) -> Bool[Array, ""]:
        out = loop.out
        longest = jnp.max(jnp.where(out.live, out.lengths - rows.lengths, 0))
        return (longest < steps) & (jnp.sum(out.live) > keep)

    def step(loop: _Loop, guesses: _Guesses) -> _Loop:
        pools, out = _step(model, job, loop.pools, loop.out, guesses)
        return _Loop(pools, out, _guess(job, out, lookup))

    def plain(loop: _Loop) -> _Loop:
        return step(loop, _Guesses(loop.guesses.tokens[:, :0], loop.guesses.counts))

    loop = _Loop(pools, out, _guess(job, out, lookup))
    if lookup is None:
        loop = jax.lax.while_loop(go_on, plain, loop)
        return loop.pools, loop.out

    def some(loop: _Loop) -> Bool[Array, ""]:
        return jnp.any(loop.guesses.counts > 0)

    def both(loop: _Loop) -> _Loop:
        # Two loops, where a branch would copy the pools.
        loop = jax.lax.while_loop(lambda x: go_on(x) & ~some(x), plain, loop)
        return jax.lax.while_loop(lambda x: go_on(x) & some(x), lambda x: step(x, x.guesses), loop)

    loop = jax.lax.while_loop(go_on, both, loop)
    return loop.pools, loop.out


def _nothing_yet(rows: Rows, max_steps: int, best: int) -> Decoded:
    batch = rows.tokens.shape[0]
    none, zeros = jnp.zeros(batch, bool), jnp.zeros(batch, jnp.int32)
    return Decoded(
        tokens=rows.tokens,
        lengths=rows.lengths,
        live=rows.live,
        ended=none,
        stuck=none,
        logprobs=jnp.zeros((batch, max_steps), jnp.float32),
        best=Best(jnp.zeros((batch, max_steps, best), jnp.float32), jnp.zeros((batch, max_steps, best), jnp.int32)),
        passes=jnp.zeros((), jnp.int32),
        guessed=zeros,
        right=zeros,
    )


def _guess(job: _Job, out: Decoded, lookup: Lookup | None) -> _Guesses:
    """The tokens that each live row's own text suggests next; none without `lookup`."""
    batch = out.tokens.shape[0]
    if lookup is None:
        return _Guesses(jnp.zeros((batch, 0), jnp.int32), jnp.zeros(batch, jnp.int32))
    tokens, found = look_up(out.tokens, out.lengths, lookup)
    # The token after the last right guess is drawn too.
    room = jnp.clip(job.ends - out.lengths - 1, 0, lookup.tokens)
    return _Guesses(tokens, jnp.where(out.live & found, room, 0))


def _step(model: Model, job: _Job, pools: Pools, out: Decoded, guesses: _Guesses) -> tuple[Pools, Decoded]:
    """One pass: reads each live row's last token and its K guesses, draws a token after each, and keeps those up to
    the first that differs from its guess."""
    batch, width = out.tokens.shape
    count = guesses.tokens.shape[1]
    row, offsets = jnp.arange(batch)[:, None], jnp.arange(count + 1, dtype=jnp.int32)
    places = out.lengths[:, None] + offsets
    last = jnp.maximum(out.lengths - 1, 0)[:, None]
    tried = out.live[:, None] & (offsets <= guesses.counts[:, None])
    token = jnp.concatenate([jnp.take_along_axis(out.tokens, last, axis=1), guesses.tokens], axis=1)
    inputs = Inputs(token, jnp.where(tried, last + offsets, 0), tried.astype(jnp.int32))
    inputs = jax.tree.map(lambda x: _by_row(x, job.mesh), inputs)
    read = model.forward(job.params, inputs, PagedCache(pools, job.tables, mesh=job.mesh))
    drawn = _draw(model, job, out, guesses, read.hidden, places)
    hit = (drawn.token[:, :count] == guesses.tokens) & tried[:, 1:]
    follows = jnp.pad(jnp.cumprod(hit.astype(jnp.int32), axis=1), ((0, 0), (1, 0)), constant_values=1) > 0
    ends = jnp.any(drawn.token[:, :, None] == job.wishes.end_ids[:, None], axis=-1)
    over = ends | drawn.stuck
    before = jnp.cumsum(over.astype(jnp.int32), axis=1) - over.astype(jnp.int32)
    reached = out.live[:, None] & follows & (before == 0)
    draws = reached & ~drawn.stuck
    lengths = out.lengths + jnp.sum(draws, axis=1, dtype=jnp.int32)
    ended, stuck = jnp.any(draws & ends, axis=1), jnp.any(reached & drawn.stuck, axis=1)
    paused = jnp.any(draws & _has(job.pause, drawn.token), axis=1)
    # What is not drawn is written past the end, which drops it.
    at = jnp.where(draws, places, width)
    entry = jnp.where(draws, places - job.rows.lengths[:, None], out.logprobs.shape[1])
    decoded = Decoded(
        tokens=out.tokens.at[row, at].set(drawn.token, mode="drop"),
        lengths=lengths,
        live=out.live & ~ended & ~stuck & ~paused & (lengths < job.rows.limits),
        ended=out.ended | ended,
        stuck=out.stuck | stuck,
        logprobs=out.logprobs.at[row, entry].set(drawn.logprob, mode="drop"),
        best=jax.tree.map(lambda told, new: told.at[row, entry].set(new, mode="drop"), out.best, drawn.best),
        passes=out.passes + 1,
        guessed=out.guessed + jnp.sum(tried[:, 1:], axis=1, dtype=jnp.int32),
        right=out.right + jnp.sum(draws[:, :count] & hit, axis=1, dtype=jnp.int32),
    )
    return read.cache.pools, decoded


def _has(words: UInt32[Array, "B Vw"] | None, tokens: Int[Array, "B G"]) -> Bool[Array, "B G"]:
    """Whether the tokens' bits are set."""
    if words is None:
        return jnp.zeros(tokens.shape, bool)
    word = jnp.take_along_axis(words, tokens // 32, axis=1)
    return (word >> (tokens % 32).astype(jnp.uint32)) & 1 == 1


class _Drawn(NamedTuple):
    """A token after the last one, and after each guess as if it and those before were right: G = K + 1."""

    token: Int[Array, "B G"]
    logprob: Float[Array, "B G"]
    stuck: Bool[Array, "B G"]
    best: Best


def _draw(
    model: Model, job: _Job, out: Decoded, guesses: _Guesses, hidden: Float[Array, "B G D"], places: Int[Array, "B G"]
) -> _Drawn:
    """Every place with its own history and its own random number, as rows of one larger batch."""
    batch, each = places.shape

    def spread(x: Array) -> Array:
        return x if each == 1 else jnp.repeat(x, each, axis=0)

    texts = out.tokens.at[jnp.arange(batch)[:, None], places[:, : each - 1]].set(guesses.tokens, mode="drop")
    logits = model.unembed(job.params, hidden.reshape(batch * each, -1))
    # From here on each row is worked on by itself, all of its vocabulary on one device.
    logits = _by_row(logits, job.mesh, "rows")
    lengths = places.reshape(-1)
    history = History(spread(texts), spread(job.rows.prompt_lengths), jnp.minimum(lengths, jnp.int32(texts.shape[1])))
    wishes, mask = jax.tree.map(spread, (job.wishes, job.mask))
    keys = jax.random.wrap_key_data(spread(job.rows.keys), impl="threefry2x32")
    choice = choose(logits, wishes, history, uniforms(keys, lengths), mask)
    best = Best(*(x.reshape(batch * each, -1)[:, :0] for x in (choice.logprob, choice.token)))
    if n := out.best.tokens.shape[-1]:
        best = Best(*top_logprobs(log_probabilities(logits, wishes, history, mask), n))
    drawn = _Drawn(choice.token, choice.logprob, choice.stuck, best)
    drawn = jax.tree.map(lambda x: x.reshape(batch, each, *x.shape[1:]), drawn)
    return jax.tree.map(lambda x: _by_row(x, job.mesh), drawn)


def _by_row(x: Array, mesh: Mesh | None, rows: str = "batch") -> Array:
    """Splits an array by its rows alone: drawing wants another split than the model, and each shall have its own."""
    return x if mesh is None else make_constrain(mesh)(x, (rows, *[None] * (x.ndim - 1)))
