"""Chunked log-probabilities against the plain ones, in float64 NumPy, and what is never allocated."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.ops import platform
from jaxpost.ops.linear import LoRA, linear
from jaxpost.ops.logprobs import log_normaliser, stats_of_logits, token_stats, weighted_sum

B, T, D, V = 3, 7, 4, 11
CHUNKS = [1, 6, 12, 100]


def data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "hidden": rng.normal(size=(B, T, D)),
        "head": 2 * rng.normal(size=(D, V)),
        "targets": rng.integers(0, V, (B, T)),
        "g_logprob": rng.normal(size=(B, T)),
        "g_logz": rng.normal(size=(B, T)),
    }


def cast(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x, jnp.int32 if x.dtype.kind == "i" else jnp.float32)


def head(params: Any, hidden: jax.Array) -> jax.Array:
    return hidden @ params["head"]


def softcapped(params: Any, hidden: jax.Array) -> jax.Array:
    return 3.0 * jnp.tanh(hidden @ params["head"] / 3.0)


def tied(params: Any, hidden: jax.Array) -> jax.Array:
    return hidden @ params["head"].T


def closed_form(d: dict[str, np.ndarray], cap: float | None = None) -> dict[str, np.ndarray]:
    """log p, logZ and the gradients of sum(g_logprob log p + g_logz logZ), in float64."""
    raw = d["hidden"] @ d["head"]
    logits = raw if cap is None else cap * np.tanh(raw / cap)
    logz = np.log(np.exp(logits).sum(-1))
    onehot = np.eye(V)[d["targets"]]
    p = np.exp(logits - logz[..., None])
    g = d["g_logprob"][..., None] * (onehot - p) + d["g_logz"][..., None] * p
    g = g if cap is None else g * (1 - np.tanh(raw / cap) ** 2)
    return {
        "logprob": (onehot * logits).sum(-1) - logz,
        "logz": logz,
        "correct": logits.argmax(-1) == d["targets"],
        "head": np.einsum("btd,btv->dv", d["hidden"], g),
        "hidden": g @ d["head"].T,
    }


def keep_logits(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setitem(platform.CHOICES, "cpu", dataclasses.replace(platform.CHOICES["cpu"], kept_logits=most))


@pytest.fixture(params=[0, 2**20], ids=["again", "kept"])
def logits_of_both_passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Computed twice, or kept."""
    keep_logits(monkeypatch, request.param)


