"""Schedules against closed forms; Muon against SVD; AdamW, Lion and Adafactor against their papers' formulas."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpost.config import AdafactorSection, AdamWSection, LionSection, MuonSection, ScheduleSection
from jaxpost.metrics.terms import Term
from jaxpost.ops import platform
from jaxpost.train.optim import clip_by_global_norm, hold, make_optimizer, make_schedule, scale_by_adam, scale_parts
from jaxpost.train.step import init_state, make_train_step

STEPS = 50
CONSTANT = ScheduleSection(kind="constant", warmup=0.0)


def params(seed: int = 0) -> dict[str, Any]:
    """A model's kinds of parameters: embedding, stacked kernels, stacked norm scales and biases, final norm, head."""
    rng = np.random.default_rng(seed)
    new = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    block = {
        "q_proj": {"kernel": new(3, 6, 4), "bias": new(3, 4)},
        "down_proj": {"kernel": new(3, 5, 8)},
        "attn_norm": {"scale": new(3, 6)},
    }
    return {
        "policy": {
            "embed": {"table": new(9, 6)},
            "stacks": {"0": {"0": block}},
            "final_norm": {"scale": new(6)},
            "lm_head": {"kernel": new(6, 9)},
        }
    }


def run(section: Any, grads: list[Any], start: Any = None) -> list[Any]:
    """Parameters after each step."""
    tx, _ = make_optimizer(section, STEPS)
    state = init_state(params() if start is None else start, tx)
    out = []

    @jax.jit
    def update(state: Any, grads: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = tx.update(grads, state.opt_state, state.params, step=state.step)
        return state._replace(
            step=state.step + 1, params=jax.tree.map(jnp.add, state.params, updates), opt_state=opt_state
        )

    for g in grads:
        state = update(state, g)
        out.append(state.params)
    return out


def by_path(tree: Any) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x) for p, x in jax.tree.leaves_with_path(tree)
    }


# Schedules


def closed_form(kind: str, t: int, warmup: int, decay: int, final: float) -> float:
    """The factor at step t of STEPS, written out branch by branch."""
    last = STEPS - 1
    if t < warmup:
        return (t + 1) / (warmup + 1)
    if kind == "constant" or (kind == "wsd" and t <= last - decay):
        return 1.0
    start = last - decay if kind == "wsd" else warmup
    u = (t - start) / (last - start)
    if kind == "cosine":
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * u))
    return 1 - (1 - final) * u


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear", "wsd"])
@pytest.mark.parametrize(("warmup", "decay"), [(0.0, 0.2), (0.1, 0.2), (7.0, 12.0)])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_schedules(kind: Any, warmup: float, decay: float, final: float) -> None:
    section = ScheduleSection(kind=kind, warmup=warmup, decay=decay, final=final)
    w, d = (round(x * STEPS) if x < 1 else round(x) for x in (warmup, decay))
    got = jax.jit(jax.vmap(make_schedule(section, STEPS)))(jnp.arange(STEPS))
    np.testing.assert_allclose(got, [closed_form(kind, t, w, d, final) for t in range(STEPS)], rtol=1e-5, atol=1e-6)


def test_a_run_of_one_step_learns() -> None:
    for kind in ("constant", "cosine", "linear", "wsd"):
        assert make_schedule(ScheduleSection(kind=kind), 1)(0) > 0


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (ScheduleSection(warmup=60.0), "60 warm-up and 0 decay steps exceed the run's 50 steps"),
        (ScheduleSection(kind="wsd", warmup=0.5, decay=30.0), "25 warm-up and 30 decay steps exceed"),
        (ScheduleSection(warmup=-1.0), "optim.schedule.warmup must not be negative"),
    ],
)
def test_schedules_that_do_not_fit(section: ScheduleSection, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_schedule(section, STEPS)


def test_a_skipped_update_does_not_delay_the_schedule() -> None:
    section = AdamWSection(lr=0.1, schedule=ScheduleSection(kind="linear", warmup=0.0), clip_norm=None, b1=0.0, b2=0.0)
    tx, lr_at = make_optimizer(section, 5)
    loss = lambda p, f, batch, k, h: ({"l": Term(p["w"] * batch, jnp.ones(1))}, {})  # noqa: E731
    step, state = jax.jit(make_train_step(loss, tx)), init_state({"w": jnp.zeros(())}, tx)
    moved = []
    for x in (1.0, np.nan, np.nan, 1.0, 1.0):
        new, _ = step(state, {}, jnp.full(1, x), jax.random.key(0), {})
        moved.append(float(state.params["w"] - new.params["w"]))
        state = new
    np.testing.assert_allclose([lr_at(t) for t in range(5)], [0.1, 0.075, 0.05, 0.025, 0.0], atol=1e-7)
    np.testing.assert_allclose(moved, [0.1, 0, 0, 0.025, 0.0], atol=1e-6)


# Optimisers


def ones_like(tree: Any, value: float = 1.0) -> Any:
    return jax.tree.map(lambda x: jnp.full_like(x, value), tree)


def test_adamw_is_its_formula() -> None:
    b1, b2, eps, lr, wd = 0.8, 0.9, 1e-4, 0.01, 0.5
    section = AdamWSection(lr=lr, b1=b1, b2=b2, eps=eps, weight_decay=wd, clip_norm=None, schedule=CONSTANT)
    grads = [params(seed) for seed in (1, 2, 3)]
    got = by_path(run(section, grads)[-1])
    for path, start in by_path(params()).items():
        p, m, v = start.astype(np.float64), 0.0, 0.0
        decay = wd if path.endswith(("kernel", "table")) else 0.0
        for t, g in enumerate(grads, 1):
            g = by_path(g)[path].astype(np.float64)
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            p = p - lr * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + decay * p)
        np.testing.assert_allclose(got[path], p, rtol=1e-5, atol=1e-6, err_msg=path)


