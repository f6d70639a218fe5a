"""The TPU kernel over pages, in Pallas's interpreter, against a softmax in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxpost.ops import paged_kernel, paged_shards, platform
from jaxpost.ops.paged import Pages, empty_pages

LAYERS, PAGES, KV, SIZE, WIDTH, GROUP = 2, 6, 2, 16, 128, 2


def softmax_over(q, k, v, scale, softcap):
    """[N H] from one query a head and all that it sees, in float64."""
    out = np.zeros_like(q)
    for head in range(q.shape[0]):
        scores = k[:, head // GROUP] @ q[head] * scale
        scores = softcap * np.tanh(scores / softcap) if softcap else scores
        weights = np.exp(scores - scores.max())
        out[head] = weights @ v[:, head // GROUP] / weights.sum()
    return out


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_rows_of_all_lengths(softcap):
    rng = np.random.default_rng(0)
    table = np.asarray([[3, 1, 0, 0], [2, 5, 4, 1], [0, 0, 0, 0], [4, 0, 0, 0]], np.int32)
    lengths = [20, 3 * SIZE + 1, 0, 1]
    with platform.target("tpu"):
        pages = [empty_pages(LAYERS, PAGES, KV, SIZE, WIDTH, jnp.bfloat16) for _ in range(2)]
        texts = [rng.normal(size=(PAGES, SIZE, KV, WIDTH)).astype(jnp.bfloat16) for _ in range(2)]
        at = {"layer": jnp.int32(1), "mesh": None}
        for i, text in enumerate(texts):
            numbers, slot = (x.astype(jnp.int32) for x in jnp.indices((PAGES, SIZE)))
            pages[i] = paged_shards.write_pages(pages[i], jnp.asarray(text), page=numbers, slot=slot, **at)
            np.testing.assert_array_equal(pages[i].data[1], text.swapaxes(1, 2))
            assert not np.any(np.asarray(pages[i].data[0], np.float32))
        q = jnp.asarray(rng.normal(size=(4, 1, KV * GROUP, WIDTH)), jnp.bfloat16)
        positions = jnp.asarray(lengths, jnp.int32)[:, None] - 1
        with pltpu.force_tpu_interpret_mode():
            seen = {"positions": jnp.maximum(positions, 0), "valid": positions >= 0}
            got = paged_shards.paged_attention(
                q, *pages, table=jnp.asarray(table), scale=0.3, softcap=softcap, **seen, **at
            )
    for row, length in enumerate(lengths):
        k, v = (
            np.asarray(text, np.float64)[table[row]].reshape(-1, KV, WIDTH)[:length]
            if length
            else np.zeros((1, KV, WIDTH))
            for text in texts
        )
        want = softmax_over(np.asarray(q[row, 0], np.float64), k, v, 0.3, softcap) if length else 0.0
        # The result is rounded to bfloat16.
        np.testing.assert_allclose(np.asarray(got[row, 0], np.float64), want, atol=2e-2)


def test_what_it_cannot_do_is_left_to_the_loop():
    def fits(queries=1, width=128, size=64, dtype=jnp.bfloat16, window=None):
        pages = Pages(jnp.zeros((1, 2, 1, size, width), dtype))
        return paged_kernel.fits(jnp.zeros((2, queries, 4, width), jnp.bfloat16), pages, window)

    assert fits()
    assert not any([fits(queries=2), fits(width=64), fits(size=8), fits(dtype=jnp.float32), fits(window=9)])
