import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.ops.norms import rms_norm


@pytest.mark.parametrize(("offset", "eps"), [(0.0, 1e-5), (1.0, 1e-6)])
def test_rms_norm_is_the_float64_formula(offset, eps):
    x = 3 * jax.random.normal(jax.random.key(0), (2, 5, 16))
    scale = jax.random.normal(jax.random.key(1), (16,))
    wide, factor = np.asarray(x, np.float64), np.asarray(scale, np.float64) + offset
    want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + eps) * factor
    np.testing.assert_allclose(rms_norm(x, scale, eps=eps, offset=offset), want, rtol=1e-5, atol=1e-6)


def test_low_precision_input_is_normed_in_float32():
    """Squares of 3e4 overflow float16 and lose all digits in bfloat16."""
    x = jnp.full((1, 8), 3e4, jnp.float16)
    y = rms_norm(x, jnp.ones(8, jnp.bfloat16), eps=1e-6)
    assert y.dtype == jnp.float16
    np.testing.assert_allclose(y.astype(jnp.float32), 1.0, rtol=1e-3)


def test_a_zero_vector_has_a_finite_gradient():
    gradient = jax.grad(lambda x: rms_norm(x, jnp.ones(4), eps=1e-6).sum())(jnp.zeros((1, 4)))
    assert np.isfinite(gradient).all()
