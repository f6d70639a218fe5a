"""Trains a tiny model from this process's rows of each batch; alone, or as one process of a group.

`python _worker.py FOLDER '[{"fsdp": 8}]'`, with the variables that `sharding.initialize_distributed` reads, writes
all parameters that this process ends with into FOLDER/<mesh>_<process>.npz.
"""

from __future__ import annotations

import json
import sys
from functools import partial

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxpost import sharding
from jaxpost.config import AdamWSection
from jaxpost.losses.supervised import cross_entropy
from jaxpost.models.config import BlockConfig, ModelConfig, RopeConfig, StackConfig
from jaxpost.models.table import abstract_params, axes_tree, flatten, nest
from jaxpost.models.transformer import build_model
from jaxpost.train.optim import make_optimizer
from jaxpost.train.step import init_state, make_train_step
from jaxpost.types import TokenBatch

ROWS, LENGTH, STEPS = 16, 16, 3
TINY = ModelConfig(
    family="llama",
    vocab_size=64,
    width=32,
    mlp_width=48,
    heads=8,
    kv_heads=8,
    head_dim=4,
    stacks=(StackConfig(repeats=2, period=(BlockConfig(rope=RopeConfig()),)),),
    max_positions=64,
)


def global_batch(step: int) -> TokenBatch:
    """The whole batch of a step; rows have ragged lengths and weights."""
    rng = np.random.default_rng(step)
    inside = np.arange(LENGTH) < rng.integers(4, LENGTH + 1, (ROWS, 1))
    return TokenBatch(
        rng.integers(0, TINY.vocab_size, (ROWS, LENGTH), dtype=np.int32),
        np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH)),
        inside.astype(np.int32),
        (inside & (rng.random((ROWS, LENGTH)) < 0.6)).astype(np.float32),
        np.arange(ROWS, dtype=np.int32) + ROWS * step,
    )


def train(sizes: dict[str, int], devices: list | None = None) -> dict[str, np.ndarray]:
    """A few steps on a mesh of these sizes: losses, this process's rows, and every parameter in whole."""
    mesh = sharding.make_mesh(sizes, devices)
    model = build_model(TINY, sharding.make_constrain(mesh), mesh=mesh)
    optimizer, _ = make_optimizer(AdamWSection(lr=1e-2), STEPS)
    places = {"policy": sharding.param_shardings(axes_tree(model.table), mesh, abstract_params(model.table))}

    rng = np.random.default_rng(0)
    host = {"policy": nest({spec.path: rng.normal(0, 0.1, spec.shape).astype(np.float32) for spec in model.table})}
    state_places = sharding.state_shardings(
        jax.eval_shape(partial(init_state, optimizer=optimizer), host), places, mesh
    )
    start = jax.jit(partial(init_state, optimizer=optimizer), out_shardings=state_places)
    state = start(jax.device_put(host, places))
    loss_fn = sharding.pinned(partial(cross_entropy, model, chunk_tokens=64), places)
    step = jax.jit(make_train_step(loss_fn, optimizer), donate_argnums=0, out_shardings=(state_places, None))
    mine = sharding.local_rows(mesh, ROWS)
    losses = []
    for k in range(STEPS):
        batch = sharding.to_global(jax.tree.map(lambda x: x[mine], global_batch(k)), mesh)
        state, metrics = step(state, {}, batch, jax.random.key(1), {})
        losses.append(float(metrics["loss"]))
    whole = multihost_utils.process_allgather(state.params["policy"], tiled=True)
    return {
        "losses": np.array(losses),
        "rows": mine,
        "processes": np.array(jax.process_count()),
        **{"/".join(path): np.asarray(x) for path, x in flatten(whole).items()},
    }


def name_of(sizes: dict[str, int]) -> str:
    return "_".join(f"{axis}{n}" for axis, n in sizes.items())


if __name__ == "__main__":
    sharding.initialize_distributed()
    for mesh_sizes in json.loads(sys.argv[2]):
        np.savez(f"{sys.argv[1]}/{name_of(mesh_sizes)}_{jax.process_index()}.npz", **train(mesh_sizes))
