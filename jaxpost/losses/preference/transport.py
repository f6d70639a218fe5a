"""Alignment by optimal transport (AOT, 2406.05882): compares distributions over a batch, not pair with pair.

One distribution is to dominate the other at every quantile. With u_(1) <= ... <= u_(n) and v_(1) <= ... the sorted
numbers of a batch, the loss is the mean over i of -log s(b (u_(i) - v_(i))), smoothed as DPO's, where

| function | u | v |
|---|---|---|
| `aot` | log pi(y_c) - log pi(y_r) of each pair | the same of the reference |
| `aot_unpaired` | log pi/pi_ref of each chosen answer | of each rejected answer |

Sorting couples all rows: the gradient is that of the whole batch's order (`types.Coupled`). Both are
(answers, hyper) -> Term.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxpost.losses.preference.pairs import Answers, sides
from jaxpost.losses.preference.shapes import known, log_ratio, logistic
from jaxpost.types import Hyper, Term


def aot(answers: Answers, hyper: Hyper) -> Term:
    """-log s(b (u_(i) - v_(i))): the policy's preferences dominate the reference's (2406.05882, paired).

    Args:
      hyper: "beta", "label_smoothing".

    Example:
      >>> from jaxpost.losses.preference.pairs import AnswerStats
      >>> row = lambda *x: jnp.array([x])
      >>> stats = AnswerStats(row(-3.0, -4.0), row(2.0, 2.0), row(-3.0, -4.0))
      >>> term = aot(Answers(stats, row(1, 1), row(0, 1), row(1.0, 1.0)), {"beta": 0.1})
      >>> round(float(term.value[0]), 4), float(term.weight[0])  # log 2
      (0.6931, 1.0)
    """
    pairs = sides(answers)
    chosen, rejected = pairs.chosen, pairs.rejected
    there = pairs.weight > 0
    now, count = _sorted(chosen.logprob - rejected.logprob, there)
    before, _ = _sorted(known(chosen.ref_logprob) - known(rejected.ref_logprob), there)
    return _dominance(now, count, before, count, hyper)


def aot_unpaired(answers: Answers, hyper: Hyper) -> Term:
    """-log s(b (u_(i) - v_(i))): rewards of chosen answers dominate those of rejected ones (2406.05882, unpaired).

    Needs no pairs. Where a batch has not as many chosen as rejected answers, the fewer ones' quantiles are repeated.
    """
    ratios, chosen = log_ratio(answers.stats), answers.ranks == 0
    return _dominance(*_sorted(ratios, answers.valid & chosen), *_sorted(ratios, answers.valid & ~chosen), hyper)


def _sorted(x: Float[Array, "B S"], there: Bool[Array, "B S"]) -> tuple[Float[Array, " N"], Array]:
    """All numbers that are there in ascending order, then zeros; and how many there are."""
    flat, count = jnp.where(there, x, jnp.inf).ravel(), jnp.sum(there.astype(jnp.int32))
    order = jnp.argsort(flat)
    return jnp.where(jnp.arange(flat.size) < count, x.ravel()[order], 0.0), count


def _dominance(u: Float[Array, " N"], n: Array, v: Float[Array, " N"], m: Array, hyper: Hyper) -> Term:
    """The loss at the middles of max(n, m) quantiles; nothing to learn where either is empty."""
    points = jnp.where((n > 0) & (m > 0), jnp.maximum(n, m), 0)
    place = jnp.arange(u.size)
    at = lambda x, count: x[jnp.clip((2 * place + 1) * count // jnp.maximum(2 * points, 1), 0, u.size - 1)]  # noqa: E731
    value = logistic(hyper["beta"] * (at(u, n) - at(v, m)), hyper)
    return Term(value, (place < points).astype(jnp.float32))
