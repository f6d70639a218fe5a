import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.ops import platform
from jaxpost.ops.linear import LoRA, Panels, is_leaf, linear, linear_transposed, materialize, take_rows


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def leaf(dtype=jnp.float32):
    return LoRA(normal(0, 6, 5, dtype=dtype), normal(1, 6, 2), normal(2, 2, 5), jnp.asarray(1.5))


@pytest.mark.parametrize(("width", "groups"), [(1, 1), (2, 3), (3, 9), (12, 4)])
def test_panels_are_the_kernel_cut_by_columns(width, groups):
    kernel, bias, x = normal(0, 5, 12), normal(1, 12), normal(2, 2, 3, 5)
    cut = Panels.of(kernel, width=width, groups=groups)
    assert len(cut.groups) == min(groups, 12 // width)
    want = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64) + np.asarray(bias, np.float64)
    np.testing.assert_allclose(linear(x, cut, bias), want, rtol=1e-5, atol=1e-6)


def as_matrix(w):
    """The leaf's matrix in NumPy float64."""
    base, a, b, scale = (np.asarray(x, np.float64) for x in w)
    return base + scale * (a @ b)


def test_linear_is_the_float64_product():
    x, w, bias = normal(0, 2, 3, 6), normal(1, 6, 5), normal(2, 5)
    want = np.asarray(x, np.float64) @ np.asarray(w, np.float64) + np.asarray(bias, np.float64)
    np.testing.assert_allclose(linear(x, w, bias), want, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(linear(x, w), want - np.asarray(bias, np.float64), rtol=2e-5, atol=1e-6)


def test_lora_leaf_multiplies_like_its_matrix():
    x, w = normal(3, 4, 6), leaf()
    np.testing.assert_allclose(materialize(w), as_matrix(w), rtol=1e-5)
    np.testing.assert_allclose(linear(x, w), np.asarray(x, np.float64) @ as_matrix(w), rtol=1e-5, atol=1e-5)
    y = normal(4, 4, 5)
    np.testing.assert_allclose(
        linear_transposed(y, w), np.asarray(y, np.float64) @ as_matrix(w).T, rtol=1e-5, atol=1e-5
    )
    ids = jnp.asarray([[0, 5], [3, 3]])
    np.testing.assert_allclose(take_rows(w, ids), as_matrix(w)[np.asarray(ids)], rtol=1e-5, atol=1e-5)


def test_lora_gradients_follow_from_the_matrix_gradient():
    """dL/dA = s dL/dW B^T and dL/dB = s A^T dL/dW, with dL/dW = x^T dy."""
    x, dy, w = np.asarray(normal(3, 7, 6), np.float64), np.asarray(normal(4, 7, 5), np.float64), leaf()
    _, vjp = jax.vjp(lambda a, b: linear(jnp.asarray(x, jnp.float32), w._replace(a=a, b=b)), w.a, w.b)
    d_a, d_b = vjp(jnp.asarray(dy, jnp.float32))
    d_w, scale = x.T @ dy, float(w.scale)
    np.testing.assert_allclose(d_a, scale * d_w @ np.asarray(w.b, np.float64).T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(d_b, scale * np.asarray(w.a, np.float64).T @ d_w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [3, 9])
def test_a_kernel_updated_first_gives_the_same_values_and_gradients(tokens, monkeypatch):
    """With fewer tokens than inputs a second product is added, with more the kernel is updated: one function."""
    x, dy, w = normal(3, tokens, 6), normal(4, tokens, 5), leaf()
    got, vjp = jax.vjp(linear, x, w)
    gradients = vjp(dy)
    cpu = dataclasses.replace(platform.CHOICES["cpu"], update_kernels=False)
    monkeypatch.setitem(platform.CHOICES, "cpu", cpu)
    want, vjp = jax.vjp(linear, x, w)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradients, vjp(dy))
    shapes = [e.outvars[0].aval.shape for e in jax.make_jaxpr(linear)(x, w).eqns]
    assert (6, 5) not in shapes, "the plain form never updates the kernel"


def test_stacked_leaf_scans_with_its_per_layer_scales():
    x = normal(0, 3, 4)
    stack = LoRA(normal(1, 2, 4, 4), normal(2, 2, 4, 1), normal(3, 2, 1, 4), jnp.asarray([0.5, 2.0]))
    y, _ = jax.lax.scan(lambda x, w: (linear(x, w), None), x, stack)
    want = np.asarray(x, np.float64)
    for i in range(2):
        want = want @ as_matrix(jax.tree.map(lambda a, i=i: a[i], stack))
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wide", [True, False])
def test_low_precision_products_come_back_in_the_activations_dtype(wide, monkeypatch):
    monkeypatch.setitem(
        platform.CHOICES, "cpu", platform.Choices(**{**vars(platform.CHOICES["cpu"]), "float32_products": wide})
    )
    x, w = normal(0, 3, 64, dtype=jnp.bfloat16), normal(1, 64, 8)
    y = linear(x, w, jnp.ones(8))
    assert y.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64) @ np.asarray(w.astype(jnp.bfloat16), np.float64) + 1
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=2e-2, atol=5e-2)
    logits = linear(x, w, dtype=jnp.float32)
    assert logits.dtype == jnp.float32
    # Float32 results are not rounded to bfloat16 on the way.
    np.testing.assert_allclose(logits, exact - 1, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(linear_transposed(x, w.T, dtype=jnp.float32), exact - 1, rtol=1e-5, atol=1e-5)


def test_materialize_keeps_the_base_dtype_and_plain_arrays():
    w = leaf(jnp.bfloat16)
    assert materialize(w).dtype == jnp.bfloat16
    np.testing.assert_allclose(materialize(w).astype(jnp.float32), as_matrix(w), rtol=1e-2, atol=1e-2)
    assert materialize(w.base) is w.base
    assert not is_leaf(w.base)


def test_an_id_outside_the_table_is_not_another_row():
    table = normal(0, 4, 3)
    rows = take_rows(table, jnp.asarray([3, 4]))
    assert np.isfinite(rows[0]).all()
    assert np.isnan(rows[1]).all()


def test_one_row_reads_a_large_kernel_in_parts_to_the_same_sum():
    kernel = jax.random.normal(jax.random.key(0), (512, 512))
    row = jax.random.normal(jax.random.key(1), (1, 512))
    choices = dataclasses.replace(platform.choices(), row_parts=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, "choices", lambda: choices)
        text = jax.jit(linear).lower(row, kernel).as_text()
        parts = linear(row, kernel)
        two_rows = jax.jit(linear).lower(jnp.tile(row, (2, 1)), kernel).as_text()
        assert "8x64x512" in text, "eight parts of 64 inputs"
        assert "8x64x512" not in two_rows, "two rows read it whole"
    want = np.asarray(row, np.float64) @ np.asarray(kernel, np.float64)
    np.testing.assert_allclose(parts, want, rtol=1e-4, atol=1e-4)
