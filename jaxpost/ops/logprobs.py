"""Log-probabilities of given tokens without ever holding [B T V] logits.

Let z = unembed(h) be a token's logits and y its target: log p(y) = z_y - logZ with logZ = log sum_v exp z_v.
The vocabulary is by far the widest axis of a language model, so tokens pass through the head in chunks: the
logits of one chunk exist at a time, forward and backward.

Two functions share the machinery:

- `token_stats` returns log p and logZ per token and accepts any cotangent. Its backward pass recomputes a
  chunk's logits and reads logZ from the forward pass (four products with the head's matrix in all, three with a
  frozen head). Told which tokens matter, it leaves the others out. A few sequences' logits may be kept instead
  (`ops.platform.Choices.kept_logits`, in bytes), which saves the fourth product.
- `weighted_sum` returns sum_t w_t f(z_t) for weights known beforehand. A scalar's gradient is known up to one
  factor, so it is taken in the forward pass while the logits are at hand (three products; two with a frozen
  head), and the backward pass only scales it.

Chunks take tokens from every row (never whole rows), so each chunk is spread over all devices that hold the batch.
Where weights are given, the tokens whose weight is not 0 are put first and the rest is never visited: prompts and
padding cost no product with the head. Gradients of the head add up over chunks in float32. Only leaves of `params`
that `unembed` really reads, and that are being differentiated, get a gradient at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxpost.ops import platform
from jaxpost.types import Params

Unembed = Callable[[Params, Array], Array]
TokenFn = Callable[[Array, Any], tuple[Array, Any]]


class TokenStats(NamedTuple):
    """Per-token statistics of the logits, float32."""

    logprob: Float[Array, "*S"]
    """log p(target)."""
    logz: Float[Array, "*S"]
    """log sum exp of the logits."""
    correct: Bool[Array, "*S"]
    """Whether no other token is more likely than the target."""
    entropy: Float[Array, "*S"] | None = None
    """-sum_v p_v log p_v in nats, where it was asked for."""
    collision: Float[Array, "*S"] | None = None
    """log sum_v p_v^2, the mean probability of the policy's own tokens, where it was asked for; without gradient."""


@jax.custom_vjp
def log_normaliser(logits: Float[Array, "*S V"]) -> Float[Array, "*S"]:
    """log sum_v exp(logits_v), its gradient computed from logits and result alone (nothing else is saved)."""
    top = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.squeeze(top, -1) + jnp.log(jnp.sum(jnp.exp(logits - top), axis=-1))


def _log_normaliser_fwd(logits: Array) -> tuple[Array, tuple[Array, Array]]:
    logz = log_normaliser(logits)
    return logz, (logits, logz)


def _log_normaliser_bwd(saved: tuple[Array, Array], g: Array) -> tuple[Array]:
    logits, logz = saved
    return (g[..., None] * jnp.exp(logits - logz[..., None]),)


log_normaliser.defvjp(_log_normaliser_fwd, _log_normaliser_bwd)


def stats_of_logits(
    logits: Float[Array, "*S V"], targets: Int[Array, "*S"], *, with_entropy: bool = False, with_collision: bool = False
) -> TokenStats:
    """The statistics of logits that already exist (of one chunk, or in a test).

    Example:
      >>> float(stats_of_logits(jnp.zeros((1, 4)), jnp.array([2])).logprob[0])  # log(1/4)
      -1.3862943649291992
    """
    # A comparison with iota fuses into the reduction and stays local when the vocabulary is sharded; a gather does not.
    hit = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) == targets[..., None]
    target = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
    logz = log_normaliser(logits)
    correct = target >= jnp.max(jax.lax.stop_gradient(logits), axis=-1)
    entropy = _entropy(logits, logz) if with_entropy else None
    collision = jax.lax.stop_gradient(log_normaliser(2 * logits) - 2 * logz) if with_collision else None
    return TokenStats(target - logz, logz, correct, entropy, collision)


def _entropy(logits: Float[Array, "*S V"], logz: Float[Array, "*S"]) -> Float[Array, "*S"]:
    logp = logits - logz[..., None]
    p = jnp.exp(logp)
    return -jnp.sum(p * jnp.where(p > 0, logp, 0.0), axis=-1)  # a token that cannot come adds 0, not 0 * -inf


