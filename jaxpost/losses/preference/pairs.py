"""What preference losses read: sums over each answer's tokens, and the two sides of each pair.

Rows are packed, so an answer is a segment (`types.AnswerBatch`). Per-token numbers [B T] become per-answer tables
[B S] by a sum over the tokens of each segment, and these become pairs [B P] by a sum over the answers of each group:
column p holds the group p + 1. Both are masked sums, exact in float32, local to a row, and nothing of one answer
reaches another.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxpost.types import AnswerBatch


class AnswerStats(NamedTuple):
    """What is known of answers, each number a sum over the tokens whose weight is not 0, times that weight."""

    logprob: Float[Array, "*S"]
    """log pi(y | x)."""
    length: Float[Array, "*S"]
    """Tokens."""
    ref_logprob: Float[Array, "*S"] | None = None
    """log pi_ref(y | x)."""
    kl: Float[Array, "*S"] | None = None
    """k3 of the log ratios, without gradient."""
    shared: Float[Array, "*S"] | None = None
    """log pi of the first tokens, as many as the group's shortest answer has."""
    ref_shared: Float[Array, "*S"] | None = None
    likeness: Float[Array, "*S"] | None = None
    """log pi(y_t) - log sum_v pi(v)^2, without gradient: how much an answer looks like the policy's own."""


class Answers(NamedTuple):
    """The answers of a batch, one column per segment; columns that are no answer have group 0."""

    stats: AnswerStats
    """[B S]."""
    groups: Int[Array, "B S"]
    ranks: Int[Array, "B S"]
    strengths: Float[Array, "B S"]
    from_reference: Float[Array, "B S"] | None = None

    @property
    def valid(self) -> Bool[Array, "B S"]:
        """Answers to their own prompt with at least one token."""
        return (self.groups > 0) & (self.ranks >= 0) & (self.stats.length > 0)


class Sides(NamedTuple):
    """Pairs: the best and the worst answer of each group, [B P]."""

    chosen: AnswerStats
    rejected: AnswerStats
    strength: Float[Array, "B P"]
    """By how much the chosen answer is better: a margin by grade, or 1."""
    weight: Float[Array, "B P"]
    """1, and 0 where there is no pair: a tie, an empty side, a single answer, padding."""


def per_answer(x: Float[Array, "B T"], member: Bool[Array, "B T S"]) -> Float[Array, "B S"]:
    """Each segment's sum of x. A masked sum: products with one-hot matrices are rounded on TPU."""
    return jnp.sum(jnp.where(member, x[..., None], 0.0), axis=1)


def members(segment_ids: Int[Array, "B T"], segments: int) -> Bool[Array, "B T S"]:
    """Whether token t belongs to segment s + 1."""
    return segment_ids[..., None] == jnp.arange(1, segments + 1, dtype=segment_ids.dtype)


def answers_of(
    batch: AnswerBatch,
    weights: Float[Array, "B T"],
    logprobs: Float[Array, "B T"],
    ref_logprobs: Float[Array, "B T"] | None = None,
    *,
    likeness: Float[Array, "B T"] | None = None,
    kl: Float[Array, "B T"] | None = None,
    shared: bool = False,
) -> Answers:
    """Sums over the answers of a batch.

    Args:
      weights, logprobs, ...: at the positions that predict each token (`losses.supervised.next_tokens`); what stands
        where the weight is 0 does not count.
      shared: also sum over the first tokens of the answers of a group, as many as the shortest has (LD-DPO).
    """
    member = members(batch.segment_ids, batch.groups.shape[1])
    total = lambda x: None if x is None else per_answer(jnp.where(weights != 0, weights * x, 0.0), member)  # noqa: E731
    stats = AnswerStats(
        logprob=per_answer(jnp.where(weights != 0, weights * logprobs, 0.0), member),
        length=per_answer(weights, member),
        ref_logprob=total(ref_logprobs),
        kl=total(kl),
        likeness=total(likeness),
    )
    if shared:
        first = _first_tokens(weights, member, batch.groups, batch.ranks)
        only = lambda x: None if x is None else jnp.where(first, x, 0.0)  # noqa: E731
        stats = stats._replace(shared=total(only(logprobs)), ref_shared=total(only(ref_logprobs)))
    return Answers(stats, batch.groups, batch.ranks, batch.strengths, batch.from_reference)


