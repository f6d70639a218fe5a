"""The gradient of exact means, microbatch by microbatch.

The total weights W_i of a loss's terms come from the batch alone, so they are summed over all microbatches before the
first is differentiated, and every microbatch contributes sum_i c_i (sum of its own v w) / W_i. Gradients add up in
float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
from jax.interpreters import partial_eval
from jaxtyping import Array, Bool, PRNGKeyArray

from jaxpost.metrics.terms import Sums, add, divide, reduce_term, reduce_terms
from jaxpost.types import Hyper, LossFn, Params, TrainState


class Gradients(NamedTuple):
    """Of a whole batch."""

    grads: Params
    sums: dict[str, Sums]
    """Of every term and metric."""
    weights: dict[str, Array]
    """Total weight of every term."""
    extra: dict[str, Any]
    """Entries of `TrainState.extra` that an accepted update replaces."""


GradientsFn = Callable[[TrainState, Params, Any, PRNGKeyArray, Hyper], Gradients]


def split_microbatches(batch: Any, count: int) -> Any:
    """[B, ...] -> [count, B / count, ...] by stride, which keeps a sharded B on its devices.

    Raises:
      ValueError: some leaf does not lead with B, or B is not divisible by `count`.

    Example:
      >>> split_microbatches(jnp.arange(6), 2)
      Array([[0, 2, 4],
             [1, 3, 5]], dtype=int32)
    """
    sizes: set[Any] = {x.shape[0] if x.ndim else None for x in jax.tree.leaves(batch)}
    if len(sizes) != 1 or None in sizes:
        raise ValueError(f"every array of a batch must lead with the same number of rows, found {sizes}")
    (rows,) = sizes
    if rows % count:
        raise ValueError(
            f"a batch of {rows} rows cannot be split into {count} microbatches of equal size; "
            f"choose a batch size that is a multiple of {count}"
        )
    return jax.tree.map(lambda x: x.reshape(rows // count, count, *x.shape[1:]).swapaxes(0, 1), batch)


def weights_only(loss_fn: LossFn, *args: Any) -> Callable[..., dict[str, Array]]:
    """The total weight of each term of `loss_fn(*args)`, as a function that reads no parameter.

    The loss function is traced once and everything that the weights do not need is removed.

    Returns:
      f(frozen, batch, key, hyper) -> {term: sum of weights}.

    Raises:
      ValueError: some weight depends on params: it would change the mean that is being differentiated.
    """

    def total_weights(*args: Any) -> dict[str, Array]:
        return {name: reduce_term(term).weight for name, term in loss_fn(*args)[0].items()}

    closed, shapes = jax.make_jaxpr(total_weights, return_shape=True)(*args)
    jaxpr, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    num_params = len(jax.tree.leaves(args[0]))
    if any(used[:num_params]):
        paths = jax.tree.leaves_with_path(args[0])
        read = [jax.tree_util.keystr(path) for (path, _), u in zip(paths, used, strict=False) if u]
        raise ValueError(f"weights of loss terms must come from the batch alone, but they depend on params{read[0]}")
    run = jax.extend.core.jaxpr_as_fun(jax.extend.core.ClosedJaxpr(jaxpr, closed.consts))

    def weights(*rest: Any) -> dict[str, Array]:
        flat = [x for x, u in zip(jax.tree.leaves(rest), used[num_params:], strict=True) if u]
        return jax.tree.unflatten(jax.tree.structure(shapes), run(*flat))

    return weights


def plain_gradients(loss_fn: LossFn, *, num_microbatches: int, skip_empty: bool) -> GradientsFn:
    """The gradient of a loss whose rows do not depend on one another; arguments as `train.step.make_train_step`."""

    def gradients(state: TrainState, frozen: Params, batch: Any, key: PRNGKeyArray, hyper: Hyper) -> Gradients:
        pieces = split_microbatches(batch, num_microbatches)
        first = jax.tree.map(lambda x: x[0], pieces)
        weights_of = weights_only(loss_fn, state.params, frozen, first, key, hyper)
        each = jax.lax.map(lambda piece: weights_of(frozen, piece, key, hyper), pieces)
        weights = jax.tree.map(jnp.sum, each)
        live = jnp.any(jnp.stack(list(each.values())) != 0, axis=0) if skip_empty else None
        differentiate = partial(_piece_grads, loss_fn, weights, state.params, frozen, key, hyper)
        grads, sums = differentiate(first) if num_microbatches == 1 else accumulate(differentiate, pieces, live)
        return Gradients(grads, sums, weights, {})

    return gradients


def _piece_grads(
    loss_fn: LossFn,
    weights: dict[str, Array],
    params: Params,
    frozen: Params,
    key: PRNGKeyArray,
    hyper: Hyper,
    piece: Any,
) -> tuple[Params, dict[str, Sums]]:
    """One microbatch's share of the whole batch's gradient, and its sums."""

    def share(params: Params) -> tuple[Array, dict[str, Sums]]:
        sums = reduce_terms(*loss_fn(params, frozen, piece, key, hyper))
        parts = [sums[name].coef * divide(sums[name].total, weight) for name, weight in weights.items()]
        return sum(parts, start=jnp.zeros((), jnp.float32)), sums

    return jax.grad(share, has_aux=True)(params)


def accumulate(
    differentiate: Callable[[Any], Any], pieces: Any, live: Bool[Array, " M"] | None
) -> tuple[Params, dict[str, Sums]]:
    """Sum gradients (in float32) and sums over the microbatches, one at a time; only the `live` ones where given."""
    first = jax.tree.map(lambda x: x[0], pieces)
    grads, sums = jax.eval_shape(differentiate, first)

    def added(carry: tuple[Any, Any], piece: Any) -> tuple[Any, Any]:
        grads, sums = differentiate(piece)
        return jax.tree.map(lambda a, g: a + g.astype(jnp.float32), carry[0], grads), add(sums, carry[1])

    def body(carry: tuple[Any, Any], part: tuple[Any, Array | None]) -> tuple[tuple[Any, Any], None]:
        piece, on = part
        return added(carry, piece) if on is None else jax.lax.cond(on, added, lambda c, _: c, carry, piece), None

    start = (
        jax.tree.map(lambda g: jnp.zeros(g.shape, jnp.float32), grads),
        jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), sums),
    )
    return jax.lax.scan(body, start, (pieces, live))[0]