class _Chunks(NamedTuple):
    """How [B, T, ...] becomes [count, B, T / count, ...], T being padded to a multiple."""

    count: int
    width: int
    """Tokens of one row in a chunk."""
    length: int
    by_stride: bool
    """A chunk takes every count-th token, which keeps a T that is split over devices where it is; else neighbours."""

    @staticmethod
    def plan(batch: int, length: int, chunk_tokens: int, *, by_stride: bool) -> _Chunks:
        if chunk_tokens < 1:
            raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
        per_row = max(1, chunk_tokens // max(batch, 1))
        count = max(1, math.ceil(length / per_row))
        # Where tokens without weight come last, of many chunks the last is seldom visited: the others are as wide as
        # they may be. Few chunks are even, or a nearly empty last one would cost as much as the first.
        even = by_stride or count < 4
        return _Chunks(count, math.ceil(length / count) if even else per_row, length, by_stride)

    def split(self, x: Array) -> Array:
        pad = self.count * self.width - self.length
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2)) if pad else x
        order = (self.width, self.count) if self.by_stride else (self.count, self.width)
        return jnp.moveaxis(x.reshape(x.shape[0], *order, *x.shape[2:]), 2 if self.by_stride else 1, 0)

    def join(self, x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 2 if self.by_stride else 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, : self.length]


Body = Callable[[Any, Any], tuple[Any, Any]]


def _scan(body: Body, init: Any, xs: Any, count: int) -> tuple[Any, Any]:
    """`lax.scan`, without a loop when there is one chunk."""
    if count > 1:
        return jax.lax.scan(body, init, xs)
    carry, y = body(init, jax.tree.map(lambda x: x[0], xs))
    return carry, jax.tree.map(lambda x: x[None], y)


def _scan_first(body: Body, init: Any, xs: Any, count: int, visited: Array | None) -> tuple[Any, Any]:
    """`_scan` over the first `visited` chunks, a number known only when the program runs; other results are 0."""
    if count == 1 or visited is None:
        return _scan(body, init, xs, count)
    pick = lambda i: jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), xs)  # noqa: E731
    ys = jax.eval_shape(body, init, jax.eval_shape(pick, 0))[1]
    ys = jax.tree.map(lambda y: jnp.zeros((count, *y.shape), y.dtype), ys)

    def step(i: Array, state: tuple[Any, Any]) -> tuple[Any, Any]:
        carry, y = body(state[0], pick(i))
        return carry, jax.tree.map(lambda all_, one: jax.lax.dynamic_update_index_in_dim(all_, one, i, 0), state[1], y)

    return jax.lax.fori_loop(0, visited, step, (init, ys))


@jax.custom_vjp
def _permuted(x: Float[Array, "B T D"], order: Int[Array, "B T"], inverse: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """x with each row's tokens in `order`; its gradient is a gather too, where autodiff would scatter."""
    return jnp.take_along_axis(x, order[..., None], axis=1)


_permuted.defvjp(
    lambda x, order, inverse: (_permuted(x, order, inverse), (order, inverse)),
    lambda saved, g: (_permuted(g, saved[1], saved[0]), None, None),
)


class _Head(NamedTuple):
    """`unembed` as a function of only those leaves of `params` that it reads."""

    leaves: list[Array]
    apply: Callable[[list[Array], Array], Array]

    @staticmethod
    def of(unembed: Unembed, params: Params, hidden: Array) -> _Head:
        every, treedef = jax.tree.flatten(params)
        shape = jax.ShapeDtypeStruct((1, 1, hidden.shape[-1]), hidden.dtype)
        abstract = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in every]
        jaxpr = jax.make_jaxpr(lambda xs, h: unembed(treedef.unflatten(xs), h))(abstract, shape).jaxpr
        read = {id(v) for eqn in jaxpr.eqns for v in eqn.invars} | {id(v) for v in jaxpr.outvars}
        used = [i for i, v in enumerate(jaxpr.invars[: len(every)]) if id(v) in read]

        def apply(leaves: list[Array], h: Array) -> Array:
            merged = list(every)
            for i, leaf in zip(used, leaves, strict=True):
                merged[i] = leaf
            return unembed(treedef.unflatten(merged), h)

        return _Head([every[i] for i in used], apply)


def _part(leaves: list[Any]) -> tuple[list[Array | None], list[Array | None]]:
    """Differentiated and fixed leaves of `CustomVJPPrimal`s; None marks the other list's places."""
    diff = [x.value if x.perturbed else None for x in leaves]
    return diff, [None if x.perturbed else x.value for x in leaves]


def _merge(diff: list[Array | None], fixed: list[Array | None]) -> list[Array]:
    return [leaf for d, f in zip(diff, fixed, strict=True) if (leaf := f if d is None else d) is not None]


def _zeros32(leaves: list[Array | None]) -> list[Array | None]:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), leaves)


def _add32(total: Any, new: Any) -> Any:
    return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, new)


Measure = Callable[[Array, Array], TokenStats]