def test_lion_is_its_formula() -> None:
    section = LionSection(lr=0.01, b1=0.9, b2=0.95, weight_decay=0.1, clip_norm=None, schedule=CONSTANT)
    grads = [params(seed) for seed in (1, 2)]
    got = by_path(run(section, grads)[-1])
    for path, p in by_path(params()).items():
        m, decay = 0.0, 0.1 if path.endswith(("kernel", "table")) else 0.0
        for g in (by_path(g)[path] for g in grads):
            p, m = p - 0.01 * (np.sign(0.9 * m + 0.1 * g) + decay * p), 0.95 * m + 0.05 * g
        np.testing.assert_allclose(got[path], p, rtol=1e-5, atol=1e-6, err_msg=path)


def test_adafactor_factors_large_matrices_and_clips_updates() -> None:
    """First step on a matrix: g / sqrt(row mean x column mean / mean of g^2), then RMS at most 1 (1804.04235)."""
    rng = np.random.default_rng(0)
    g = rng.normal(size=(2, 130, 140)) * rng.uniform(0.1, 3.0, (2, 130, 1))
    section = AdafactorSection(lr=0.1, clip_norm=None, schedule=CONSTANT)
    start = {"policy": {"stacks": {"q_proj": {"kernel": jnp.zeros((2, 130, 140))}}}}
    grads = jax.tree.map(lambda _: jnp.asarray(g, jnp.float32), start)
    sizes = [x.size for x in jax.tree.leaves(init_state(start, make_optimizer(section, STEPS)[0]).opt_state)]
    assert max(sizes) == 2 * 140, "second moments are rows and columns, not a matrix"
    rows, columns = (g * g).mean(2, keepdims=True), (g * g).mean(1, keepdims=True)
    update = g / np.sqrt(rows * columns / rows.mean(1, keepdims=True))
    update /= max(1.0, np.sqrt((update**2).mean()))
    got = run(section, [grads], start)[0]["policy"]["stacks"]["q_proj"]["kernel"]
    np.testing.assert_allclose(got, -0.1 * update, rtol=1e-4, atol=1e-5)


def test_muon_orthogonalises_each_hidden_matrix_of_a_stack() -> None:
    """The update's singular vectors are the gradient's, its singular values lie around 1, matrix by matrix."""
    section = MuonSection(lr=1.0, adam_lr=0.5, clip_norm=None, schedule=CONSTANT)
    grads = params(7)
    moved = {k: by_path(params())[k] - x for k, x in by_path(run(section, [grads])[0]).items()}
    for path, update in moved.items():
        g = by_path(grads)[path]
        if path.startswith("policy/stacks") and path.endswith("kernel"):
            for layer in range(3):
                u, _, vt = np.linalg.svd(g[layer], full_matrices=False)
                shape_factor = math.sqrt(max(1, g.shape[2] / g.shape[1]))
                core = u.T @ update[layer] @ vt.T / shape_factor
                np.testing.assert_allclose(core - np.diag(np.diag(core)), 0, atol=2e-2)
                assert (np.diag(core) > 0.6).all()
                assert (np.diag(core) < 1.3).all()
        else:  # Adam's first step is lr * sign(g)
            np.testing.assert_allclose(update, 0.5 * np.sign(g), rtol=1e-3, err_msg=path)


