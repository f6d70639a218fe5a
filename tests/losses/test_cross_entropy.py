"""Supervised losses against closed forms in float64 NumPy."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.losses.supervised import cross_entropy, dft, next_tokens
from jaxpost.metrics.terms import means
from jaxpost.train.step import make_eval_step
from jaxpost.types import Inputs, Model, Outputs, TokenBatch

V, D = 9, 5


def bigram_model() -> Model:
    """Logits of the next token are head^T embed[token]: a closed form can follow it."""

    def forward(params: Any, inputs: Inputs, cache: Any = None) -> Outputs:
        return Outputs(params["embed"][inputs.tokens])

    return Model(None, (), lambda key: {}, forward, lambda params, h: h @ params["head"], lambda *_: None)


def arrays() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    params = {"embed": rng.normal(size=(V, D)), "head": 2 * rng.normal(size=(D, V))}
    batch = {
        "tokens": rng.integers(0, V, (2, 6)),
        "positions": np.asarray([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]),
        "segment_ids": np.asarray([[1, 1, 1, 2, 2, 0], [1] * 6]),
        "weights": rng.uniform(0.1, 1.0, (2, 6)),
    }
    return params, batch


def oracle(kind: str, eps: float = 0.0, z: float = 0.0) -> tuple[float, dict[str, np.ndarray], float]:
    """Loss, gradient and mean nll in float64, token by token."""
    params, batch = arrays()
    total = weight = nll = 0.0
    g = {k: np.zeros_like(x) for k, x in params.items()}
    for b in range(2):
        for t in range(5):
            if batch["segment_ids"][b, t] != batch["segment_ids"][b, t + 1] or not batch["segment_ids"][b, t]:
                continue
            x, y, w = batch["tokens"][b, t], batch["tokens"][b, t + 1], batch["weights"][b, t + 1]
            h = params["embed"][x]
            logits = h @ params["head"]
            logz = np.log(np.exp(logits).sum())
            logp, onehot = logits - logz, np.eye(V)[y]
            p = np.exp(logp)
            if kind == "dft":
                value, g_logits = -p[y] * logp[y], -p[y] * (onehot - p)
            else:
                smooth = (1 - eps) * onehot + eps / V
                value, g_logits = -(smooth * logp).sum(), p - smooth
            total += w * (value + z * logz**2)
            g_logits = w * (g_logits + 2 * z * logz * p)
            nll += -w * logp[y]
            weight += w
            g["head"] += np.outer(h, g_logits)
            g["embed"][x] += params["head"] @ g_logits
    return total / weight, {k: x / weight for k, x in g.items()}, nll / weight


def ours(loss: Any) -> tuple[dict[str, jax.Array], Any]:
    params, batch = arrays()
    params = {"policy": jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)}
    ints = {k: jnp.asarray(batch[k], jnp.int32) for k in ("tokens", "positions", "segment_ids")}
    tokens = TokenBatch(**ints, weights=jnp.asarray(batch["weights"], jnp.float32), row_ids=jnp.arange(2))

    def total(params: Any) -> Any:
        out = means(make_eval_step(partial(loss, bigram_model()))(params, {}, tokens, jax.random.key(0), {}))
        return out["loss"], out

    grads, metrics = jax.jit(jax.grad(total, has_aux=True))(params)
    return metrics, grads["policy"]


@pytest.mark.parametrize("chunk_tokens", [2, 1024])
@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (cross_entropy, oracle("cross_entropy")),
        (partial(cross_entropy, label_smoothing=0.2), oracle("cross_entropy", eps=0.2)),
        (partial(cross_entropy, z_loss=0.3), oracle("cross_entropy", z=0.3)),
        (partial(cross_entropy, label_smoothing=0.1, z_loss=0.05), oracle("cross_entropy", eps=0.1, z=0.05)),
        (dft, oracle("dft")),
        (partial(dft, z_loss=0.1), oracle("dft", z=0.1)),
    ],
    ids=["plain", "smoothed", "z", "smoothed-z", "dft", "dft-z"],
)
def test_value_and_gradient_equal_the_closed_form(loss: Any, expected: Any, chunk_tokens: int) -> None:
    value, gradient, nll = expected
    metrics, grads = ours(partial(loss, chunk_tokens=chunk_tokens))
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(metrics["nll"], nll, rtol=1e-5)
    for name, want in gradient.items():
        np.testing.assert_allclose(grads[name], want, rtol=1e-4, atol=1e-6, err_msg=name)


def test_accuracy_counts_targets_that_are_likeliest() -> None:
    params, batch = arrays()
    hits = weight = 0.0
    for b, t in [(0, 0), (0, 1), (0, 3), *((1, t) for t in range(5))]:
        w = batch["weights"][b, t + 1]
        best = (params["embed"][batch["tokens"][b, t]] @ params["head"]).argmax()
        hits, weight = hits + w * (best == batch["tokens"][b, t + 1]), weight + w
    assert hits > 0
    np.testing.assert_allclose(ours(cross_entropy)[0]["accuracy"], hits / weight, rtol=1e-5)


def test_a_uniform_model_has_loss_log_v() -> None:
    params = {"policy": {"embed": jnp.zeros((V, D)), "head": jnp.zeros((D, V))}}
    tokens = jnp.asarray([[1, 2, 3]])
    batch = TokenBatch(tokens, jnp.arange(3)[None], jnp.ones_like(tokens), jnp.ones((1, 3)), jnp.zeros(1, jnp.int32))
    terms, metrics = cross_entropy(bigram_model(), params, {}, batch, jax.random.key(0), {}, label_smoothing=0.3)
    np.testing.assert_allclose(terms["cross_entropy"].value, np.log(V), rtol=1e-6)
    np.testing.assert_allclose(metrics["nll"].value[0, :2], np.log(V), rtol=1e-6)


def test_targets_stay_within_their_segment() -> None:
    row = lambda *x: jnp.asarray([x], jnp.int32)  # noqa: E731
    segments = row(0, 1, 1, 1, 2, 2, 0, 0)
    batch = TokenBatch(row(*range(10, 18)), segments, segments, jnp.ones((1, 8)), jnp.zeros(1, jnp.int32))
    targets, weights = next_tokens(batch)
    np.testing.assert_array_equal(weights, [[0, 1, 1, 0, 1, 0, 0, 0]])
    np.testing.assert_array_equal(targets[0, [1, 2, 4]], [12, 13, 15])


def test_label_smoothing_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 1\), got 1.0"):
        ours(partial(cross_entropy, label_smoothing=1.0))
