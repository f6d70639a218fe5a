"""Policy losses against float64 NumPy: every branch by hand, and mean gradients against the exact policy gradient."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.losses import correction, kl
from jaxpost.losses.aggregate import constant_mean, sequence_mean, token_mean
from jaxpost.losses.policy import joined, policy_gradient
from jaxpost.losses.surrogates import Tokens, cispo, cispo_two_sided, gmpo, gspo, ppo, reinforce, sapo
from jaxpost.losses.value import squared_error, value_loss
from jaxpost.metrics.terms import means, reduce_terms
from jaxpost.rl import advantages as adv
from jaxpost.rl import returns
from jaxpost.types import Inputs, Model, Outputs, RolloutBatch, Term

V, D = 5, 4
HYPER = {"clip_low": 0.2, "clip_high": 0.3, "kl_coef": 0.7, "entropy_coef": 0.4, "temperature": 1.7}
TAUS = {"tau_positive": 1.2, "tau_negative": 1.9}
INTS = ("tokens", "positions", "segment_ids", "row_ids")


def bigram_model() -> Model:
    """Logits of the next token are head^T embed[token]: a closed form can follow it."""

    def forward(params: Any, inputs: Inputs, cache: Any = None) -> Outputs:
        return Outputs(params["embed"][inputs.tokens])

    return Model(None, (), lambda key: {}, forward, lambda params, h: h @ params["head"], lambda *_: None)


# The whole loss on packed rows, every option on, against loops


def arrays() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    params = {"embed": rng.normal(size=(V, D)), "head": rng.normal(size=(D, V))}
    shape = (2, 8)
    batch = {
        "tokens": rng.integers(0, V, shape),
        "positions": np.asarray([[0, 1, 2, 3, 0, 1, 2, 0], range(8)]),
        "segment_ids": np.asarray([[1, 1, 1, 1, 2, 2, 2, 0], [1] * 8]),
        "weights": np.asarray([[0, 1, 0, 1, 0, 1, 1, 9], [0, 0, 1, 1, 0.5, 1, 1, 1]]),
        "row_ids": np.arange(2),
        "advantages": rng.normal(size=shape),
    }
    logits = params["embed"][np.roll(batch["tokens"], 1, axis=1)] @ params["head"] / HYPER["temperature"]
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    old = np.take_along_axis(logp, batch["tokens"][..., None], -1)[..., 0] + 0.4 * rng.normal(size=shape)
    batch |= {"old_logprobs": old, "sampler_logprobs": old + 0.9 * rng.normal(size=shape)}
    return params, batch | {"ref_logprobs": -1.6 + 0.5 * rng.normal(size=shape)}


def to_batch(batch: dict[str, np.ndarray]) -> RolloutBatch:
    return RolloutBatch(**{k: jnp.asarray(x, jnp.int32 if k in INTS else jnp.float32) for k, x in batch.items()})


def samples() -> list[tuple[int, list[int]]]:
    """(row, positions of the targets with weight) of every sample."""
    _, batch = arrays()
    out = []
    for row, segment in ((0, 1), (0, 2), (1, 1)):
        inside = np.flatnonzero(batch["segment_ids"][row] == segment)[1:]
        out.append((row, [int(t) for t in inside if batch["weights"][row, t]]))
    return out


def oracle(kind: str, mean: str, kl_kind: str, correct: str) -> tuple[float, dict[str, np.ndarray], dict[str, float]]:
    """Loss, gradient and metrics in float64, sample by sample."""
    params, b = arrays()
    low, high, temperature = 0.8, 1.3, HYPER["temperature"]
    n_samples, n_tokens = len(samples()), sum(b["weights"][r, ts].sum() for r, ts in samples())
    loss, g = 0.0, {k: np.zeros_like(x) for k, x in params.items()}
    seen: dict[str, list[float]] = {"w": [], "ratio": [], "clip_fraction": [], "kl": [], "entropy": [], "factor": []}
    for row, ts in samples():
        logps = []
        for t in ts:
            logits = params["embed"][b["tokens"][row, t - 1]] @ params["head"] / temperature
            logps.append(logits - np.log(np.exp(logits).sum()))
        chosen = np.asarray([lp[b["tokens"][row, t]] for lp, t in zip(logps, ts, strict=True)])
        old, sampler, ref, A, w = (
            b[k][row, ts] for k in ("old_logprobs", "sampler_logprobs", "ref_logprobs", "advantages", "weights")
        )
        rho = np.exp(chosen - old)
        r = np.full_like(rho, np.exp(np.mean(chosen - old))) if kind == "gspo" else rho
        # value and its derivative by the token's log-probability
        if kind == "reinforce":
            value, slope, held = -A * chosen, -A, np.zeros(len(ts), bool)
        elif kind.startswith("cispo"):
            weight = np.minimum(rho, high) if kind == "cispo" else np.clip(rho, low, high)
            value, slope, held = -weight * A * chosen, -weight * A, weight != rho
        elif kind == "sapo":
            tau = np.where(A > 0, TAUS["tau_positive"], TAUS["tau_negative"])
            gate = 1 / (1 + np.exp(-tau * (rho - 1)))
            value, slope, held = -A * 4 / tau * gate, -A * 4 * gate * (1 - gate) * rho, np.zeros(len(ts), bool)
        elif kind == "gmpo":
            step = chosen - old
            held = ((A > 0) & (step > 0.3)) | ((A < 0) & (step < -0.2))
            value = -A * np.exp(np.mean(np.where(held, np.clip(step, -0.2, 0.3), step)))
            slope = 0 * value  # of the whole sample, below
        else:
            held = ((A > 0) & (r > high)) | ((A < 0) & (r < low))
            value, slope = np.where(held, -np.clip(r, low, high) * A, -r * A), np.where(held, 0.0, -r * A)
            if kind == "dual":
                over = (A < 0) & (r > 1.5)
                value, slope, held = np.where(over, -1.5 * A, value), np.where(over, 0.0, slope), held | over
        gap = {"token": old - sampler, "masked": old - sampler, "none": 0 * old}.get(
            correct, np.full_like(old, np.sum(old - sampler))
        )
        factor = np.exp(gap)
        factor = (
            np.where((factor >= 0.5) & (factor <= 2), factor, 0.0) if correct == "masked" else np.minimum(factor, 2)
        )
        factor = np.ones_like(old) if correct == "none" else factor
        d = chosen - ref
        if kl_kind == "plain":
            penalty, kl_slope = np.exp(-d) - 1 + d, 1 - np.exp(-d)
        else:
            penalty, kl_slope = rho * d, rho * d
        share = {"token": w / n_tokens, "sequence": w / w.sum() / n_samples, "constant": w / 4.0 / n_samples}[mean]
        if kind == "gmpo":
            slope = np.where(held, 0.0, np.sum(share * factor * value) / len(ts) / (share * factor))
        for i, t in enumerate(ts):
            p = np.exp(logps[i])
            entropy = -(p * logps[i]).sum()
            loss += share[i] * (factor[i] * value[i] + 0.7 * penalty[i] - 0.4 * entropy)
            onehot = np.eye(V)[b["tokens"][row, t]]
            g_logits = (factor[i] * slope[i] + 0.7 * kl_slope[i]) * (onehot - p) + 0.4 * p * (logps[i] + entropy)
            g_logits *= share[i] / temperature
            x = b["tokens"][row, t - 1]
            g["head"] += np.outer(params["embed"][x], g_logits)
            g["embed"][x] += params["head"] @ g_logits
            for name, v in zip(
                seen, (w[i], rho[i], held[i], np.exp(-d[i]) - 1 + d[i], entropy, factor[i]), strict=True
            ):
                seen[name].append(float(v))
    watched = {k: np.average(v, weights=seen["w"]) for k, v in seen.items() if k != "w"}
    return loss, g, watched


CASES = [
    ("reinforce", "token", "plain", "none"),
    ("ppo", "sequence", "plain", "token"),
    ("ppo", "constant", "corrected", "sequence"),
    ("dual", "token", "corrected", "masked"),
    ("gspo", "sequence", "corrected", "none"),
    ("cispo", "token", "plain", "token"),
    ("cispo_two_sided", "constant", "corrected", "masked"),
    ("sapo", "sequence", "plain", "token"),
    ("gmpo", "sequence", "plain", "token"),
]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_value_gradient_and_metrics_equal_the_closed_form(case: tuple[str, str, str, str]) -> None:
    kind, mean, kl_kind, correct = case
    loss, gradient, watched = oracle(*case)
    hyper = HYPER | TAUS | ({"dual_clip": 1.5} if kind == "dual" else {})
    corrections = {
        "none": None,
        "token": correction.truncated(cap=2.0),
        "sequence": correction.truncated(correction.sequence_weights),
        "masked": correction.masked(),
    }
    named = (reinforce, gspo, gmpo, sapo, cispo, cispo_two_sided)
    how: dict[str, Any] = {
        "surrogate": {f.__name__: f for f in named}.get(kind, ppo),
        "aggregate": {"token": token_mean, "sequence": sequence_mean, "constant": constant_mean(4)}[mean],
        "kl": kl.plain(kl.k3) if kl_kind == "plain" else kl.corrected(kl.k1),
        "correction": corrections[correct],
    }
    params, batch = arrays()
    policy = {"policy": jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)}

    def total(p: Any) -> Any:
        traced = {k: jnp.float32(v) for k, v in hyper.items()}
        f = policy_gradient(bigram_model(), p, {}, to_batch(batch), jax.random.key(0), traced, chunk_tokens=6, **how)
        out = means(reduce_terms(*f))
        return out["loss"], out

    grads, out = jax.jit(jax.grad(total, has_aux=True))(policy)
    np.testing.assert_allclose(out["loss"], loss, rtol=1e-5)
    for name, want in gradient.items():
        np.testing.assert_allclose(grads["policy"][name], want, rtol=1e-4, atol=1e-6, err_msg=name)
    for name, want in watched.items():
        name = "sampler_weight" if name == "factor" else name
        if correct != "none" or name != "sampler_weight":
            np.testing.assert_allclose(out[name], want, rtol=1e-5, err_msg=name)


def test_the_cases_reach_every_branch() -> None:
    for kind, mean in (("ppo", "token"), ("dual", "token"), ("gspo", "token"), ("gmpo", "token"), ("cispo", "token")):
        assert 0 < oracle(kind, mean, "plain", "none")[2]["clip_fraction"] < 1, kind
    plain, dual = (oracle(kind, "token", "plain", "none")[2]["clip_fraction"] for kind in ("ppo", "dual"))
    assert dual > plain
    masked, truncated = (oracle("ppo", "token", "plain", c)[2]["factor"] for c in ("masked", "token"))
    assert 0 < masked < truncated


# One token at a time, by hand


@pytest.mark.parametrize(
    ("rho", "advantage", "hyper", "value", "slope"),
    [
        (1.1, 2.0, {}, -2.2, -2.2),  # inside
        (1.5, 2.0, {}, -2.6, 0.0),  # better already: held at 1 + clip_high
        (0.5, 2.0, {}, -1.0, -1.0),  # good but rarer: never held
        (0.5, -2.0, {}, 1.6, 0.0),  # worse already: held at 1 - clip_low
        (5.0, -2.0, {}, 10.0, 10.0),  # bad but likelier: not held ...
        (5.0, -2.0, {"dual_clip": 3.0}, 6.0, 0.0),  # ... but by a second clip
        (5.0, 2.0, {"dual_clip": 3.0}, -2.6, 0.0),
    ],
)
def test_ppo_by_hand(rho: float, advantage: float, hyper: dict[str, float], value: float, slope: float) -> None:
    row = lambda x: jnp.full((1, 1), x, jnp.float32)  # noqa: E731

    def f(logprob: Any) -> Any:
        t = Tokens(logprob, row(-2.0), row(advantage), row(1.0), jnp.ones((1, 1), jnp.int32))
        return jnp.sum(ppo(t, {"clip_low": 0.2, "clip_high": 0.3} | hyper).value)

    got, grad = jax.value_and_grad(f)(row(-2.0 + np.log(rho)))
    np.testing.assert_allclose((got, grad[0, 0]), (value, slope), rtol=1e-5)
    # INTELLECT-2's way to write it: the ratio is held below delta before anything else
    if "dual_clip" in hyper:
        two_sided = -min(min(rho, 3.0) * advantage, np.clip(rho, 0.8, 1.3) * advantage)
        np.testing.assert_allclose(got, two_sided, rtol=1e-5)


def test_extreme_ratios_stay_finite() -> None:
    row = lambda *x: jnp.asarray([x], jnp.float32)  # noqa: E731
    for surrogate in (ppo, gspo, gmpo, sapo, cispo, cispo_two_sided, reinforce):

        def f(logprobs: Any, surrogate: Any = surrogate) -> Any:
            t = Tokens(logprobs, row(-1e4, 0.0), row(-1.0, -1.0), row(1.0, 1.0), jnp.asarray([[1, 2]]))
            return jnp.sum(surrogate(t, {"clip_low": 0.2, "clip_high": 0.2} | TAUS).value)

        value, grad = jax.value_and_grad(f)(row(0.0, -1e4))
        assert np.isfinite(value)
        assert np.isfinite(grad).all()


@pytest.mark.parametrize("surrogate", [reinforce, ppo, gspo, gmpo, sapo, cispo, cispo_two_sided])
def test_on_policy_every_surrogate_has_the_policy_gradient(surrogate: Any) -> None:
    """Ratio 1: nothing is held, the gradient is that of -A log pi, and giving the old policy or not is the same."""
    rng = np.random.default_rng(1)
    logprobs, advantages = (jnp.asarray(rng.normal(size=(2, 6)), jnp.float32) for _ in range(2))
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2], [1] * 6])
    if surrogate is gmpo:  # its samples have one ratio, and so one advantage
        advantages = jnp.asarray([[0.7] * 3 + [-1.3] * 3, [0.4] * 6])

    def f(x: Any) -> Any:
        out = surrogate(
            Tokens(x, logprobs, advantages, jnp.ones((2, 6)), segments), {"clip_low": 0.2, "clip_high": 0.2} | TAUS
        )
        return jnp.sum(out.value), out

    grad, out = jax.grad(f, has_aux=True)(logprobs)
    np.testing.assert_allclose(grad, -advantages, rtol=1e-6)
    assert not (out.low | out.high).any()

    params, batch = arrays()
    policy = {"policy": jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)}
    batch.pop("old_logprobs")
    f = partial(policy_gradient, bigram_model(), surrogate=surrogate)
    metrics = means(reduce_terms(*f(policy, {}, to_batch(batch), jax.random.key(0), HYPER | TAUS)))
    assert metrics["ratio"] == 1
    assert metrics["old_kl"] == 0
    assert metrics["clip_fraction"] == 0


# Exact policy gradients: every group of a bandit, weighed by its probability

REWARDS = np.asarray([1.0, 0.0, 0.3])
THETA = np.asarray([0.3, -0.5, 0.1])


def mean_gradient(size: int, advantages_of: Any, surrogate: Any = reinforce) -> np.ndarray:
    """The expected gradient of the loss over all groups of `size` answers of one token."""
    groups = np.asarray(list(itertools.product(range(3), repeat=size)))
    logp = THETA - np.log(np.exp(THETA).sum())
    prob = np.exp(logp[groups].sum(1))
    advantages = jnp.stack([advantages_of(jnp.asarray(REWARDS[g], jnp.float32), jnp.zeros(size, int)) for g in groups])

    def total(theta: Any) -> Any:
        logprobs = jax.nn.log_softmax(theta)[groups]
        segments = jnp.broadcast_to(jnp.arange(size), groups.shape)
        t = Tokens(logprobs, jax.lax.stop_gradient(logprobs), advantages, jnp.ones(groups.shape), segments)
        value = surrogate(t, {"clip_low": 0.2, "clip_high": 0.2} | TAUS).value
        return jnp.sum(jnp.asarray(prob, jnp.float32) * jnp.mean(value, axis=1))

    return -np.asarray(jax.grad(total)(jnp.asarray(THETA, jnp.float32)))


def exact_gradient() -> np.ndarray:
    p = np.exp(THETA) / np.exp(THETA).sum()
    return p * (REWARDS - p @ REWARDS)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    ("name", "advantages_of", "factor"),
    [
        ("reinforce", lambda r, g: adv.reinforce(r), lambda n: 1.0),
        ("baseline", lambda r, g: adv.reinforce(r, baseline=0.4), lambda n: 1.0),
        ("remax", lambda r, g: adv.remax(r, jnp.ones_like(r)), lambda n: 1.0),
        ("rloo", adv.rloo, lambda n: 1.0),
        # The sample's own reward is part of its baseline, which shrinks the gradient by (n - 1) / n, nothing else.
        ("dr_grpo", partial(adv.grpo, scale=None), lambda n: (n - 1) / n),
        ("opo", lambda r, g: adv.opo(r, jnp.ones_like(r), g), lambda n: (n - 1) / n),
    ],
)
def test_mean_gradient_is_the_exact_policy_gradient(name: str, advantages_of: Any, factor: Any, size: int) -> None:
    want = factor(size) * exact_gradient()
    for surrogate in (reinforce, ppo, gspo, gmpo, sapo, cispo):
        np.testing.assert_allclose(mean_gradient(size, advantages_of, surrogate), want, rtol=1e-4, atol=1e-7)


def test_grpo_with_deviation_has_its_own_mean_gradient() -> None:
    """Dividing by the group's deviation is not the policy gradient: for pairs it is that of sign(r_i - r_j)."""
    p = np.exp(THETA) / np.exp(THETA).sum()
    sign = np.sign(REWARDS[:, None] - REWARDS[None])
    scores = sign @ p / np.sqrt(2)  # (r_i - mean) / deviation is +-1/sqrt 2 for a pair
    want = p * (scores - p @ scores)
    got = mean_gradient(2, partial(adv.grpo, eps=0.0))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-7)
    assert abs(got / exact_gradient() - 1).max() > 0.05


