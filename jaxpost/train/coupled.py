"""The gradient of a loss that couples the rows of a batch, exact over any number of microbatches.

Let s be the rows' statistics and L(s) the loss of all of them (`types.Coupled`). The chain rule splits by rows:

  dL/dparams = sum over microbatches of (dL/ds of its rows) (ds/dparams of its rows)

So the statistics of all microbatches are computed first, without gradient; L is differentiated by them, small arrays
both; then each microbatch is computed again and differentiated with its share of dL/ds. Splitting such a loss itself
(sorting within each microbatch) would be another loss. A batch in one piece is differentiated as it stands.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from jaxpost.metrics.terms import Sums, means, reduce_terms
from jaxpost.train.gradients import Gradients, GradientsFn, accumulate, split_microbatches, weights_only
from jaxpost.types import Coupled, Hyper, LossFn, Params, Terms, TrainState


def uncoupled(loss: Coupled) -> LossFn:
    """outer(stats(...)) of the rows at hand, as before the first step: right where they are the whole batch."""

    def whole(params: Params, frozen: Params, batch: Any, key: PRNGKeyArray, hyper: Hyper) -> tuple[Terms, Terms]:
        return loss.outer(loss.stats(params, frozen, batch, key, hyper), hyper, loss.memory)[:2]

    return whole


def coupled_gradients(loss: Coupled, *, num_microbatches: int, skip_empty: bool) -> GradientsFn:
    """The gradient of outer(stats(whole batch)); arguments as `train.step.make_train_step`."""

    def gradients(state: TrainState, frozen: Params, batch: Any, key: PRNGKeyArray, hyper: Hyper) -> Gradients:
        weights_only(uncoupled(loss), state.params, frozen, batch, key, hyper)  # raises where they depend on params
        measure = lambda params, piece: loss.stats(params, frozen, piece, key, hyper)  # noqa: E731
        memory = state.extra.get("memory", loss.memory)

        def total(stats: Any) -> tuple[Array, tuple[dict[str, Sums], dict[str, Array], Any]]:
            terms, metrics, new = loss.outer(stats, hyper, memory)
            sums = reduce_terms(terms, metrics)
            return means(sums)["loss"], (sums, {name: sums[name].weight for name in terms}, new)

        if num_microbatches == 1:
            grads, told = jax.grad(lambda params: total(measure(params, batch)), has_aux=True)(state.params)
        else:
            grads, told = _in_pieces(measure, total, state.params, batch, num_microbatches, skip_empty)
        sums, weights, new = told
        return Gradients(grads, sums, weights, {"memory": new} if "memory" in state.extra else {})

    return gradients


def _in_pieces(measure: Any, total: Any, params: Params, batch: Any, count: int, skip: bool) -> tuple[Params, Any]:
    """The gradient of total(measure(params, batch)), and what `total` says beside."""
    pieces = split_microbatches(batch, count)
    join = lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])  # noqa: E731
    stats = jax.tree.map(join, jax.lax.map(partial(measure, params), pieces))
    leaves, tree = jax.tree.flatten(stats)
    places = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating)]

    def by_floats(floats: list[Array]) -> tuple[Array, Any]:
        new = dict(zip(places, floats, strict=True))
        return total(tree.unflatten([new.get(i, x) for i, x in enumerate(leaves)]))

    upper, told = jax.grad(by_floats, has_aux=True)([leaves[i] for i in places])
    upper = split_microbatches(upper, count)

    def share(params: Params, part: tuple[Any, list[Array]]) -> Array:
        """The function whose gradient is this microbatch's part of the whole one's."""
        floats = [jax.tree.leaves(measure(params, part[0]))[i] for i in places]
        products = [jnp.sum(jnp.where(g != 0, g * x, 0.0)) for g, x in zip(part[1], floats, strict=True)]
        return sum(products, start=jnp.zeros((), jnp.float32))

    live = jnp.any(jnp.stack([jnp.any(g != 0, axis=range(1, g.ndim)) for g in upper]), axis=0) if skip else None
    differentiate = lambda part: (jax.grad(share)(params, part), {})  # noqa: E731
    return accumulate(differentiate, (pieces, upper), live)[0], told
