"""Advantages and returns against plain float64 loops."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.rl import advantages as adv
from jaxpost.rl import returns as ret

NAN = float("nan")
REWARDS = np.asarray([1.0, 0.2, NAN, 0.4, 0.1, 0.1, 0.1, NAN, 3.0, NAN])
GROUPS = np.asarray([7, 3, 7, 7, 5, 5, 5, 9, 3, 2**30])
"""In any order: 7 holds an unscored sample, 5 no spread (and a mean that rounds), 9 and the last nothing scored."""


LENGTHS = np.asarray([4, 1, 9, 2, 3, 1, 2, 5, 7, 0])


def f32(x: Any) -> Any:
    return jnp.asarray(x, jnp.float32)


def loop(kind: str) -> np.ndarray:
    """Sample by sample."""
    out = np.zeros(len(REWARDS))
    scored = REWARDS[~np.isnan(REWARDS)]
    for i, (r, g) in enumerate(zip(REWARDS, GROUPS, strict=True)):
        where = (g == GROUPS) & ~np.isnan(REWARDS)
        mates = list(REWARDS[where])
        if np.isnan(r) or len(set(mates)) < 2:
            continue
        if kind == "rloo":
            out[i] = r - (sum(mates) - r) / (len(mates) - 1)
        elif kind == "opo":  # argmin_b of sum |o| (r - b)^2
            out[i] = r - np.average(mates, weights=LENGTHS[where])
        else:
            deviation = {"none": 1.0, "group": np.std(mates, ddof=1) + 1e-4, "batch": np.std(scored, ddof=1) + 1e-4}
            out[i] = (r - np.mean(mates)) / deviation[kind]
    return out


@pytest.mark.parametrize(
    ("kind", "fn"),
    [
        ("rloo", adv.rloo),
        ("group", adv.grpo),
        ("batch", partial(adv.grpo, scale=adv.batch_std)),
        ("none", partial(adv.grpo, scale=None)),
        ("none", adv.group_centred),
        ("opo", lambda r, g: adv.opo(r, f32(LENGTHS), g)),
    ],
)
def test_group_advantages_equal_the_loop(kind: str, fn: Any) -> None:
    got = np.asarray(fn(f32(REWARDS), jnp.asarray(GROUPS)))
    np.testing.assert_allclose(got, loop(kind), rtol=1e-5, atol=1e-7)
    assert (got[4:7] == 0).all(), "equal rewards give exactly 0, though their mean rounds"


def test_an_unscored_sample_might_as_well_not_be_there() -> None:
    keep = ~np.isnan(REWARDS)
    for fn in (adv.rloo, adv.grpo, partial(adv.grpo, scale=adv.batch_std)):
        whole = np.asarray(fn(f32(REWARDS), jnp.asarray(GROUPS)))
        np.testing.assert_allclose(whole[keep], fn(f32(REWARDS[keep]), jnp.asarray(GROUPS[keep])), rtol=1e-6)
        assert (whole[~keep] == 0).all()


def test_several_rewards_are_normalised_each_and_then_their_sum() -> None:
    rng = np.random.default_rng(3)
    groups = np.repeat([4, 9, 2, 6], 4)
    rewards = np.stack([rng.integers(0, 2, 16), 100 * rng.normal(size=16), rng.normal(size=16)], axis=1).astype(float)
    rewards[:4, 0], rewards[4:8, :2], rewards[4:8, 2] = 1.0, [0.1, 7.0], [0.5, 0.25, 0.5, 0.25]
    rewards[12:, :] = 0.1  # a silent group
    rewards[9, 1] = NAN  # unscored by one of them
    weights, scored = np.array([1.0, 0.25, 2.0]), ~np.isnan(rewards).any(axis=1)
    total = np.full(16, NAN)
    for i in np.flatnonzero(scored):
        mates = rewards[(groups == groups[i]) & scored]
        total[i] = sum(
            w * (rewards[i, k] - np.mean(mates[:, k])) / (np.std(mates[:, k], ddof=1) + 1e-4)
            for k, w in enumerate(weights)
        )
    want = (total - np.nanmean(total)) / (np.nanstd(total, ddof=1) + 1e-4)
    want[12:] = want[9] = 0.0
    got = np.asarray(adv.gdpo(f32(rewards), jnp.asarray(groups), weights=f32(weights)))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    assert (got[12:] == 0).all()
    order = rng.permutation(16)
    np.testing.assert_allclose(adv.gdpo(f32(rewards[order]), jnp.asarray(groups[order]), weights=f32(weights)),
                               got[order], rtol=1e-4, atol=1e-6)  # fmt: skip


def test_equal_sums_of_different_rewards_are_told_apart() -> None:
    """GRPO of the sum gives the first two of these samples the same; the source's argument."""
    rewards, group = f32([[1.0, 1.0], [2.0, 0.0], [0.0, 0.0], [0.0, 0.0]]), jnp.zeros(4, int)
    both, one, *_ = adv.grpo(jnp.sum(rewards, axis=1), group)
    assert both == one
    both, one, *_ = adv.gdpo(rewards, group)
    assert both > one + 0.1


