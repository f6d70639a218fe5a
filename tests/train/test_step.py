"""The train step: exact means, guards, keys by row, errors. Linear models, so that closed forms exist."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpost.metrics.terms import add, means
from jaxpost.train.gradients import split_microbatches
from jaxpost.train.step import (
    GUARD_HISTORY,
    ema_update,
    init_state,
    make_eval_step,
    make_train_step,
    row_keys,
)
from jaxpost.types import Term, TrainState

KEY = jax.random.key(0)


class Rows(NamedTuple):
    x: jax.Array
    weight: jax.Array
    row_ids: jax.Array


def rows(x: Any, weight: Any = None) -> Rows:
    x = jnp.asarray(x, jnp.float32)
    weight = jnp.ones_like(x) if weight is None else jnp.asarray(weight, jnp.float32)
    return Rows(x, weight, jnp.arange(len(x)))


def square(params: Any, frozen: Any, batch: Rows, key: Any, hyper: Any) -> Any:
    """Gradient at w: 2 (w - weighted mean of x)."""
    value = (params["w"] - batch.x) ** 2
    return {"square": Term(value, batch.weight)}, {"x": Term(batch.x, batch.weight)}


def sgd_step(loss: Any = square, lr: float = 0.5, **how: Any) -> Any:
    tx = optax.sgd(lr)
    return jax.jit(make_train_step(loss, tx, **how)), init_state({"w": jnp.zeros(())}, tx, ema="post_update" in how)


def test_ragged_microbatches_give_the_whole_mean() -> None:
    """Two pieces of total weight 1 and 7: a mean of means would weigh them alike."""
    batch = rows([0.0, 8.0, 0.0, 8.0], [0.5, 3.0, 0.5, 4.0])
    for count in (1, 2, 4):
        step, state = sgd_step(num_microbatches=count)
        state, metrics = step(state, {}, batch, KEY, {})
        np.testing.assert_allclose(state.params["w"], 7.0)  # 56 / 8
        np.testing.assert_allclose([metrics["loss"], metrics["square"], metrics["x"]], [56.0, 56.0, 7.0])
        np.testing.assert_allclose([metrics["weight/square"], metrics["grad_norm"]], [8.0, 14.0])


def test_several_terms_with_coefficients() -> None:
    def loss(params: Any, frozen: Any, batch: Rows, key: Any, hyper: Any) -> Any:
        first = Term((params["w"] - batch.x) ** 2, batch.weight)
        second = Term(params["w"] * jnp.ones(len(batch.x)), jnp.ones(len(batch.x)), coef=hyper["beta"])
        nothing = Term(params["w"] * jnp.ones(len(batch.x)), jnp.zeros(len(batch.x)), coef=5.0)
        return {"first": first, "second": second, "nothing": nothing}, {}

    for count in (1, 2):
        step, state = sgd_step(loss, num_microbatches=count)
        state, metrics = step(state, {}, rows([1.0, 2.0, 3.0, 6.0]), KEY, {"beta": jnp.asarray(4.0)})
        np.testing.assert_allclose(state.params["w"], -0.5 * (2 * (0 - 3.0) + 4.0))  # gradient of both
        np.testing.assert_allclose([metrics["loss"], metrics["first"]], [12.5, 12.5])  # (1 + 4 + 9 + 36) / 4
        assert (metrics["nothing"], metrics["skipped"], metrics["empty"]) == (0, 0, 0)


def test_masked_nan_does_not_reach_the_gradient() -> None:
    """A value that is NaN where its weight is 0 (0 * NaN is NaN) counts nothing."""

    def loss(params: Any, frozen: Any, batch: Rows, key: Any, hyper: Any) -> Any:
        return {"l": Term(jnp.where(batch.x == 0, jnp.nan, (params["w"] - batch.x) ** 2), batch.weight)}, {}

    step, state = sgd_step(loss)
    state, metrics = step(state, {}, rows([2.0, 0.0], [1.0, 0.0]), KEY, {})
    assert (float(state.params["w"]), int(metrics["skipped"])) == (2.0, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_steps_are_skipped_and_counted(bad: float) -> None:
    step, state = sgd_step(lr=0.25)
    state, _ = step(state, {}, rows([4.0, 4.0]), KEY, {})
    before = jax.tree.map(np.asarray, (state.params, state.opt_state))
    for n in (1, 2):
        state, metrics = step(state, {}, rows([bad, 1.0]), KEY, {})
        assert (metrics["skipped"], metrics["nonfinite"], metrics["empty"]) == (1, 1, 0)
        assert (metrics["skips"], metrics["consecutive_skips"]) == (n, n)
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), before)
    assert int(state.step) == 3, "a skipped step counts as a step"
    state, metrics = step(state, {}, rows([4.0, 4.0]), KEY, {})
    assert (metrics["skipped"], metrics["skips"], metrics["consecutive_skips"]) == (0, 2, 0)


def test_an_empty_batch_changes_no_moments() -> None:
    tx = optax.adam(0.1)
    step, state = jax.jit(make_train_step(square, tx)), init_state({"w": jnp.zeros(())}, tx)
    state, _ = step(state, {}, rows([4.0, 4.0]), KEY, {})
    after, metrics = step(state, {}, rows([4.0, 4.0], [0.0, 0.0]), KEY, {})
    assert (metrics["skipped"], metrics["empty"], metrics["loss"]) == (1, 1, 0)
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (state.params, state.opt_state))


def test_spikes_are_skipped_by_a_traced_threshold() -> None:
    """Gradient norms of about 2; a batch 100 times as far is a spike for factor 10, none for factor 1000."""
    step, state = sgd_step(lr=0.0)
    factor = lambda x: {"spike_factor": jnp.asarray(x, jnp.float32)}  # noqa: E731
    _, metrics = step(state, {}, rows([100.0, 100.0]), KEY, factor(10.0))
    assert not metrics["skipped"], "too few steps to judge by"
    for i in range(GUARD_HISTORY):
        state, metrics = step(state, {}, rows([1.0, 1.0 + 0.01 * i]), KEY, factor(10.0))
        assert not metrics["skipped"]
    np.testing.assert_allclose(state.extra["guard"].norm_mean, np.mean([2 + 0.01 * i for i in range(10)]), rtol=1e-5)
    after, metrics = step(state, {}, rows([100.0, 100.0]), KEY, factor(10.0))
    assert (metrics["skipped"], metrics["spike"], metrics["nonfinite"]) == (1, 1, 0)
    np.testing.assert_array_equal(after.extra["guard"].norm_mean, state.extra["guard"].norm_mean)
    _, metrics = step(state, {}, rows([100.0, 100.0]), KEY, factor(1000.0))
    assert metrics["skipped"] == 0
    assert step._cache_size() == 1


def test_noise_by_row_does_not_depend_on_microbatches_or_order() -> None:
    def noisy(params: Any, frozen: Any, batch: Rows, key: Any, hyper: Any) -> Any:
        noise = jax.vmap(jax.random.normal)(row_keys(key, batch.row_ids))
        return {"noisy": Term(params["w"] * noise, batch.weight)}, {}

    batch = rows(np.arange(8))
    want = None
    for count in (1, 2, 8):
        for order in (np.arange(8), np.random.default_rng(0).permutation(8)):
            step, state = sgd_step(noisy, lr=1.0, num_microbatches=count)
            state, _ = step(state, {}, jax.tree.map(lambda x: x[order], batch), KEY, {})  # noqa: B023
            want = state.params["w"] if want is None else want
            np.testing.assert_allclose(state.params["w"], want, rtol=1e-5)
    second, _ = step(state, {}, batch, KEY, {})
    assert abs((second.params["w"] - state.params["w"]) - want) > 1e-3, "each step draws its own noise"


def test_gradients_add_up_in_float32() -> None:
    """Microbatch gradients 1, 1/512, 1/512 ...: a bfloat16 sum would stay at 1."""

    def rule(optimizer: Any, grads: Any, state: TrainState, **_: Any) -> Any:
        assert grads["w"].dtype == jnp.float32
        return {"w": grads["w"].astype(jnp.bfloat16)}, state.opt_state

    def linear(params: Any, frozen: Any, batch: jax.Array, key: Any, hyper: Any) -> Any:
        return {"linear": Term(params["w"] * batch, jnp.ones(1), coef=257.0)}, {}

    step = jax.jit(make_train_step(linear, optax.identity(), num_microbatches=257, update_rule=rule))
    batch = jnp.asarray([1.0] + [2.0**-9] * 256, jnp.bfloat16)
    state, _ = step(init_state({"w": jnp.ones((), jnp.bfloat16)}, optax.identity()), {}, batch, KEY, {})
    np.testing.assert_allclose(state.params["w"].astype(jnp.float32), 1.5, rtol=1e-2)


def test_weights_that_depend_on_params_are_refused() -> None:
    def wrong(params: Any, frozen: Any, batch: Rows, key: Any, hyper: Any) -> Any:
        return {"wrong": Term(batch.x * params["w"], batch.weight * params["w"])}, {}

    step, state = sgd_step(wrong)
    with pytest.raises(ValueError, match=r"must come from the batch alone, but they depend on params\['w'\]"):
        step(state, {}, rows([1.0]), KEY, {})


def test_indivisible_batch() -> None:
    step, state = sgd_step(num_microbatches=4)
    with pytest.raises(ValueError, match="a batch of 6 rows cannot be split into 4 microbatches"):
        step(state, {}, rows(np.ones(6)), KEY, {})
    with pytest.raises(ValueError, match="must lead with the same number of rows"):
        split_microbatches((jnp.ones(4), jnp.ones(())), 2)


def test_names_must_differ() -> None:
    clash = lambda *a: ({"loss": Term(jnp.ones(1), jnp.ones(1))}, {})  # noqa: E731
    step, state = sgd_step(clash)
    with pytest.raises(ValueError, match="used twice"):
        step(state, {}, rows([1.0]), KEY, {})


def test_evaluation_over_batches_is_the_mean_over_all() -> None:
    eval_step, w = jax.jit(make_eval_step(square)), {"w": jnp.asarray(1.0)}
    x, weight = np.asarray([1.0, 2.0, 3.0, 4.0, 9.0]), np.asarray([1.0, 0.0, 2.0, 1.0, 4.0])
    parts = [eval_step(w, {}, rows(x[s], weight[s]), KEY, {}) for s in (slice(0, 2), slice(2, 3), slice(3, 5))]
    out = means(add(add(parts[0], parts[1]), parts[2]))
    np.testing.assert_allclose(out["loss"], (weight * (x - 1) ** 2).sum() / weight.sum(), rtol=1e-6)
    np.testing.assert_allclose(out["x"], (weight * x).sum() / weight.sum(), rtol=1e-6)


def test_moving_average_follows_accepted_updates_only() -> None:
    step, state = sgd_step(lr=0.5, post_update=ema_update(0.9))
    ema, w = 0.0, 0.0
    for x in (4.0, np.nan, 2.0):
        state, _ = step(state, {}, rows([x]), KEY, {})
        if np.isfinite(x):
            w = w - 0.5 * 2 * (w - x)
            ema = 0.9 * ema + 0.1 * w
    np.testing.assert_allclose(state.extra["ema"]["w"], ema, rtol=1e-6)
    np.testing.assert_allclose(state.params["w"], w, rtol=1e-6)
    with pytest.raises(ValueError, match=r"ema_decay must lie in \[0, 1\), got 1.5"):
        ema_update(1.5)


def test_bfloat16_parameters_are_updated_in_float32() -> None:
    from jaxpost.config import AdamWSection, ScheduleSection
    from jaxpost.train.optim import make_optimizer

    tx, _ = make_optimizer(AdamWSection(lr=0.25, schedule=ScheduleSection(kind="constant", warmup=0.0)), 10)
    state = init_state({"w": jnp.zeros((), jnp.bfloat16)}, tx)
    assert {x.dtype for x in jax.tree.leaves(state.opt_state) if jnp.issubdtype(x.dtype, jnp.floating)} == {
        jnp.dtype("float32")
    }
    loss = lambda p, f, batch, k, h: ({"l": Term(batch * p["w"], jnp.ones(2, jnp.bfloat16))}, {})  # noqa: E731
    state, _ = jax.jit(make_train_step(loss, tx))(state, {}, jnp.ones(2, jnp.bfloat16), KEY, {})
    assert state.params["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(state.params["w"].astype(jnp.float32), -0.25, rtol=1e-2)


def test_the_state_can_be_planned_and_donated() -> None:
    tx = optax.adam(0.1)
    params = {"w": jnp.zeros(3)}
    abstract = jax.eval_shape(partial(init_state, optimizer=tx, ema=True), params)
    assert isinstance(abstract, TrainState)
    assert abstract.extra["ema"]["w"].shape == (3,)
    state = init_state(params, tx, ema=True)
    loss = lambda p, f, b, k, h: ({"l": Term(p["w"] * b, jnp.ones(3))}, {})  # noqa: E731
    step = jax.jit(make_train_step(loss, tx, post_update=ema_update(0.5)), donate_argnums=0)
    state, _ = step(state, {}, jnp.ones(3), KEY, {})
    state, _ = step(state, {}, jnp.ones(3), KEY, {})
    assert int(state.step) == 2
