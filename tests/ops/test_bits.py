"""bfloat16 kept as its bits: the same values, and no float32 copy of a pool."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.ops import bits, platform
from jaxpost.ops.paged import copy_pages, empty_pages, read_pages, write_pages


def test_bits_keep_every_value():
    x = jnp.asarray([0.0, -0.0, 1.5, -3e38, 1e-40, np.inf, np.nan], jnp.bfloat16)
    with platform.target("cpu"):
        stored = bits.hide(x)
        assert stored.dtype == jnp.uint16
    np.testing.assert_array_equal(np.asarray(bits.show(stored)).view(np.uint16), np.asarray(x).view(np.uint16))
    with platform.target("tpu"):
        assert bits.hide(x).dtype == jnp.bfloat16
    wide = jnp.ones(3)
    assert bits.hide(wide) is wide


def written(pages, new):
    at = jnp.asarray([[2, 2, 3]])
    return write_pages(pages, new, layer=1, page=at, slot=jnp.asarray([[0, 1, 0]]))


@pytest.mark.parametrize("target", ["cpu", "tpu"])
def test_bfloat16_pages_give_back_what_was_written(target):
    new = jax.random.normal(jax.random.key(0), (1, 3, 2, 8), jnp.bfloat16)
    with platform.target(target):
        pages = copy_pages(written(empty_pages(2, 5, 2, 2, 8, jnp.bfloat16), new), jnp.asarray([2]), jnp.asarray([4]))
        found = read_pages(pages, 1, jnp.asarray([4, 3]), jnp.bfloat16)
    np.testing.assert_array_equal(found[0].swapaxes(0, 1), new[0, :2])
    np.testing.assert_array_equal(found[1, :, 0], new[0, 2])


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="XLA's CPU backend is what widens bfloat16")
def test_a_bfloat16_pool_is_written_in_place():
    pages = empty_pages(4, 513, 2, 16, 8, jnp.bfloat16)
    new = jnp.zeros((1, 3, 2, 8), jnp.bfloat16)
    compiled = jax.jit(written, donate_argnums=0).lower(pages, new).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < pages.data.nbytes / 10