def test_tokens_of_the_highest_entropy() -> None:
    rng = np.random.default_rng(5)
    entropy, weights = rng.exponential(size=(6, 9)), rng.choice([0.0, 1.0, 0.5], (6, 9))
    entropy[2] = NAN
    known = (weights != 0) & ~np.isnan(entropy)
    for share in (0.2, 0.5, 1.0):
        got = np.asarray(adv.uncertain(f32(entropy), f32(weights), share))
        np.testing.assert_array_equal(got, known & (entropy >= np.quantile(entropy[known], 1 - share)))
    assert not adv.uncertain(f32(entropy), jnp.zeros((6, 9)), 0.5).any()


def test_groups_without_signal_are_counted() -> None:
    silent, scored = adv.zero_variance_groups(f32(REWARDS), jnp.asarray(GROUPS))
    assert (int(silent), int(scored)) == (1, 3)
    np.testing.assert_array_equal(adv.informative(f32(REWARDS), jnp.asarray(GROUPS)), loop("none") != 0)
    one_each = adv.zero_variance_groups(f32([1.0, 2.0]), jnp.asarray([0, 1]))
    assert [int(x) for x in one_each] == [2, 2]  # a group of one has nothing to be compared with


def test_reinforce_and_remax() -> None:
    rewards, greedy = f32([1.0, 0.5, NAN, 2.0]), f32([0.25, NAN, 1.0, 3.0])
    np.testing.assert_allclose(adv.reinforce(rewards), [1.0, 0.5, 0.0, 2.0])
    np.testing.assert_allclose(adv.reinforce(rewards, baseline=0.5), [0.5, 0.0, 0.0, 1.5])
    np.testing.assert_allclose(adv.remax(rewards, greedy), [0.75, 0.0, 0.0, -1.0])


def test_process_rewards_equal_the_loop() -> None:
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(5, 3))
    rewards[1, 2] = rewards[3, 1] = rewards[3, 2] = NAN
    rewards[4] = NAN  # unscored
    ends = np.asarray([[1, 3, 5], [0, 4, 0], [2, 3, 6], [6, 0, 0], [1, 2, 3]])
    groups = np.asarray([0, 0, 1, 1, 0])
    want = np.zeros((5, 7))
    for i in range(5):
        steps = np.concatenate([rewards[j] for j in range(5) if groups[j] == groups[i]])
        mean, deviation = np.nanmean(steps), np.nanstd(steps, ddof=1) + 1e-4
        for t in range(7):
            for r, end in zip(rewards[i], ends[i], strict=True):
                if not np.isnan(r) and end >= t:
                    want[i, t] += (r - mean) / deviation
    got = adv.grpo_process(f32(rewards), jnp.asarray(ends), jnp.asarray(groups), length=7)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_the_three_rules_for_truncated_samples() -> None:
    rewards, cut, mask = f32([1.0, 0.0, 0.0, NAN]), jnp.asarray([False, False, True, False]), jnp.ones((4, 2))
    same = jnp.zeros(4, int)
    # A reward like any other; out of the loss but in the statistics; out of both.
    np.testing.assert_array_equal(adv.trained_tokens(mask, rewards), [[1, 1], [1, 1], [1, 1], [0, 0]])
    np.testing.assert_array_equal(adv.trained_tokens(mask, rewards, cut), [[1, 1], [1, 1], [0, 0], [0, 0]])
    np.testing.assert_allclose(adv.grpo(rewards, same, scale=None), [2 / 3, -1 / 3, -1 / 3, 0], rtol=1e-6)
    dropped = adv.unscore(rewards, cut)
    np.testing.assert_allclose(adv.grpo(dropped, same, scale=None), [0.5, -0.5, 0, 0])
    np.testing.assert_array_equal(adv.trained_tokens(mask, dropped), [[1, 1], [1, 1], [0, 0], [0, 0]])


# Token level

MASK = np.asarray([[0, 1, 1, 0, 0, 1, 1, 0], [1] * 8, [0] * 8, [0, 0, 0, 1, 0, 0, 0, 0]])
"""An environment's turn in the middle, a full row, an empty one, a single token."""