# KL: values and gradients summed over the vocabulary


def test_kl_estimators_and_their_gradients() -> None:
    ref = np.log([0.2, 0.5, 0.3])
    logp = THETA - np.log(np.exp(THETA).sum())
    p, q = np.exp(logp), np.exp(ref)
    reverse = p @ (logp - ref)
    g_reverse = p * (logp - ref - reverse)
    g_forward = p - q  # of sum q log(q / p)

    def expected(term: Any, old: np.ndarray) -> Any:
        """Mean over tokens of the old policy, which is held fixed."""

        def f(theta: Any) -> Any:
            now = jax.nn.log_softmax(theta)
            return jnp.sum(jnp.exp(old) * term(now, jnp.asarray(ref, jnp.float32), old))

        return jax.value_and_grad(f)(jnp.asarray(THETA, jnp.float32))

    f32 = lambda x: jnp.asarray(x, jnp.float32)  # noqa: E731
    elsewhere = np.log([0.6, 0.3, 0.1])
    for estimator, unbiased in ((kl.k1, True), (kl.k2, False), (kl.k3, True)):
        for old in (logp, elsewhere):
            value, grad = expected(kl.corrected(estimator), f32(old))
            np.testing.assert_allclose(grad, g_reverse, rtol=1e-4, atol=1e-6)
            if unbiased:
                np.testing.assert_allclose(value, reverse, rtol=1e-5)
    np.testing.assert_allclose(expected(kl.plain(kl.k2), f32(logp))[1], g_reverse, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(expected(kl.plain(kl.k2), f32(logp))[0], p @ (logp - ref) ** 2 / 2, rtol=1e-5)
    np.testing.assert_allclose(expected(kl.plain(kl.k3), f32(logp))[1], g_forward, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="gradient of k1 has mean 0"):
        kl.plain(kl.k1)


# Correction


def test_corrections_by_hand() -> None:
    gap = jnp.log(jnp.asarray([[2.0, 3.0, 0.1, 4.0]]))
    weights, segments = jnp.asarray([[1.0, 0.5, 0.0, 1.0]]), jnp.asarray([[1, 1, 1, 2]])
    close = partial(np.testing.assert_allclose, rtol=1e-5)
    close(correction.token_weights(gap, weights, segments), [[2, 3, 1, 4]])
    close(correction.sequence_weights(gap, weights, segments), [[6, 6, 6, 4]])
    close(correction.mean_sequence_weights(gap, weights, segments), [[6**0.5, 6**0.5, 6**0.5, 4]])
    close(correction.truncated(cap=2.5)(gap, weights, segments), [[2, 2.5, 1, 2.5]])
    close(correction.masked(low=2.5, high=3.5)(gap, weights, segments), [[0, 3, 0, 0]])
    stats = correction.ratio_statistics(gap, weights)
    want = {"mean": 3.0, "max": 4.0, "min": 2.0, "mean_abs_log": np.log(24) / 3, "effective_sample_size": 81 / 87}
    for name, value in want.items():
        close(stats[name], value, err_msg=name)
    assert set(stats) == set(want)
    nothing = correction.ratio_statistics(gap, jnp.zeros((1, 4)))
    assert [float(nothing[k]) for k in ("mean", "max", "min", "effective_sample_size")] == [1, 1, 1, 1]


def test_importance_weights_make_another_samplers_gradient_right() -> None:
    """Tokens drawn from mu, weighed by pi / mu: their mean gradient is pi's."""
    mu = np.asarray([0.5, 0.2, 0.3])
    logp = THETA - np.log(np.exp(THETA).sum())
    ones, segments = jnp.ones((1, 3)), jnp.asarray([[1, 2, 3]])
    factor = correction.token_weights(jnp.asarray([logp - np.log(mu)], jnp.float32), ones, segments)
    f = lambda theta: jnp.sum(jnp.asarray(mu * REWARDS, jnp.float32) * factor[0] * jax.nn.log_softmax(theta))  # noqa: E731
    np.testing.assert_allclose(jax.grad(f)(jnp.asarray(THETA, jnp.float32)), exact_gradient(), rtol=1e-4)


# What is missing or doubled is said


def test_missing_logprobs_are_named() -> None:
    params, batch = arrays()
    policy = {"policy": jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)}
    for name, how in (
        ("ref_logprobs", {"kl": kl.plain(kl.k3)}),
        ("sampler_logprobs", {"correction": correction.truncated()}),
    ):
        lacking = to_batch({k: x for k, x in batch.items() if k != name})
        with pytest.raises(ValueError, match=name):
            policy_gradient(bigram_model(), policy, {}, lacking, jax.random.key(0), HYPER, **how)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        constant_mean(0)