@pytest.mark.usefixtures("logits_of_both_passes")
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(
    ("unembed", "cap"), [(head, None), (softcapped, 3.0), (tied, None)], ids=["head", "softcap", "tied"]
)
def test_token_stats_equal_the_closed_form(unembed: Any, cap: float | None, chunk: int) -> None:
    d, want = data(), closed_form(data(), cap)
    transposed = (lambda x: x.T) if unembed is tied else (lambda x: x)
    params = {"head": transposed(cast(d["head"])), "unused": jnp.ones((2, 2))}

    def total(params: Any, hidden: jax.Array) -> Any:
        stats = token_stats(unembed, params, hidden, cast(d["targets"]), chunk_tokens=chunk)
        return jnp.sum(cast(d["g_logprob"]) * stats.logprob + cast(d["g_logz"]) * stats.logz), stats

    (g_params, g_hidden), stats = jax.jit(jax.grad(total, (0, 1), has_aux=True))(params, cast(d["hidden"]))
    np.testing.assert_allclose(stats.logprob, want["logprob"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(stats.logz, want["logz"], rtol=1e-5)
    np.testing.assert_array_equal(stats.correct, want["correct"])
    np.testing.assert_allclose(g_hidden, want["hidden"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(transposed(g_params["head"]), want["head"], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(g_params["unused"], np.zeros((2, 2)))


@pytest.mark.usefixtures("logits_of_both_passes")
@pytest.mark.parametrize("chunk", CHUNKS)
def test_token_stats_leave_out_tokens_without_weight(chunk: int) -> None:
    d = data() | {"g_logz": np.zeros((B, T))}
    used = np.asarray([[0, 1, 0, 0, 1, 0, 0], [0] * 7, [0, 0, 0, 1, 1, 0, 1]]) != 0
    d["g_logprob"] *= used
    want = closed_form(d)

    def total(params: Any, hidden: jax.Array) -> Any:
        how = {"weights": cast(used * 1.0), "chunk_tokens": chunk, "with_collision": True}
        stats = token_stats(head, params, hidden, cast(d["targets"]), **how)
        # Tokens that are left out have no gradient, whatever is asked of them.
        return jnp.sum(jnp.where(used, cast(d["g_logprob"]), 7.0) * stats.logprob + stats.collision), stats

    (g_params, g_hidden), stats = jax.jit(jax.grad(total, (0, 1), has_aux=True))(
        {"head": cast(d["head"])}, cast(d["hidden"])
    )
    np.testing.assert_allclose(stats.logprob, used * want["logprob"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(stats.logz, used * want["logz"], rtol=1e-5)
    np.testing.assert_array_equal(stats.correct, used & want["correct"])
    p = np.exp(d["hidden"] @ d["head"] - want["logz"][..., None])
    np.testing.assert_allclose(stats.collision, used * np.log((p**2).sum(-1)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(g_hidden, want["hidden"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(g_params["head"], want["head"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_weighted_sum_equals_the_closed_form(chunk: int) -> None:
    d = data() | {"g_logz": np.zeros((B, T))}
    want = closed_form(d)

    def total(params: Any, hidden: jax.Array) -> Any:
        def fn(logits: jax.Array, targets: jax.Array) -> Any:
            stats = stats_of_logits(logits, targets)
            return stats.logprob, stats

        w, y = cast(d["g_logprob"]), cast(d["targets"])
        value, stats = weighted_sum(head, params, hidden, w, y, fn, chunk_tokens=chunk)
        return 3.0 * value, stats  # a factor outside reaches the gradient

    f = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
    (value, stats), (g_params, g_hidden) = f({"head": cast(d["head"])}, cast(d["hidden"]))
    np.testing.assert_allclose(value, 3 * (d["g_logprob"] * want["logprob"]).sum(), rtol=1e-5)
    np.testing.assert_allclose(stats.logprob, want["logprob"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(g_hidden, 3 * want["hidden"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(g_params["head"], 3 * want["head"], rtol=1e-4, atol=1e-5)
    # Not differentiated, the same number comes from the forward pass alone.
    np.testing.assert_allclose(total({"head": cast(d["head"])}, cast(d["hidden"]))[0], value, rtol=1e-6)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_chunks_without_weight_are_left_out(chunk: int) -> None:
    """Values and gradients are the closed form's with scattered zero weights; some tokens are never multiplied."""
    d = data() | {"g_logz": np.zeros((B, T))}
    d["g_logprob"] *= np.asarray([[0, 1, 0, 0, 1, 0, 0], [0] * 7, [0, 0, 0, 1, 1, 0, 1]])
    want, used = closed_form(d), d["g_logprob"] != 0

    def total(params: Any, hidden: jax.Array) -> Any:
        fn = lambda logits, y: (stats_of_logits(logits, y).logprob, stats_of_logits(logits, y).logz)  # noqa: E731
        w, y = cast(d["g_logprob"]), cast(d["targets"])
        return weighted_sum(head, params, hidden, w, y, fn, chunk_tokens=chunk)

    f = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
    (value, logz), (g_params, g_hidden) = f({"head": cast(d["head"])}, cast(d["hidden"]))
    np.testing.assert_allclose(value, (d["g_logprob"] * want["logprob"]).sum(), rtol=1e-5)
    np.testing.assert_allclose(g_hidden, want["hidden"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(g_params["head"], want["head"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logz[used], want["logz"][used], rtol=1e-5)
    assert (np.asarray(logz) == 0).any() == (chunk < 100)


def test_the_normaliser_is_stable_and_its_gradient_is_softmax() -> None:
    logits = jnp.asarray([[1e4, -1e4, 0.0], [1.0, 2.0, 3.0]])
    np.testing.assert_allclose(log_normaliser(logits), [1e4, 3.407606], rtol=1e-6)
    want = np.exp([1.0, 2.0, 3.0]) / np.exp([1.0, 2.0, 3.0]).sum()
    np.testing.assert_allclose(jax.jacobian(log_normaliser)(logits)[1, 1], want, rtol=1e-6)


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a program, those of its sub-programs included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def total_of(name: str) -> Any:
    """A scalar function of (params, hidden), and both."""
    d = data()
    hidden, targets, weights = cast(d["hidden"]), cast(d["targets"]), cast(d["g_logprob"])

    def total(params: Any, hidden: jax.Array) -> jax.Array:
        if name == "token_stats":
            return jnp.sum(token_stats(head, params, hidden, targets, chunk_tokens=6).logprob * weights)
        fn = lambda logits, y: (stats_of_logits(logits, y).logprob, ())  # noqa: E731
        return weighted_sum(head, params, hidden, weights, targets, fn, chunk_tokens=6)[0]

    return total, ({"head": cast(d["head"])}, hidden)


def program(name: str, *, trained_head: bool) -> Any:
    total, where = total_of(name)
    return jax.make_jaxpr(jax.value_and_grad(total, (0, 1) if trained_head else 1))(*where).jaxpr


@pytest.mark.parametrize("name", ["token_stats", "weighted_sum"])
def test_all_logits_never_exist_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither [B T V] nor a stack of the head's gradients over chunks, forward or backward."""
    keep_logits(monkeypatch, 6 * V * 4 * 4 - 1)
    eqns = equations(program(name, trained_head=True))
    sizes = {int(np.prod(v.aval.shape)) for eqn in eqns for v in eqn.outvars}
    assert 6 * V in sizes, "one chunk's logits exist"
    assert max(sizes) <= max(6 * V, D * V, B * (T + 1) * D) < B * T * V


@pytest.mark.parametrize(
    ("name", "trained_head", "products"),
    [("token_stats", True, 4), ("token_stats", False, 3), ("weighted_sum", True, 3), ("weighted_sum", False, 2)],
)
def test_products_with_the_head(name: str, trained_head: bool, products: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen head costs no product for its gradient; a known weighting costs no recomputation."""
    keep_logits(monkeypatch, 0)
    dots = [eqn for eqn in equations(program(name, trained_head=trained_head)) if eqn.primitive.name == "dot_general"]
    assert len([e for e in dots if any(V in v.aval.shape for v in (*e.invars, *e.outvars))]) == products


@pytest.mark.parametrize(("kept", "products"), [(6 * V * 4 * 4, 3), (6 * V * 4 * 4 - 1, 4)])
def test_kept_logits_cost_no_fourth_product(kept: int, products: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four chunks of six tokens: what is asked is whether all of them fit, not one chunk."""
    keep_logits(monkeypatch, kept)
    total, where = total_of("token_stats")
    compiled = jax.jit(jax.value_and_grad(total, (0, 1))).lower(*where).compile().as_text()
    assert compiled is not None
    assert len(re.findall(r" dot\(|__onednn\$matmul", compiled)) == products


def test_a_lora_head_trains_its_factors() -> None:
    rng = np.random.default_rng(1)
    base, a, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((D, V), (D, 2), (2, V)))
    hidden, targets = cast(data()["hidden"]), cast(data()["targets"])
    unembed = lambda p, h: linear(h, p["head"])  # noqa: E731

    def nll(factors: Any, chunk: int | None) -> jax.Array:
        params = {"head": LoRA(base, *factors, jnp.asarray(0.5))}
        if chunk is None:
            return -jnp.sum(stats_of_logits(unembed(params, hidden), targets).logprob)
        return -jnp.sum(token_stats(unembed, params, hidden, targets, chunk_tokens=chunk).logprob)

    want, got = jax.grad(nll)((a, b), None), jax.grad(nll)((a, b), 6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), got, want)


def test_bfloat16_gradients_add_up_in_float32() -> None:
    """1024 contributions of 1/2 to a bfloat16 head: added in bfloat16 they would stop growing at 128."""
    length = 1024
    params = {"head": jnp.zeros((1, 2), jnp.bfloat16)}
    hidden, targets = jnp.ones((1, length, 1), jnp.bfloat16), jnp.zeros((1, length), jnp.int32)
    unembed = lambda p, h: (h @ p["head"]).astype(jnp.float32)  # noqa: E731
    total = lambda p: jnp.sum(token_stats(unembed, p, hidden, targets, chunk_tokens=1).logprob)  # noqa: E731
    np.testing.assert_allclose(jax.grad(total)(params)["head"].astype(jnp.float32), [[length / 2, -length / 2]])


def test_chunk_tokens_must_be_positive() -> None:
    with pytest.raises(ValueError, match="chunk_tokens must be at least 1, got 0"):
        token_stats(head, {"head": jnp.ones((D, V))}, jnp.ones((1, 2, D)), jnp.zeros((1, 2), jnp.int32), chunk_tokens=0)
