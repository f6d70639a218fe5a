"""Sums and weights of `Term`s: how means stay exact over microbatches, devices, hosts and batches.

A mean is never averaged. What is carried is the pair (sum of value * weight, sum of weight); it is added up
over as many pieces as there are, and divided once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpost.types import Term, Terms


class Sums(NamedTuple):
    """A reduced Term: addable over microbatches and batches, divided once at the end."""

    total: Float[Array, ""]
    """Sum of value * weight."""
    weight: Float[Array, ""]
    """Sum of weight."""
    coef: Float[Array, ""]
    """Share of the mean in the loss; 0 for metrics."""


def reduce_term(term: Term) -> Sums:
    """Sum value * weight and weight over all elements, in float32.

    A value where the weight is 0 is left out, whatever it is (NaN too), and gets a zero gradient.

    Example:
      >>> reduce_term(Term(jnp.array([1.0, 3.0, jnp.nan]), jnp.array([1.0, 3.0, 0.0]))).total
      Array(10., dtype=float32)
    """
    weight = jnp.asarray(term.weight).astype(jnp.float32)
    value = jnp.asarray(term.value).astype(jnp.float32)
    weight = jnp.broadcast_to(weight, jnp.broadcast_shapes(weight.shape, value.shape))
    value = jnp.where(weight != 0, value, 0.0)
    return Sums(jnp.sum(value * weight), jnp.sum(weight), jnp.asarray(term.coef, jnp.float32))


def reduce_terms(terms: Terms, metrics: Terms) -> dict[str, Sums]:
    """Reduce a loss function's output: its terms keep their coefficients, its metrics get 0.

    Raises:
      ValueError: a metric has the name of a term, or either is called "loss".
    """
    clash = (set(terms) & set(metrics)) | ({"loss"} & (set(terms) | set(metrics)))
    if clash:
        raise ValueError(f"names used twice by a loss function's terms and metrics ('loss' is the total): {clash}")
    out = {name: reduce_term(term) for name, term in terms.items()}
    return out | {name: reduce_term(term._replace(coef=0.0)) for name, term in metrics.items()}


def add(left: Mapping[str, Sums], right: Mapping[str, Sums]) -> dict[str, Sums]:
    """Add two reductions of the same loss function over different pieces of data.

    Example:
      >>> piece = {"nll": reduce_term(Term(jnp.array([2.0, 4.0]), jnp.array([1.0, 1.0])))}
      >>> float(means(add(piece, piece))["nll"])
      3.0
    """
    if set(left) != set(right):
        raise ValueError(f"cannot add reductions of different terms: {sorted(left)} and {sorted(right)}")
    return {k: Sums(s.total + right[k].total, s.weight + right[k].weight, s.coef) for k, s in left.items()}


def mean(sums: Sums) -> Float[Array, ""]:
    """total / weight, and 0 where the weight is 0."""
    return divide(sums.total, sums.weight)


def divide(total: Float[Array, "*S"], weight: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """total / weight, and 0 (with zero gradient) where the weight is 0."""
    return jnp.where(weight == 0, 0.0, total / jnp.where(weight == 0, 1.0, weight))


def means(sums: Mapping[str, Sums]) -> dict[str, Array]:
    """The mean of every entry, and "loss", the sum of coef * mean.

    Example:
      >>> out = means({"nll": Sums(jnp.float32(6), jnp.float32(3), jnp.float32(1))})
      >>> float(out["nll"]), float(out["loss"])
      (2.0, 2.0)
    """
    out = {name: mean(s) for name, s in sums.items()}
    # A coefficient of 0 leaves the term out entirely: 0 * NaN of a metric must not reach the loss.
    parts = [jnp.where(s.coef == 0, 0.0, s.coef * out[name]) for name, s in sums.items()]
    return {"loss": sum(parts, start=jnp.zeros((), jnp.float32)), **out}


def to_host(sums: Mapping[str, Sums]) -> dict[str, Sums]:
    """The same sums as NumPy scalars of float64, so that adding many batches loses nothing."""
    return {name: Sums(*(jax.device_get(x).astype("float64") for x in s)) for name, s in sums.items()}