# The critic


@pytest.mark.parametrize(
    ("value", "clip", "error", "slope"),
    [
        (3.0, None, 2.0, 2.0),
        (1.2, 0.5, 0.02, 0.2),  # inside the clip
        (3.0, 0.5, 2.0, 2.0),  # beyond it and further from the target: the error itself
        (0.9, 0.5, 0.005, -0.1),
        (-1.0, 0.5, 2.0, -2.0),
        (1.1, 0.05, 0.005, 0.1),  # beyond the clip, and the clipped value is nearer
    ],
)
def test_squared_error_by_hand(value: float, clip: float | None, error: float, slope: float) -> None:
    f = lambda v: squared_error(v, jnp.array([1.0]), jnp.array([1.0]), clip=clip)[0][0]  # noqa: E731
    got, grad = jax.value_and_grad(f)(jnp.array([value]))
    np.testing.assert_allclose((got, grad[0]), (error, slope), rtol=1e-4)


def test_a_clipped_value_that_overshot_gets_no_gradient() -> None:
    """V went from 0 to 1 at once, its target: held at 0.5 the error is 1/8, and it does not depend on V."""
    f = lambda v: squared_error(v, jnp.array([0.0]), jnp.array([1.0]), clip=0.5)[0][0]  # noqa: E731
    got, grad = jax.value_and_grad(f)(jnp.array([1.0]))
    assert (float(got), float(grad[0])) == (0.125, 0.0)