def test_muon_decays_matrices_only_each_at_its_own_rate() -> None:
    section = MuonSection(lr=0.1, adam_lr=0.01, weight_decay=0.5, clip_norm=None, schedule=CONSTANT)
    got = by_path(run(section, [ones_like(params(), 0.0)])[0])
    for path, start in by_path(params()).items():
        rate = 0.0 if path.endswith(("bias", "scale")) else 0.1 if "stacks" in path else 0.01
        np.testing.assert_allclose(got[path], start * (1 - 0.5 * rate), rtol=1e-5, err_msg=path)


@pytest.mark.parametrize("section_type", [AdamWSection, AdafactorSection, LionSection, MuonSection])
def test_every_optimiser_lowers_a_quadratic(section_type: Any) -> None:
    tx, _ = make_optimizer(section_type(lr=0.05, schedule=CONSTANT), STEPS)
    loss = lambda p, f, batch, k, h: (  # noqa: E731
        {"l": Term(sum(jnp.sum(x**2) for x in jax.tree.leaves(p)) * batch, jnp.ones(1))},
        {},
    )
    step, state = jax.jit(make_train_step(loss, tx)), init_state(params(), tx)
    losses = []
    for _ in range(20):
        state, metrics = step(state, {}, jnp.ones(1), jax.random.key(0), {})
        losses.append(float(metrics["loss"]))
    assert all(np.diff(losses) < 0)


def test_clipping_scales_the_whole_gradient() -> None:
    section = AdamWSection(lr=1.0, b1=0.0, b2=0.0, eps=1.0, clip_norm=0.5, schedule=CONSTANT)
    grads = params(3)
    norm = float(optax.tree.norm(grads))
    got = by_path(run(section, [grads])[0])
    for path, start in by_path(params()).items():
        g = by_path(grads)[path] * 0.5 / norm
        np.testing.assert_allclose(got[path], start - g / (np.abs(g) + 1.0), rtol=1e-4, atol=1e-6)


@jax.numpy_dtype_promotion("standard")  # optax counts in integers
def test_a_part_of_the_parameters_has_a_learning_rate_of_its_own():
    """As two optimisers, each on its part: AdamW with decay, whose clip reads the norm of all gradients."""
    both = {"policy": params(1)["policy"], "critic": params(2)["policy"]}
    grads = jax.tree.map(lambda x: 0.1 * x + 0.01, both)
    section = lambda lr: AdamWSection(lr=lr, weight_decay=0.1, clip_norm=None, schedule=CONSTANT)  # noqa: E731
    joint = scale_parts(make_optimizer(section(1e-3), STEPS)[0], {"critic": 5.0})
    state, found = joint.init(both), []
    for step in range(3):
        updates, state = joint.update(grads, state, both, step=jnp.int32(step))
        found.append(updates)
    for name, lr in (("policy", 1e-3), ("critic", 5e-3)):
        alone, _ = make_optimizer(section(lr), STEPS)
        state = alone.init(both[name])
        for step in range(3):
            wanted, state = alone.update(grads[name], state, both[name], step=jnp.int32(step))
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found[step][name], wanted)


@pytest.mark.parametrize("machine", ["cpu", "tpu"])
def test_adam_and_clipping_are_optaxs_on_every_platform(machine: Any) -> None:
    ours = optax.chain(clip_by_global_norm(1.0), scale_by_adam(0.8, 0.9, 1e-3))
    theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(0.8, 0.9, 1e-3))
    states = [tx.init(params()) for tx in (ours, theirs)]
    with platform.target(machine), jax.numpy_dtype_promotion("standard"):
        for seed in range(4):
            grads = optax.tree.scale(0.2 * seed, params(seed))  # the first is zero, some are clipped
            updates, states[0] = ours.update(grads, states[0])
            wanted, states[1] = theirs.update(grads, states[1])
            for got, want in zip(
                jax.tree.leaves((updates, states[0])), jax.tree.leaves((wanted, states[1])), strict=True
            ):
                np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("machine", ["cpu", "tpu"])
@pytest.mark.parametrize("section_type", [AdamWSection, AdafactorSection, LionSection, MuonSection])
def test_a_skipped_step_leaves_every_optimiser_as_it_was(section_type: Any, machine: Any) -> None:
    tx, _ = make_optimizer(section_type(schedule=CONSTANT), STEPS)
    bad = jax.tree.map(lambda x: x * jnp.nan, params(1))
    with platform.target(machine), jax.numpy_dtype_promotion("standard"):
        for state in (tx.init(params()), tx.update(params(2), tx.init(params()), params(), step=0)[1]):
            for skip, same in ((True, True), (False, False)):
                new = tx.update(bad, state, params(), step=1, skip=jnp.asarray(skip))[1]
                new = hold(jnp.asarray(skip), state, new)
                pairs = zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True)
                assert all(np.array_equal(a, b) for a, b in pairs) is same
