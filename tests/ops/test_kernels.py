"""The vendors' kernels against the xla implementation; splash in Pallas's interpreter."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_rows import example, places

from jaxpost import sharding
from jaxpost.ops.attention import attention
from jaxpost.ops.kernels import cudnn_attention, splash_attention

CASES = {
    "one_device": ({"rows": 2, "length": 70, "heads": 2, "kv_heads": 1}, {"softcap": 2.0}, None),
    "tensor_and_seq": (
        {"rows": 4, "length": 200, "heads": 4, "kv_heads": 2}, {}, {"fsdp": 2, "tensor": 2, "seq": 2},
    ),
    "window_and_few_kv_heads": (
        {"rows": 4, "length": 200, "heads": 2, "kv_heads": 1}, {"window": 37}, {"data": 2, "fsdp": 2, "tensor": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_splash_equals_xla_forward_and_backward(name):
    shape, options, sizes = CASES[name]
    q, k, v, positions, segments = example(**shape)
    mesh = None if sizes is None else sharding.make_mesh(sizes)
    options = {**options, "scale": 0.4, **places(positions, segments)}

    def run(f):
        return jax.jit(jax.value_and_grad(lambda *x: jnp.sum(jnp.sin(f(*x, **options))), argnums=(0, 1, 2)))(q, k, v)

    kernel = run(partial(splash_attention, mesh=mesh, interpret=True))
    for got, want in zip(jax.tree.leaves(kernel), jax.tree.leaves(run(attention)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)


def test_splash_says_what_it_cannot_do():
    q, k, v, positions, segments = example(rows=3, heads=3, kv_heads=3)
    call = {**places(positions, segments), "scale": 1.0, "interpret": True}
    with pytest.raises(ValueError, match="3 rows cannot be dealt to 8"):
        splash_attention(q, k, v, mesh=sharding.make_mesh({"fsdp": 8}), **call)
    with pytest.raises(ValueError, match="3 heads cannot be split by tensor=8"):
        splash_attention(q, k, v, mesh=sharding.make_mesh({"tensor": 8}), **call)
    call |= {"q_positions": positions[:, :4], "q_segments": segments[:, :4]}
    with pytest.raises(ValueError, match="as many keys as queries"):
        splash_attention(q[:, :4], k, v, **call)


def test_splash_leaves_cached_calls_to_xla():
    q, k, v, positions, segments = example()
    call = {**places(positions, segments), "scale": 1.0, "kv_heads_first": True}
    first = [x.swapaxes(1, 2) for x in (k, v)]
    np.testing.assert_array_equal(splash_attention(q, *first, **call), attention(q, *first, **call))


def test_cudnn_says_what_it_cannot_do():
    q, k, v, positions, segments = example()
    call = {**places(positions, segments), "scale": 1.0}
    with pytest.raises(ValueError, match="no soft cap"):
        cudnn_attention(q, k, v, softcap=1.0, **call)
    with pytest.raises(ValueError, match="not float32: set compute_dtype"):
        cudnn_attention(q, k, v, **call)


def test_cudnn_gets_the_mask_of_packed_rows(monkeypatch):
    """Where no GPU is, jax's own XLA form stands in for the kernel: the arguments that it gets are the right ones."""
    real = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *x, implementation, **options: real(*x, implementation="xla", **options)
    )
    q, k, v, positions, segments = example()
    call = {**places(positions, segments), "scale": 0.4, "window": 4}
    low = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    with jax.numpy_dtype_promotion("standard"):
        got = cudnn_attention(*low, **call)
    np.testing.assert_allclose(got.astype(jnp.float32), attention(q, k, v, **call), atol=3e-2)
