"""The real model on 8 devices computes what it computes on one, and the partitioner never gives up on it."""

import math
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _aot import collectives
from jax.experimental.compilation_cache import compilation_cache

from jaxpost import sharding
from jaxpost.losses.supervised import cross_entropy
from jaxpost.models.config import BlockConfig, ModelConfig, RopeConfig, StackConfig
from jaxpost.models.table import axes_tree
from jaxpost.models.transformer import build_model
from jaxpost.types import TokenBatch

COMPLAINT = "Involuntary full rematerialization"

TINY = ModelConfig(
    family="llama",
    vocab_size=512,
    width=32,
    mlp_width=48,
    heads=4,
    kv_heads=2,
    head_dim=8,
    stacks=(StackConfig(repeats=2, period=(BlockConfig(rope=RopeConfig()),)),),
    max_positions=64,
)
MODELS = {"tied": TINY, "untied": replace(TINY, tie_embeddings=False)}
MESHES = {
    "data2_fsdp2_tensor2": {"data": 2, "fsdp": 2, "tensor": 2},
    "tensor4": {"data": 2, "tensor": 4},  # more tensor shards than key/value heads
    "seq2": {"fsdp": 4, "seq": 2},
}


@contextmanager
def compiled_afresh():
    """The partitioner speaks only while it compiles: a program out of the cache is silent."""
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # jax asks once whether there is a cache, and remembers
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()


def packed_batch(rows=8, length=16):
    rng = np.random.default_rng(0)
    segments = np.where(np.arange(length) < 6, 1, np.where(np.arange(length) < 13, 2, 0)) + np.zeros((rows, 1), int)
    positions = np.where(segments == 2, np.arange(length) - 6, np.arange(length))
    return TokenBatch(
        rng.integers(0, 64, (rows, length), dtype=np.int32),
        positions.astype(np.int32),
        segments.astype(np.int32),
        (rng.random((rows, length)) < 0.7).astype(np.float32),
        np.arange(rows, dtype=np.int32),
    )


def moves_the_table(collective, config):
    """Whether as much as the whole embedding (or head) or its gradient reaches a device: by far the largest arrays."""
    return math.prod(collective.shape) >= config.vocab_size * config.width


def loss_of(model, params, batch):
    terms, _ = cross_entropy(model, {"policy": params}, {}, batch, jax.random.key(0), {}, chunk_tokens=32)
    return terms["cross_entropy"].value


@cache
def on_one_device(model_name):
    """Parameters, loss and gradients without any mesh."""
    model = build_model(MODELS[model_name], remat="full")
    params = model.init(jax.random.key(1))
    return params, *jax.jit(jax.value_and_grad(partial(loss_of, model)))(params, packed_batch())


@pytest.mark.parametrize(
    ("model_name", "mesh_name"),
    [
        ("tied", "data2_fsdp2_tensor2"),
        ("untied", "data2_fsdp2_tensor2"),
        ("tied", "tensor4"),
        ("untied", "seq2"),
    ],
)
def test_gradients_equal_one_device(model_name, mesh_name, capfd):
    config, mesh, batch = MODELS[model_name], sharding.make_mesh(MESHES[mesh_name]), packed_batch()
    params, expected_loss, expected = on_one_device(model_name)
    many = build_model(config, sharding.make_constrain(mesh), remat="full", mesh=mesh)
    places = sharding.param_shardings(axes_tree(many.table), mesh, params, report=lambda _: None)
    capfd.readouterr()
    step = jax.jit(jax.value_and_grad(sharding.pinned(partial(loss_of, many), places)), out_shardings=(None, places))
    args = jax.device_put(params, places), sharding.to_global(batch, mesh)
    with compiled_afresh() if "tensor2" in mesh_name else nullcontext():
        program = step.lower(*args).compile()
    loss, grads = program(*args)
    assert COMPLAINT not in capfd.readouterr().err
    assert not [c for c in collectives(program.as_text()) if moves_the_table(c, config)]
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(grads), strict=True):
        error = np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(a)
        assert error < 1e-5, (jax.tree_util.keystr(path), error)


def test_the_checks_see_a_table_that_moves(capfd):
    """A lookup in the whole table is seen to move it; older partitioners complain of one in a table split both ways."""
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    shape = (TINY.vocab_size, TINY.width)
    table = jax.device_put(jnp.zeros(shape), jax.NamedSharding(mesh, sharding.spec(("vocab", "embed"), mesh=mesh)))
    tokens = sharding.to_global(np.zeros((8, 16), np.int32), mesh)
    constrain = sharding.make_constrain(mesh)
    with compiled_afresh():
        plain = jax.jit(lambda w, t: constrain(w[t], ("batch", "length", "act_embed"))).lower(table, tokens).compile()
        whole = jax.jit(lambda w, t: constrain(w, (None, None))[t]).lower(table, tokens).compile()
    if jax.__version_info__ < (0, 11):
        assert COMPLAINT in capfd.readouterr().err
    assert [c for c in collectives(whole.as_text()) if moves_the_table(c, TINY)]
    assert not [c for c in collectives(plain.as_text()) if moves_the_table(c, TINY)]
