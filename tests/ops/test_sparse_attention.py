"""Chunks that see nothing of each other are left out, and nothing else changes."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.ops import platform
from jaxpost.ops.attention import attention
from jaxpost.ops.masks import Rules, visible
from jaxpost.ops.sparse_attention import Chunks, active_pairs, sparse_attention


def answers(rng, rows, length, *, padding=2):
    """Positions, segments and prefixes of rows with two prompts, each with answers behind it; the last row is empty."""
    positions, segments, prefixes = np.zeros((3, rows, length), np.int32)
    for b in range(rows - 1):
        at = segment = 0
        while at < length - padding:
            prompt = 0
            for part in range(4):
                size = min(int(rng.integers(2, 7)), length - padding - at)
                segment += 1
                here = slice(at, at + size)
                positions[b, here] = np.arange(size) + (prompt if part else 0)
                segments[b, here], prefixes[b, here] = segment, segment - part if part else 0
                prompt, at = prompt if part else size, at + size
    return tuple(jnp.asarray(x) for x in (positions, segments, prefixes))


def example(heads, kv_heads, length=37, rows=3, width=8, seed=0):
    rng = np.random.default_rng(seed)
    arrays = (jnp.asarray(rng.normal(size=(rows, length, n, width)), jnp.float32) for n in (heads, kv_heads, kv_heads))
    return (*arrays, *answers(rng, rows, length))


def plain(q, k, v, p, s, x, *, scale, window, softcap):
    k, v = (jnp.repeat(y, q.shape[2] // y.shape[2], axis=2) for y in (k, v))
    scores = scale * jnp.einsum("btnh,bsnh->bnts", q, k)
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    mask = visible(p, p, s, s, x, window=window)[:, None]
    weights = jnp.where(mask.any(-1, keepdims=True), jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1), 0.0)
    return jnp.einsum("bnts,bsnh->btnh", weights, v)


CASES = [
    ((4, 2), {"window": None, "softcap": None}, 4),
    ((3, 1), {"window": 4, "softcap": None}, 8),
    ((2, 2), {"window": 3, "softcap": 2.0}, 5),
    ((3, 3), {"window": None, "softcap": 1.0}, 37),
]


@pytest.mark.parametrize(("heads", "options", "size"), CASES, ids=str)
def test_values_and_gradients_are_those_of_the_plain_formula(heads, options, size):
    q, k, v, p, s, x = example(*heads)

    def loss(f):
        return lambda *arrays: (lambda out: (jnp.sum(jnp.sin(out)), out))(f(*arrays))

    ours = lambda q, k, v: sparse_attention(Rules(0.4, **options), size, q, k, v, p, s, x)  # noqa: E731
    theirs = lambda q, k, v: plain(q, k, v, p, s, x, scale=0.4, **options)  # noqa: E731
    found = [jax.jit(jax.grad(loss(f), (0, 1, 2), has_aux=True))(q, k, v) for f in (ours, theirs)]
    for got, want in zip(*(jax.tree.leaves(y) for y in found), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("window", [None, 3])
def test_every_pair_with_a_visible_key_is_visited_and_few_others(window):
    visited = needed = 0
    for seed in range(20):
        p, s, x = answers(np.random.default_rng(seed), 2, 36)
        cut = lambda y: jnp.moveaxis(y.reshape(2, 9, 4), 1, 0)  # noqa: E731
        active = np.asarray(active_pairs(Chunks(cut(p), cut(s), cut(x)), window=window))
        seen = np.asarray(visible(p, p, s, s, x, window=window)).reshape(2, 9, 4, 9, 4).any((0, 2, 4))
        assert not np.any(seen & ~active)
        visited, needed = visited + active.sum(), needed + seen.sum()
    assert needed <= visited < 1.25 * needed
    assert visited < 0.8 * 20 * 45, "of the causal pairs"


def test_eight_answers_behind_a_prompt():
    """A prompt of one chunk and eight answers of two: each chunk reads the prompt and its own answer."""
    s = jnp.repeat(jnp.arange(1, 18)[None], 4, axis=1)
    s = jnp.where(s == 1, 1, s // 2 + 1)
    p = jnp.concatenate([jnp.arange(4), jnp.tile(jnp.arange(4, 12), 8)])[None]
    cut = lambda y: y.reshape(17, 1, 4)  # noqa: E731
    active = active_pairs(Chunks(cut(p), cut(s), cut(jnp.where(s > 1, 1, 0))))
    assert active.sum(axis=1).tolist() == [1] + [2, 3] * 8


def test_pairs_that_see_nothing_are_not_computed():
    """Values that are not numbers reach nobody, though 0 times them would."""
    q, k, v, *_ = example(2, 1, length=24, rows=1)
    s = jnp.repeat(jnp.asarray([[1, 2, 3]]), 8, axis=1)
    p, x = jnp.tile(jnp.arange(8), 3)[None] + jnp.where(s > 1, 8, 0), jnp.where(s > 1, 1, 0)
    v = v.at[:, 8:16].set(jnp.nan)
    out = sparse_attention(Rules(0.4, None, None), 4, q, k, v, p, s, x)
    assert np.isfinite(out[:, :8]).all()
    assert np.isnan(out[:, 8:16]).all()
    assert np.isfinite(out[:, 16:]).all()


def test_rows_with_prefixes_take_this_way_and_others_do_not(monkeypatch):
    q, k, v, p, s, x = example(4, 2)
    places: Any = {"q_positions": p, "kv_positions": p, "q_segments": s, "kv_segments": s, "scale": 0.5}
    loops = lambda prefixes: str(jax.make_jaxpr(partial(attention, **places, q_prefixes=prefixes))(q, k, v))  # noqa: E731
    change: Any = {"sparse_chunk": 4}
    monkeypatch.setitem(platform.CHOICES, "cpu", platform.Choices(**{**vars(platform.CHOICES["cpu"]), **change}))
    assert "while" in loops(x)
    assert "while" not in loops(None)
    got = attention(q, k, v, **places, q_prefixes=x)
    change["sparse_chunk"] = None
    monkeypatch.setitem(platform.CHOICES, "cpu", platform.Choices(**{**vars(platform.CHOICES["cpu"]), **change}))
    assert "while" not in loops(x)
    np.testing.assert_allclose(got, attention(q, k, v, **places, q_prefixes=x), rtol=1e-5, atol=1e-6)


def test_extreme_scores_and_low_precision_stay_finite():
    q, k, v, p, s, x = example(2, 1)
    f = lambda q, k, v: sparse_attention(Rules(1e4, None, None), 8, q, k, v, p, s, x)  # noqa: E731
    low = [y.astype(jnp.bfloat16) for y in (q, k, v)]
    for arrays in ((q, k, v), low):
        value, pull = jax.vjp(jax.jit(f), *arrays)
        grads = pull(jnp.ones_like(value))
        assert value.dtype == arrays[0].dtype
        assert [g.dtype for g in grads] == [y.dtype for y in arrays]
        assert all(bool(jnp.isfinite(y.astype(jnp.float32)).all()) for y in (value, *grads))
    np.testing.assert_array_equal(value[-1], 0.0)


def test_rows_and_heads_may_be_spread_over_devices():
    """The lists are of all rows together: every device makes the same visits."""
    q, k, v, p, s, x = example(4, 2, length=18, rows=4)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spread = lambda y, *axes: jax.device_put(y, jax.NamedSharding(mesh, jax.P(*axes)))  # noqa: E731
    f = jax.jit(jax.grad(lambda *y: jnp.sum(jnp.sin(sparse_attention(Rules(0.4, None, None), 4, *y))), (0, 1, 2)))
    alone = f(q, k, v, p, s, x)
    heads = (spread(y, "data", None, "tensor") for y in (q, k, v))
    for got, want in zip(f(*heads, *(spread(y, "data") for y in (p, s, x))), alone, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