def _differentiable(head: _Head, measure: Measure, count: int) -> Callable[..., TokenStats]:
    """(leaves, hidden, targets, visited) -> what `measure` says of the chunks' logits, one chunk after another."""

    def measured(leaves: list[Array], h: Array, y: Array, visited: Array | None, *, keep: bool) -> Any:
        def body(carry: None, x: tuple[Array, Array]) -> tuple[None, tuple[TokenStats, Array | None]]:
            logits = head.apply(leaves, x[0])
            return carry, (measure(logits, x[1]), logits if keep else None)

        return _scan_first(body, None, (h, y), count, visited)[1]

    @jax.custom_vjp
    def run(leaves: list[Array], h: Array, y: Array, visited: Array | None) -> TokenStats:
        return measured(leaves, h, y, visited, keep=False)[0]

    def forward(leaves: Any, h: Any, y: Any, visited: Any) -> tuple[TokenStats, Any]:
        values, visited = [x.value for x in leaves], None if visited is None else visited.value
        logits = jax.eval_shape(head.apply, values, h.value)
        keep = logits.size * logits.dtype.itemsize <= platform.choices().kept_logits
        out, logits = measured(values, h.value, y.value, visited, keep=keep)
        return out, (*_part(leaves), h.value, y.value, visited, logits, out.logz, out.entropy)

    def backward(saved: Any, g: TokenStats) -> tuple[Any, Array, None, None]:
        diff, fixed, h, y, visited, kept, logz, entropy = saved

        def body(total: Any, x: tuple[Any, ...]) -> tuple[Any, Any]:
            h, kept, *rest = x
            again, pull = jax.vjp(lambda d, h: head.apply(_merge(d, fixed), h), diff, h)
            g_diff, g_h = pull(_logits_grad(again if kept is None else kept, *rest))
            return _add32(total, g_diff), g_h

        xs = (h, kept, y, logz, entropy, *_told(g, logz))
        total, g_h = _scan_first(body, _zeros32(diff), xs, count, visited)
        return jax.tree.map(lambda t, d: t.astype(d.dtype), total, diff), g_h, None, None

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run


def token_stats(
    unembed: Unembed,
    params: Params,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    *,
    chunk_tokens: int,
    with_entropy: bool = False,
    with_collision: bool = False,
    weights: Float[Array, "B T"] | None = None,
) -> TokenStats:
    """log p(target), logZ and, if asked, the entropy of every token, float32 [B T], without [B T V].

    Args:
      unembed: (params, hidden[... D]) -> logits[... V], a row-wise function.
      hidden: final hidden states.
      targets: token ids in [0, V).
      chunk_tokens: tokens whose logits exist at one time, over all devices; T is padded where it does not divide.
      weights: tokens where they are 0 may be left out; their statistics are then 0.

    Example:
      >>> hidden, targets = jnp.zeros((1, 5, 3)), jnp.zeros((1, 5), int)
      >>> stats = token_stats(lambda w, h: h @ w, jnp.eye(3), hidden, targets, chunk_tokens=2)
      >>> round(float(stats.logprob[0, 0]), 4)
      -1.0986
    """
    chunks = _Chunks.plan(*hidden.shape[:2], chunk_tokens, by_stride=weights is None)
    head = _Head.of(unembed, params, hidden)
    measure = partial(stats_of_logits, with_entropy=with_entropy, with_collision=with_collision)

    run = _differentiable(head, measure, chunks.count)
    if weights is None:
        return jax.tree.map(chunks.join, run(head.leaves, chunks.split(hidden), chunks.split(targets), None))
    order, inverse, visited = _weighted_first(weights, chunks)
    ordered = chunks.split(_permuted(hidden, order, inverse)), chunks.split(_reordered(targets, order))
    back = lambda x: jnp.where(weights != 0, _reordered(chunks.join(x), inverse), jnp.zeros((), x.dtype))  # noqa: E731
    return jax.tree.map(back, run(head.leaves, *ordered, visited))


def _told(g: TokenStats, like: Array) -> tuple[Array, Array, Array | None]:
    """Cotangents of log p, logZ and the entropy, zeros where there are none; None for an entropy that nobody read."""
    zero = lambda x: isinstance(x, jax.custom_derivatives.SymbolicZero)  # noqa: E731
    logprob, logz = (jnp.zeros(like.shape, like.dtype) if zero(x) else x for x in (g.logprob, g.logz))
    return logprob, logz, None if zero(g.entropy) else g.entropy


