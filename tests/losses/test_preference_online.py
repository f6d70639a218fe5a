"""Pairs of the policy's own samples, against sums over the samples themselves."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.losses.preference.online import to_pairs
from jaxpost.losses.preference.pairs import answers_of, sides
from jaxpost.losses.supervised import next_tokens
from jaxpost.rl.advantages import best_worst
from jaxpost.rl.rows import Answer, RowPlan, pack

REWARDS = np.array([[0.0, 1.0, 0.5], [1.0, 1.0, 1.0], [2.0, np.nan, -1.0], [0.0, 0.0, 1.0]], np.float32)
BEST, WORST = {0: 1, 2: 0, 3: 2}, {0: 0, 2: 2, 3: 1}


@pytest.mark.parametrize("row_tokens", [24, 60], ids=["a group a row", "several groups a row"])
def test_the_best_and_the_worst_of_each_group_are_a_pair(row_tokens):
    rng = np.random.default_rng(0)
    count, each, most = *REWARDS.shape, 5
    lengths = rng.integers(1, most + 1, (count, each))
    mask = (np.arange(most) < lengths.reshape(-1, 1)).astype(np.float32)
    credit = best_worst(jnp.asarray(REWARDS.ravel()), jnp.repeat(jnp.arange(count), each))
    advantages = np.asarray(credit)[:, None] * mask
    weights = (advantages != 0).astype(np.float32)
    answers = [
        [Answer(list(range(1, 4 + g)), [7] * n, weights[g * each + s, :n]) for s, n in enumerate(lengths[g])]
        for g in range(count)
    ]
    plan = RowPlan.make(groups=count, samples=each, prompt=6, answer=most, row_tokens=row_tokens)
    packed = pack(answers, plan)
    numbers = rng.normal(size=mask.shape).astype(np.float32) * mask
    batch = to_pairs(packed.batch._replace(advantages=packed.spread(advantages)), groups=count)
    logprobs = jnp.roll(jnp.asarray(packed.spread(numbers)), -1, axis=1)
    pairs = sides(answers_of(batch, next_tokens(batch)[1], logprobs))
    found = sorted(
        (float(c), float(r), float(n))
        for c, r, n, w in zip(
            *(x.ravel() for x in (pairs.chosen.logprob, pairs.rejected.logprob, pairs.rejected.length, pairs.weight)),
            strict=True,
        )
        if w
    )
    total = lambda g, s: numbers[g * each + s].sum()  # noqa: E731
    want = sorted((total(g, BEST[g]), total(g, WORST[g]), lengths[g, WORST[g]]) for g in BEST)
    np.testing.assert_allclose(found, want, atol=1e-5)


def test_pairs_remember_which_answer_the_reference_drew():
    on, off = [1.0, 1.0], [0.0, 0.0]
    rows = [Answer([1, 2], [7, 7], on), Answer([1, 2], [8, 8], on), Answer([1, 2], [9, 9], on)]
    plan = RowPlan.make(groups=1, samples=3, prompt=2, answer=2)
    packed = pack([rows], plan)
    spread = lambda *each: packed.spread(np.array(each, np.float32))  # noqa: E731
    batch = packed.batch._replace(advantages=spread([1, 1], off, [-1, -1]), opponent=jnp.asarray(spread(off, on, on)))
    pairs = to_pairs(batch, groups=1)
    assert pairs.ranks.tolist()[0] == [0, 1]
    assert pairs.from_reference.tolist()[0] == [0.0, 1.0]
    swapped = to_pairs(batch._replace(advantages=-batch.advantages), groups=1)
    assert swapped.from_reference.tolist()[0] == [1.0, 0.0]
