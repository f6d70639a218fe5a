"""Rows that are there for a batch's shape alone: leaving them uncomputed changes nothing; and what `rescore` says."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_online import VOCAB, first_table, log_policy, table_model

from jaxpost import sharding
from jaxpost.losses import rescore
from jaxpost.losses.aggregate import sequence_mean
from jaxpost.losses.policy import policy_gradient
from jaxpost.rl.rows import Answer, Packed, RowPlan, pack
from jaxpost.train.step import init_state, make_train_step
from jaxpost.types import RolloutBatch

HYPER = {"clip_low": 0.2, "clip_high": 0.2, "entropy_coef": 0.1, "temperature": 0.7}
SAMPLES, MOST = 4, 3
QUICK = {"xla_backend_optimization_level": 0}


def rows(pieces: int, per_piece: int, groups: int = 2, share: bool = True) -> Packed:
    """A few groups in rows that are mostly empty."""
    rng = np.random.default_rng(1)
    found = [
        [Answer((4,), rng.integers(0, VOCAB, n).tolist(), [1.0] * n) for n in rng.integers(1, MOST + 1, SAMPLES)]
        for _ in range(groups)
    ]
    plan = RowPlan.make(groups=pieces * per_piece, samples=SAMPLES, prompt=2, answer=MOST, piece_rows=per_piece)
    assert plan.pieces == pieces
    packed = pack(found, plan)
    advantages = packed.spread(rng.normal(size=(len(packed.places), MOST)).astype(np.float32))
    old = packed.spread(rng.normal(-1.6, 0.2, (len(packed.places), MOST)).astype(np.float32))
    return Packed(packed.batch._replace(advantages=advantages, old_logprobs=old), packed.places, plan)


def gradient(batch: RolloutBatch, pieces: int, skip_empty: bool, mesh: Any = None) -> tuple[Any, dict[str, Any]]:
    """A step's gradient and metrics."""
    rule = lambda optimizer, grads, state, **_: (grads, state.opt_state)  # noqa: E731
    loss = partial(policy_gradient, table_model(), aggregate=sequence_mean, chunk_tokens=64)
    step = make_train_step(loss, optax.identity(), num_microbatches=pieces, skip_empty=skip_empty, update_rule=rule)
    state = init_state({"policy": {"table": {"kernel": jnp.asarray(first_table())}}}, optax.identity())
    if mesh is not None:
        batch, state = (
            jax.device_put(batch, sharding.batch_sharding(mesh)),
            jax.device_put(state, sharding.replicated(mesh)),
        )
    hyper = {name: jnp.float32(value) for name, value in HYPER.items()}
    state, metrics = jax.jit(step, compiler_options=QUICK)(state, {}, batch, jax.random.key(0), hyper)
    return np.asarray(state.params["policy"]["table"]["kernel"]), metrics


@pytest.mark.parametrize(("pieces", "per_piece", "devices"), [(1, 4, 1), (2, 2, 1), (4, 1, 1), (4, 8, 8)])
def test_empty_pieces_cost_nothing_and_change_nothing(pieces: int, per_piece: int, devices: int) -> None:
    batch = rows(pieces, per_piece).batch
    mesh = sharding.make_mesh({"fsdp": devices}) if devices > 1 else None
    live = (batch.weights != 0).any(axis=1).reshape(-1, pieces).any(axis=0)
    assert pieces == 1 or not live.all(), "some pieces are empty"
    (grad, metrics), (plain, told) = (gradient(batch, pieces, skip, mesh) for skip in (True, False))
    whole, _ = gradient(batch, 1, False)
    assert np.linalg.norm(whole) > 0.01
    for other in (plain, whole):
        assert np.linalg.norm(grad - other) < 2e-6 * np.linalg.norm(other)
    assert metrics.keys() == told.keys()
    for name, value in told.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-6, atol=1e-7, err_msg=name)


def test_a_batch_of_nothing_is_skipped() -> None:
    batch = rows(4, 1).batch
    _, metrics = gradient(batch._replace(weights=np.zeros_like(batch.weights)), 4, skip_empty=True)
    assert (metrics["skipped"], metrics["empty"], metrics["loss"], metrics["grad_norm"]) == (1, 1, 0, 0)


def test_rescored_log_probabilities_are_the_policys_and_the_losss_own() -> None:
    packed = rows(4, 1)
    params = {"table": {"kernel": jnp.asarray(first_table())}}
    functions = [lambda params, _, *rest: rescore.logprobs_and_entropy(table_model(), params, *rest)]
    run = lambda pieces: jax.jit(  # noqa: E731
        lambda batch: rescore.rescore(functions, params, {}, batch, HYPER, pieces=pieces)["logprobs"],
        compiler_options=QUICK,
    )(packed.batch)
    found = {pieces: np.asarray(run(pieces)) for pieces in (1, 2, 4)}
    for place in packed.places:
        row = packed.batch.tokens[place.row]
        start, tokens = place.start, [4]
        while packed.batch.weights[place.row, start]:
            want = log_policy(first_table(), tokens, HYPER["temperature"])[row[start]]
            np.testing.assert_allclose([f[place.row, start] for f in found.values()], want, rtol=1e-5)
            tokens.append(int(row[start]))
            start += 1
            if (
                start == len(row)
                or packed.batch.segment_ids[place.row, start] != packed.batch.segment_ids[place.row, start - 1]
            ):
                break
    np.testing.assert_array_equal(found[1], found[4])
    assert np.count_nonzero(found[1]) == np.count_nonzero(packed.batch.weights)
    _, metrics = gradient(packed.batch._replace(old_logprobs=found[4], sampler_logprobs=found[4]), 2, skip_empty=True)
    assert abs(metrics["ratio"] - 1) < 1e-6
    assert abs(metrics["old_kl"]) < 1e-6
    assert metrics["clip_fraction"] == 0
    assert metrics["sampler_gap"] == 0