def _logits_grad(
    logits: Array,
    y: Array,
    logz: Array,
    entropy: Array | None,
    g_logprob: Array,
    g_logz: Array,
    g_entropy: Array | None,
) -> Array:
    """What comes back to a chunk's logits."""
    hit = jax.lax.broadcasted_iota(y.dtype, logits.shape, logits.ndim - 1) == y[..., None]
    p = jnp.exp(logits - logz[..., None])
    out = jnp.where(hit, g_logprob[..., None], 0.0) + (g_logz - g_logprob)[..., None] * p
    if g_entropy is not None and entropy is not None:  # dH/dz_v = -p_v (log p_v + H)
        logp = jnp.where(p > 0, logits - logz[..., None], 0.0)
        out -= g_entropy[..., None] * p * (logp + entropy[..., None])
    return out.astype(logits.dtype)


def _weighted_first(
    weights: Float[Array, "B T"], chunks: _Chunks
) -> tuple[Int[Array, "B T"], Int[Array, "B T"], Int[Array, ""]]:
    """An order of each row's tokens with those first whose weight is not 0, its inverse, and the chunks they fill."""
    order = jnp.argsort(weights == 0, axis=1, stable=True)
    most = jnp.max(jnp.sum(weights != 0, axis=1))
    return order, jnp.argsort(order, axis=1), (most + chunks.width - 1) // chunks.width


def _reordered(x: Array, order: Int[Array, "B T"]) -> Array:
    """x [B T ...] with each row's tokens in another order."""
    return jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)


def weighted_sum(
    unembed: Unembed,
    params: Params,
    hidden: Float[Array, "B T D"],
    weights: Float[Array, "B T"],
    per_token: Any,
    fn: TokenFn,
    *,
    chunk_tokens: int,
) -> tuple[Float[Array, ""], Any]:
    """sum_t w_t f(logits_t), differentiated while the logits are at hand; and what f says of each token beside.

    Args:
      weights: w, known beforehand: they get no gradient. f counts only where w is not 0.
      per_token: a pytree of [B T ...] arrays (targets, teacher's choices ...), cut into chunks like the tokens.
      fn: (logits[B t V], per_token of the chunk) -> (values[B t], aux); pure and row-wise. aux, a pytree of
        [B t ...] arrays, comes back joined to [B T ...] and without gradient; where w is 0 it may be 0 instead.
      chunk_tokens: as in `token_stats`.

    Returns: the sum, float32, and aux.
    """
    chunks = _Chunks.plan(*hidden.shape[:2], chunk_tokens, by_stride=False)
    head = _Head.of(unembed, params, hidden)
    order, inverse, visited = _weighted_first(weights, chunks)

    def part(leaves: list[Array], h: Array, w: Array, extra: Any) -> tuple[Array, Any]:
        values, aux = fn(head.apply(leaves, h), extra)
        return jnp.sum(w * jnp.where(w != 0, values, 0.0)), aux

    @jax.custom_vjp
    def run(leaves: list[Array], h: Array, w: Array, extra: Any, visited: Array) -> tuple[Array, Any]:
        def body(total: Array, x: tuple[Array, Array, Any]) -> tuple[Array, Any]:
            value, aux = part(leaves, *x)
            return total + value, aux

        return _scan_first(body, jnp.zeros((), jnp.float32), (h, w, extra), chunks.count, visited)

    def forward(leaves: Any, h: Any, *rest: Any) -> tuple[tuple[Array, Any], Any]:
        diff, fixed = _part(leaves)
        w, extra, visited = jax.tree.map(lambda x: x.value, rest, is_leaf=lambda x: hasattr(x, "perturbed"))

        def body(carry: tuple[Array, Any], x: tuple[Array, Array, Any]) -> tuple[tuple[Array, Any], Any]:
            h, w, extra = x
            f = jax.value_and_grad(lambda d, h: part(_merge(d, fixed), h, w, extra), argnums=(0, 1), has_aux=True)
            (value, aux), (g_diff, g_h) = f(diff, h)
            return (carry[0] + value, _add32(carry[1], g_diff)), (aux, g_h)

        start = (jnp.zeros((), jnp.float32), _zeros32(diff))
        (total, g_diff), (aux, g_h) = _scan_first(body, start, (h.value, w, extra), chunks.count, visited)
        g_diff = jax.tree.map(lambda t, d: t.astype(d.dtype), g_diff, diff)
        return (total, aux), (g_diff, g_h)

    def backward(saved: Any, g: tuple[Array, Any]) -> tuple[Any, ...]:
        return *jax.tree.map(lambda x: (g[0] * x.astype(jnp.float32)).astype(x.dtype), saved), None, None, None

    run.defvjp(forward, backward, symbolic_zeros=True)
    others = jax.tree.map(lambda x: chunks.split(_reordered(x, order)), (weights, per_token))
    total, aux = run(head.leaves, chunks.split(_permuted(hidden, order, inverse)), *others, visited)
    return total, jax.tree.map(lambda x: _reordered(chunks.join(x), inverse), aux)
