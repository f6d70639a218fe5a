"""Pairs of the policy's own samples: the best and the worst of each group, as `losses.preference` reads them.

Who is best travels in `RolloutBatch.advantages`: +n on the tokens of the best sample of group n, -n on those of its
worst, 0 on all others (`rl.advantages.best_worst`). Both stand in one row, behind one copy of their prompt. Where an
opponent drew some of the samples, as the reference does in XPO, `RolloutBatch.opponent` says which.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxpost.types import AnswerBatch, Coupled, Hyper, LossFn, Params, RolloutBatch


def to_pairs(batch: RolloutBatch, *, groups: int) -> AnswerBatch:
    """The samples that are best or worst as answers with ranks 0 and 1; the others are read and do not count.

    Segments are renumbered: column 2k is the best and 2k + 1 the worst sample of the row's k-th group.

    Args:
      groups: the largest n.

    Example:
      >>> row = lambda *x: jnp.array([x])
      >>> on = row(0.0, 0.0, 1.0, 0.0, 1.0)
      >>> samples = RolloutBatch(row(5, 6, 7, 6, 8), row(0, 1, 2, 1, 2), row(1, 2, 2, 3, 3), on, jnp.array([0]),
      ...     advantages=row(0.0, 0.0, -4.0, 0.0, 4.0), prefix_ids=row(0, 1, 1, 1, 1))
      >>> pairs = to_pairs(samples, groups=4)
      >>> pairs.segment_ids.tolist(), pairs.prefix_ids.tolist()  # the prompt behind the 8 columns, worst 2, best 1
      ([[9, 2, 2, 1, 1]], [[0, 9, 9, 9, 9]])
      >>> pairs.groups.tolist()[0][:3], pairs.ranks.tolist()[0][:3]
      ([1, 1, 0], [0, 1, 0])
    """
    columns = 2 * groups
    own = (batch.weights != 0) & (batch.advantages != 0)
    number = jnp.where(own, jnp.round(jnp.abs(batch.advantages)).astype(jnp.int32), 0)
    present = jnp.any(number[..., None] == jnp.arange(groups + 1, dtype=jnp.int32), axis=1).at[:, 0].set(False)
    place = jnp.cumsum(present.astype(jnp.int32), axis=1)  # the row's k-th group, from 1
    kth = jnp.take_along_axis(place, number, axis=1)
    column = jnp.where(own, 2 * kth - 1 + (batch.advantages < 0).astype(jnp.int32), 0)
    size = batch.tokens.shape[1] + 1
    whole = jax.vmap(lambda x, s: jax.ops.segment_max(x, s, size)[s])(column, batch.segment_ids)
    behind = lambda ids: jnp.where(ids > 0, columns + ids, 0)  # noqa: E731
    table = jnp.arange(columns, dtype=jnp.int32)[None]
    live = table // 2 < place[:, -1:]
    return AnswerBatch(
        tokens=batch.tokens,
        positions=batch.positions,
        segment_ids=jnp.where(whole > 0, whole, behind(batch.segment_ids)),
        weights=jnp.where(own, 1.0, 0.0),
        row_ids=batch.row_ids,
        groups=jnp.where(live, table // 2 + 1, 0),
        ranks=jnp.where(live, table % 2, 0),
        strengths=live.astype(jnp.float32),
        ref_logprobs=batch.ref_logprobs,
        prefix_ids=None if batch.prefix_ids is None else behind(batch.prefix_ids),
        from_reference=None if batch.opponent is None else _any_of(batch.opponent, column, columns),
    )


def _any_of(marked: Float[Array, "B T"], column: Int[Array, "B T"], columns: int) -> Float[Array, "B S"]:
    """1 for columns with a marked token."""
    mark = lambda x, at: jnp.zeros(columns + 1).at[at].max(x)[1:]  # noqa: E731
    return jax.vmap(mark)(marked, column)


def of_samples(loss: LossFn | Coupled, *, groups: int) -> LossFn | Coupled:
    """A preference loss that reads the policy's samples: online DPO (2402.04792) and its kin.

    Args:
      groups: of an update.
    """
    inner = loss.stats if isinstance(loss, Coupled) else loss

    def run(params: Params, frozen: Params, batch: RolloutBatch, key: PRNGKeyArray, hyper: Hyper) -> Any:
        return inner(params, frozen, to_pairs(batch, groups=groups), key, hyper)

    return loss._replace(stats=run) if isinstance(loss, Coupled) else run