def _first_tokens(
    weights: Float[Array, "B T"], member: Bool[Array, "B T S"], groups: Int[Array, "B S"], ranks: Int[Array, "B S"]
) -> Bool[Array, "B T"]:
    """Which tokens stand among the first n of their answer, n the tokens of the group's shortest answer."""
    trained = member & (weights != 0)[..., None]
    place = jnp.cumsum(trained.astype(jnp.int32), axis=1)
    length = place[:, -1]
    together = (groups[:, None, :] == groups[:, :, None]) & (groups > 0)[:, None, :] & (ranks >= 0)[:, None, :]
    shortest = jnp.min(jnp.where(together, length[:, None, :], place.shape[1]), axis=2)
    return jnp.any(trained & (place <= shortest[:, None, :]), axis=2)


def sides(answers: Answers) -> Sides:
    """The best and the worst answer of every group of at least two.

    Answers of equal rank at either end make no pair; of three or more answers, those in between are not read: give
    each pair of a ranking as a group of its own.

    Example:
      >>> row = lambda *x: jnp.array([x])
      >>> stats = AnswerStats(row(-3.0, -1.0, -2.0), row(2.0, 1.0, 4.0))
      >>> pairs = sides(Answers(stats, row(0, 1, 1), row(0, 1, 0), row(1.0, 1.0, 1.0)))
      >>> pairs.chosen.logprob.tolist(), pairs.rejected.logprob.tolist(), pairs.weight.tolist()
      ([[-2.0]], [[-1.0]], [[1.0]])
    """
    best, worst, weight = _ends(answers)
    side = lambda which: AnswerStats(*(None if x is None else _pick(x, which) for x in answers.stats))  # noqa: E731  # ty: ignore[invalid-argument-type]
    return Sides(side(best), side(worst), _pick(answers.strengths, best), weight)


def of_pairs(values: Float[Array, "B S"], answers: Answers) -> tuple[Float[Array, "B P"], Float[Array, "B P"]]:
    """Any number per answer, of the chosen and of the rejected side of every pair."""
    best, worst, _ = _ends(answers)
    return _pick(values, best), _pick(values, worst)


def _pick(x: Float[Array, "B S"], which: Bool[Array, "B S P"]) -> Float[Array, "B P"]:
    return jnp.sum(jnp.where(which, x[..., None], 0.0), axis=1)


def _ends(answers: Answers) -> tuple[Bool[Array, "B S P"], Bool[Array, "B S P"], Float[Array, "B P"]]:
    """Which answer is the best and which the worst of every group, and the weight of the pair."""
    groups, ranks = answers.groups, answers.ranks
    ids = jnp.arange(1, max(1, groups.shape[1] // 2) + 1, dtype=groups.dtype)
    inside = (groups[..., None] == ids) & (ranks >= 0)[..., None]
    last = jnp.max(jnp.where(inside, ranks[..., None], 0), axis=1, keepdims=True)
    best, worst = inside & (ranks == 0)[..., None], inside & (ranks[..., None] == last)
    count = lambda which: jnp.sum(which.astype(jnp.int32), axis=1)  # noqa: E731
    one = lambda which: (count(which) == 1) & (count(which & answers.valid[..., None]) == 1)  # noqa: E731
    pair = one(best) & one(worst) & (last[:, 0] > 0)
    # Where there is no pair neither side is read, so that a value left out of a mean is always an ordinary number.
    best, worst = best & pair[:, None, :], worst & pair[:, None, :]
    return best, worst, pair.astype(jnp.float32)