def test_value_loss_reads_the_state_before_each_token() -> None:
    _, batch = arrays()
    rng = np.random.default_rng(4)
    old, target, values = rng.normal(size=(3, 2, 8))
    full = to_batch(batch | {"old_values": old, "returns": target})
    params = {"value": jnp.asarray(values, jnp.float32)}
    loss = partial(value_loss, lambda p, b: p["value"])
    out = means(reduce_terms(*loss(params, {}, full, jax.random.key(0), {"value_coef": 0.5, "value_clip": 0.3})))
    want = weight = 0.0
    for row, ts in samples():
        for t in ts:
            v, o, r, w = values[row, t - 1], old[row, t], target[row, t], batch["weights"][row, t]
            want += w * 0.5 * max((v - r) ** 2, (o + np.clip(v - o, -0.3, 0.3) - r) ** 2)
            weight += w
    np.testing.assert_allclose(out["value_error"], want / weight, rtol=1e-5)
    np.testing.assert_allclose(out["loss"], 0.5 * want / weight, rtol=1e-5)
    with pytest.raises(ValueError, match="needs the batch's returns"):
        loss(params, {}, to_batch(batch), jax.random.key(0), {})


def test_joined_losses_keep_their_names_apart() -> None:
    one = lambda name: lambda *_: ({name: Term(jnp.ones(2), jnp.ones(2))}, {})  # noqa: E731
    terms, _ = joined(one("a"), one("b"))({}, {}, None, jax.random.key(0), {})
    assert set(terms) == {"a", "b"}
    with pytest.raises(ValueError, match=r"\['a'\]"):
        joined(one("a"), one("a"))({}, {}, None, jax.random.key(0), {})


def test_reinforce_plus_plus_is_the_policy_gradient_over_the_batchs_deviation() -> None:
    """A batch that holds every action by its probability: whitening only divides by the deviation of the rewards."""
    counts = [5, 3, 2]
    actions = np.repeat(range(3), counts)
    p = np.asarray(counts) / 10
    advantages = returns.reinforce_plus_plus(jnp.asarray(REWARDS[actions], jnp.float32), jnp.ones((10, 1)), eps=0.0)
    f = lambda theta: jnp.mean(advantages[:, 0] * jax.nn.log_softmax(theta)[actions])  # noqa: E731
    got = jax.grad(f)(jnp.log(jnp.asarray(p, jnp.float32)))
    deviation = np.sqrt(p @ (REWARDS - p @ REWARDS) ** 2)
    np.testing.assert_allclose(got, p * (REWARDS - p @ REWARDS) / deviation, rtol=1e-4, atol=1e-6)
