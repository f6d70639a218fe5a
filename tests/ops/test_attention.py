from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_rows import example, places

from jaxpost.ops import attention as attention_ops
from jaxpost.ops import platform
from jaxpost.ops.attention import attention, select, visible


def brute_force(q, k, v, qp, kp, qs, ks, *, scale, window=None, softcap=None):
    """One query, one head, one key at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(*q.shape[:3]):
        seen, scores = [], []
        for s in range(k.shape[1]):
            behind = int(qp[b, t]) - int(kp[b, s])
            if ks[b, s] == 0 or qs[b, t] != ks[b, s] or behind < 0 or (window is not None and behind >= window):
                continue
            score = scale * q[b, t, n] @ k[b, s, n // group]
            scores.append(score if softcap is None else softcap * np.tanh(score / softcap))
            seen.append(v[b, s, n // group])
        if seen:
            p = np.exp(np.asarray(scores) - max(scores))
            out[b, t, n] = (p / p.sum()) @ np.asarray(seen)
    return out


@pytest.fixture(params=["whole", "chunked", "chunks_in_blocks"])
def blocking(request, monkeypatch):
    """The same mathematics in one piece, in causal chunks, and in chunks whose queries come block by block."""
    change = {"whole": {}, "chunked": {"causal_chunk": 4}, "chunks_in_blocks": {"causal_chunk": 7, "query_block": 3}}
    choices = platform.Choices(**{**vars(platform.CHOICES["cpu"]), **change[request.param]})
    monkeypatch.setitem(platform.CHOICES, "cpu", choices)


CASES = [
    {"heads": 4, "kv_heads": 2},
    {"heads": 4, "kv_heads": 1, "window": 3},
    {"heads": 2, "kv_heads": 2, "window": 4, "softcap": 2.0},
    {"heads": 3, "kv_heads": 1, "softcap": 1.0},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_is_the_brute_force_softmax(blocking, case):
    options = {"scale": 0.4, "window": case.get("window"), "softcap": case.get("softcap")}
    q, k, v, positions, segments = example(heads=case["heads"], kv_heads=case["kv_heads"])
    got = jax.jit(partial(attention, **places(positions, segments), **options))(q, k, v)
    want = brute_force(q, k, v, positions, positions, segments, segments, **options)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_is_that_of_the_plain_formula(blocking, case):
    """Automatic differentiation of a five-line softmax, in float32."""
    options = {"scale": 0.4, "window": case.get("window"), "softcap": case.get("softcap")}
    q, k, v, positions, segments = example(heads=case["heads"], kv_heads=case["kv_heads"])

    def plain(q, k, v):
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
        scores = options["scale"] * jnp.einsum("btnh,bsnh->bnts", q, k)
        if options["softcap"] is not None:
            scores = options["softcap"] * jnp.tanh(scores / options["softcap"])
        mask = visible(positions, positions, segments, segments, window=options["window"])[:, None]
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1), v)

    def loss(f):
        weigh = jnp.where(segments != 0, 1.0, 0.0)[:, :, None, None]
        return lambda *x: jnp.sum(jnp.sin(f(*x)) * weigh)

    ours = partial(attention, **places(positions, segments), **options)
    for got, want in zip(*(jax.jit(jax.grad(loss(f), argnums=(0, 1, 2)))(q, k, v) for f in (ours, plain)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-6)


def test_a_query_that_sees_nothing_gives_zeros_and_finite_gradients(blocking):
    q, k, v, positions, _ = example()
    nothing = jnp.zeros_like(positions)

    def f(q, k, v):
        return attention(q, k, v, **places(positions, nothing), scale=1.0, softcap=3.0)

    value, gradients = jax.jit(jax.value_and_grad(lambda *x: f(*x).sum(), argnums=(0, 1, 2)))(q, k, v)
    for array in (value, *gradients):
        np.testing.assert_array_equal(array, 0.0)


def test_keys_of_a_cache_lead_with_heads_and_stand_anywhere():
    """Slots in any order, with holes: only positions and segments count."""
    rng = np.random.default_rng(1)
    q, k, v, positions, segments = example(rows=1)
    order = rng.permutation(13)
    options = {"scale": 0.5, "window": 4}
    got = attention(
        q[:, 5:9], k[:, order].swapaxes(1, 2), v[:, order].swapaxes(1, 2), q_positions=positions[:, 5:9],
        kv_positions=positions[:, order], q_segments=segments[:, 5:9], kv_segments=segments[:, order],
        kv_heads_first=True, **options,
    )  # fmt: skip
    want = brute_force(q, k, v, positions, positions, segments, segments, **options)[:, 5:9]
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


def test_bfloat16_stays_bfloat16_with_a_float32_softmax():
    q, k, v, positions, segments = example()
    low = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    got = attention(*low, **places(positions, segments), scale=0.4)
    assert got.dtype == jnp.bfloat16
    want = brute_force(*low, positions, positions, segments, segments, scale=0.4)
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=2e-2)


def test_memory_grows_linearly_with_the_length(monkeypatch):
    """Forward and backward of a row of twice the tokens: at most 2.2 times the memory."""
    choices = platform.Choices(**{**vars(platform.CHOICES["cpu"]), "causal_chunks": 2, "query_block": 32})
    monkeypatch.setitem(platform.CHOICES, "cpu", choices)

    def memory(length):
        q = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
        p = jax.ShapeDtypeStruct((1, length), jnp.int32)
        f = jax.jit(jax.grad(lambda q, p: attention(q, q, q, **places(p, p), scale=1.0).sum()))
        return f.lower(q, p).compile().memory_analysis().temp_size_in_bytes

    assert memory(4096) < 2.2 * memory(2048)
    assert memory(4096) < 4 * 4096 * 4096 / 4


def test_select_knows_its_names():
    assert select("xla") is attention
    assert select("auto") is attention
    with platform.target("tpu"):
        # Eight devices and no mesh: a kernel that runs per device cannot know how arrays are split.
        assert select("auto") is attention
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        assert select("auto", mesh=mesh) is not attention
    with pytest.raises(ValueError, match="'flash' is none of"):
        attention_ops.select("flash")
    with pytest.raises(ValueError, match="4 query heads cannot share 3"):
        attention(*(jnp.ones((1, 2, n, 2)) for n in (4, 3, 3)), **places(*[jnp.ones((1, 2), int)] * 2), scale=1.0)
