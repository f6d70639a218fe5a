"""Losses that couple rows: the gradient over microbatches is that of the whole batch, against its closed form."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpost.metrics.terms import means
from jaxpost.train.step import init_state, make_eval_step, make_train_step
from jaxpost.types import Coupled, Term

KEY = jax.random.key(0)
X = jnp.asarray([3.0, -1.0, 0.5, 2.0, 4.0, -2.0])
GOAL = np.asarray([-3.0, -1.0, 0.0, 1.0, 2.0, 5.0])


def stats(params: Any, frozen: Any, batch: Any, key: Any, hyper: Any) -> Any:
    return {
        "y": params["w"] * batch + params["b"],
        "row": (10 * batch).astype(jnp.int32),
        "weight": jnp.ones_like(batch),
    }


def outer(stats: Any, hyper: Any, memory: Any) -> Any:
    """The squared distance of the sorted rows from a given list: mean_i (y_(i) - goal_i)^2."""
    order = jnp.argsort(stats["y"])
    value = (stats["y"][order] - jnp.asarray(GOAL, jnp.float32)) ** 2
    seen = {"steps": memory["steps"] + 1} if memory else memory
    return {"sorted": Term(value, stats["weight"])}, {"row": Term(stats["row"].astype(jnp.float32), 1.0)}, seen


def run(loss: Any, batch: Any = X, *, w: float = 0.5, memory: Any = (), **how: Any) -> tuple[Any, Any]:
    """A step whose new parameters are the gradients."""
    rule = lambda optimizer, grads, state, **_: (grads, state.opt_state)  # noqa: E731
    step = jax.jit(make_train_step(loss, optax.identity(), update_rule=rule, **how))
    state = init_state({"w": jnp.asarray(w), "b": jnp.asarray(1.0)}, optax.identity(), memory=memory)
    return step(state, {}, batch, KEY, {})


def closed_form() -> tuple[float, float, float]:
    """Loss and its derivatives by w and b: each row meets the goal of its place in the whole batch's order."""
    x = np.asarray(X, np.float64)
    place = np.argsort(np.argsort(x))
    off = 0.5 * x + 1.0 - GOAL[place]
    return float(np.mean(off**2)), float(np.mean(2 * off * x)), float(np.mean(2 * off))


@pytest.mark.parametrize("skip_empty", [False, True])
@pytest.mark.parametrize("microbatches", [1, 2, 3, 6])
def test_gradient_is_the_whole_batchs(microbatches: int, skip_empty: bool) -> None:
    state, metrics = run(Coupled(stats, outer), num_microbatches=microbatches, skip_empty=skip_empty)
    value, by_w, by_b = closed_form()
    np.testing.assert_allclose([metrics["loss"], state.params["w"], state.params["b"]], [value, by_w, by_b], rtol=1e-6)
    assert float(metrics["row"]) == pytest.approx(float(jnp.mean(10 * X)))
    assert float(metrics["weight/sorted"]) == 6


def test_sorting_each_microbatch_would_be_another_loss() -> None:
    """What the two parts are for: sorted within halves the same rows have another gradient."""
    halves = [float(np.mean((np.sort(0.5 * np.asarray(X)[i::2] + 1) - GOAL[i::2]) ** 2)) for i in range(2)]
    assert abs(np.mean(halves) - closed_form()[0]) > 0.1


def test_rows_without_a_share_in_the_loss_are_skipped() -> None:
    """With `skip_empty` a microbatch that the loss does not read may hold anything."""

    def first_half(all_: Any, hyper: Any, memory: Any) -> Any:
        read = jnp.arange(6) % 2 == 0  # the first of two microbatches: rows 0, 2, 4
        return {"some": Term(jnp.where(read, all_["y"], 0.0), read.astype(jnp.float32))}, {}, memory

    state, _ = run(Coupled(stats, first_half), num_microbatches=2, skip_empty=True)
    assert float(state.params["w"]) == pytest.approx(float(jnp.mean(X[::2])))


def test_weights_must_not_depend_on_params() -> None:
    def weighted(all_: Any, hyper: Any, memory: Any) -> Any:
        return {"bad": Term(all_["y"], all_["y"])}, {}, memory

    with pytest.raises(ValueError, match=r"weights of loss terms must come from the batch alone.*params\['b'\]"):
        run(Coupled(stats, weighted))


def test_memory_goes_from_step_to_step_and_not_past_a_skipped_one() -> None:
    memory = {"steps": jnp.zeros(())}
    loss = Coupled(stats, outer, memory)
    step = jax.jit(make_train_step(loss, optax.identity()))
    state = init_state({"w": jnp.asarray(0.5), "b": jnp.asarray(1.0)}, optax.identity(), memory=memory)
    for batch, want in ((X, 1), (X, 2), (X * jnp.nan, 2), (X, 3)):
        state, metrics = step(state, {}, batch, KEY, {})
        assert int(state.extra["memory"]["steps"]) == want
        assert int(metrics["nonfinite"]) == int(jnp.isnan(batch[0]))


def test_evaluation_takes_each_batch_by_itself() -> None:
    evaluate = make_eval_step(Coupled(stats, outer))
    out = means(evaluate({"w": jnp.asarray(0.5), "b": jnp.asarray(1.0)}, {}, X, KEY, {}))
    assert float(out["sorted"]) == pytest.approx(closed_form()[0])