@pytest.mark.parametrize(("discount", "trace"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.8), (0.9, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("cut", [False, True])
def test_gae_equals_the_loop(discount: float, trace: float, cut: bool) -> None:
    rng = np.random.default_rng(2)
    rewards, values = rng.normal(size=(2, *MASK.shape))
    after = rng.normal(size=len(MASK)) if cut else np.zeros(len(MASK))
    want = np.zeros(MASK.shape)
    for i, row in enumerate(MASK):
        own = np.flatnonzero(row)
        for n in range(len(own)):
            # A_t = sum_k (gamma lambda)^k d_{t+k}
            for k, t in enumerate(own[n:]):
                following = values[i, own[n + k + 1]] if n + k + 1 < len(own) else after[i]
                want[i, own[n]] += (discount * trace) ** k * (rewards[i, t] + discount * following - values[i, t])
    bootstrap = f32(after) if cut else None
    got, target = ret.gae(f32(rewards), f32(values), f32(MASK), discount=discount, trace=trace, bootstrap=bootstrap)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(target, np.where(MASK, want + values, 0), rtol=1e-4, atol=1e-5)


def test_returns_equal_the_loop() -> None:
    rewards = np.random.default_rng(3).normal(size=MASK.shape)
    want = np.zeros(MASK.shape)
    for i, row in enumerate(MASK):
        total = 0.0
        for t in np.flatnonzero(row)[::-1]:
            total = want[i, t] = rewards[i, t] + 0.9 * total
    np.testing.assert_allclose(
        ret.discounted_returns(f32(rewards), f32(MASK), discount=0.9), want, rtol=1e-5, atol=1e-6
    )


def test_the_kl_in_the_reward() -> None:
    kl = np.random.default_rng(4).normal(size=MASK.shape)
    rewards = np.asarray([2.0, NAN, 5.0, -1.0])
    want = np.where(MASK, -0.3 * kl, 0.0)
    want[0, 6] += 2.0
    want[1] = 0.0  # unscored
    want[3, 3] -= 1.0
    got = ret.token_rewards(f32(rewards), f32(MASK), kl=f32(kl), kl_coef=0.3)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
    plain = np.zeros(MASK.shape)
    plain[0, 6], plain[3, 3] = 2.0, -1.0
    np.testing.assert_array_equal(ret.token_rewards(f32(rewards), f32(MASK)), plain)


def test_whitening() -> None:
    x = np.random.default_rng(5).normal(3.0, 2.0, size=MASK.shape)
    on = x[MASK != 0]
    want = np.where(MASK, (x - on.mean()) / np.sqrt(on.var() + 1e-8), 0)
    np.testing.assert_allclose(ret.whiten(f32(x), f32(MASK)), want, rtol=1e-4, atol=1e-6)
    kept = np.where(MASK, want + on.mean(), 0)
    np.testing.assert_allclose(ret.whiten(f32(x), f32(MASK), shift_mean=False), kept, rtol=1e-4, atol=1e-6)
    assert not np.asarray(ret.whiten(f32(x), jnp.zeros(MASK.shape))).any()


def test_reinforce_plus_plus_equals_the_loop() -> None:
    kl = np.random.default_rng(6).normal(size=MASK.shape)
    rewards = np.asarray([2.0, NAN, 5.0, -1.0])
    credit, on = np.zeros(MASK.shape), np.zeros(MASK.shape, bool)
    for i, row in enumerate(MASK):
        for t in np.flatnonzero(row):
            if not np.isnan(rewards[i]):
                credit[i, t] = rewards[i] - 0.1 * sum(kl[i, s] for s in np.flatnonzero(row) if s >= t)
                on[i, t] = True
    want = np.where(on, (credit - credit[on].mean()) / np.sqrt(credit[on].var() + 1e-8), 0)
    got = ret.reinforce_plus_plus(f32(rewards), f32(MASK), kl=f32(kl), kl_coef=0.1)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_an_advantage_on_each_of_a_samples_tokens() -> None:
    np.testing.assert_array_equal(ret.per_token(f32([1, 2, 3, 4]), f32(MASK)), MASK * np.arange(1, 5)[:, None])


@pytest.mark.parametrize(
    ("measured", "factor"),
    [(6.0, 1.0), (6.6, 1.01), (60.0, 1.02), (0.0, 0.98)],
    ids=["on target", "above", "far above: clipped", "far below: clipped"],
)
def test_adaptive_kl(measured: float, factor: float) -> None:
    got = ret.adapted_kl_coef(0.2, measured, target=6.0, horizon=1000, samples=100)
    np.testing.assert_allclose(got, 0.2 * factor, rtol=1e-9)
    with pytest.raises(ValueError, match="target and a horizon above 0"):
        ret.adapted_kl_coef(0.2, measured, target=0.0, horizon=1000, samples=100)
