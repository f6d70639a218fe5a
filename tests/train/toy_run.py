"""A linear regression with a noisy Adam step: small enough to run hundreds of updates in a second."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxpost.config import GuardSection, RunSection, TrainSection
from jaxpost.metrics.terms import Sums
from jaxpost.sharding import make_mesh, to_global
from jaxpost.train.supervised import SupervisedJob, run_supervised
from jaxpost.types import TrainState

WIDTH = 6
CONFIG = "optim: {lr: 0.05}\ntrain: {log_every: 1}\n"


class ToyBatch(NamedTuple):
    x: np.ndarray
    y: np.ndarray
    weights: np.ndarray
    segment_ids: np.ndarray


class ToySource:
    """Batch k is a pure function of (seed, k)."""

    def __init__(self, seed: int = 0, *, batches: int = 4, rows: int = 8, poison: tuple[int, ...] = ()) -> None:
        self.seed, self.num_batches_per_epoch, self.rows, self.poison = seed, batches, rows, poison
        self.fingerprint = hashlib.sha256(f"{seed} {batches} {rows}".encode()).hexdigest()
        self.read: list[int] = []

    def batch(self, k: int) -> ToyBatch:
        rng = np.random.default_rng((self.seed, k))
        x = rng.normal(size=(self.rows, WIDTH)).astype(np.float32)
        y = x @ np.arange(WIDTH, dtype=np.float32) + rng.normal(size=self.rows).astype(np.float32)
        weights = (rng.random(self.rows) < 0.7).astype(np.float32)
        if k in self.poison:
            y = np.full_like(y, np.nan)
        return ToyBatch(x, y, weights, np.ones(self.rows, np.int32))

    def iterate(self, start: int):
        k = start
        while True:
            self.read.append(k)
            yield self.batch(k)
            k += 1


def toy_step(state: TrainState, frozen, batch: ToyBatch, key, hyper):
    """Weighted least squares with noise on the gradient; a NaN leaves the state and reports `skipped`."""

    def loss_fn(params):
        error = batch.x @ params["w"] + frozen["bias"] - batch.y
        return jnp.sum(error**2 * batch.weights) / jnp.maximum(jnp.sum(batch.weights), 1.0)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    noise = 0.01 * jax.random.normal(key, (WIDTH,))
    momentum = jax.tree.map(lambda m, g: 0.9 * m + g + noise, state.opt_state, grads)
    params = jax.tree.map(lambda p, m: p - hyper["lr"] * m, state.params, momentum)
    good = jnp.isfinite(loss)
    new = TrainState(state.step, params, momentum, state.extra)
    new = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, state)._replace(step=state.step + 1)
    return new, {
        "loss": loss,
        "grad_norm": jnp.sqrt(jnp.sum(grads["w"] ** 2)),
        "skipped": 1.0 - good.astype(jnp.float32),
    }


def toy_eval(params, frozen, batch: ToyBatch, key, hyper):
    error = batch.x @ params["w"] + frozen["bias"] - batch.y
    total, weight = jnp.sum(error**2 * batch.weights), jnp.sum(batch.weights)
    return {"mse": Sums(total, weight, jnp.float32(1.0))}


def first_state() -> TrainState:
    return TrainState(
        jnp.zeros((), jnp.int32), {"w": jnp.zeros(WIDTH)}, {"w": jnp.zeros(WIDTH)}, {"seen": jnp.zeros(())}
    )


def toy_sample(params, frozen):
    return [{"prompt": "w", "text": " ".join(f"{x:.9g}" for x in np.asarray(params["w"]))}]


def toy_job(
    folder: Path,
    *,
    num_steps: int = 12,
    train: dict | None = None,
    run: dict | None = None,
    guard: GuardSection | None = None,
    **changes,
) -> SupervisedJob:
    """A whole run in well under a second."""
    section = {"eval_every": 5, "save_every": 4, "log_every": 1, **(train or {})}
    settings = {
        "folder": folder,
        "config_text": CONFIG,
        "train": TrainSection(**section, guard=guard or GuardSection()),
        "run": RunSection(**{"name": "toy", **(run or {})}),
        "num_steps": num_steps,
        "step": toy_step,
        "init_state": first_state,
        "abstract_state": jax.eval_shape(first_state),
        "source": ToySource(),
        "frozen": {"bias": jnp.float32(0.5)},
        "hyper": {"lr": jnp.float32(0.005)},
        "evals": {"held_out": ToySource(99, batches=3)},
        "eval_step": toy_eval,
        "lr_at": lambda k: 0.005,
        "sample": toy_sample,
        "flops_per_token": 6.0 * WIDTH,
        "command": ("jaxpost", "train", "toy.yaml"),
    }
    return SupervisedJob(**{**settings, **changes})


def read_run(folder: Path) -> tuple[list[dict], str]:
    """What a run promises to reproduce: its metrics without the clock's part, and its samples."""
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in metrics:
        record.pop("time")
    return metrics, (folder / "samples.jsonl").read_text()


def export(state: TrainState, to: Path) -> None:
    if jax.process_index() == 0:
        to.mkdir()
        (to / "params.bin").write_bytes(np.asarray(state.params["w"]).tobytes())


def slow(folder: str, steps: str, seconds: str) -> int:
    """Run the toy slowly enough to be killed."""

    class Slow(ToySource):
        def batch(self, k: int) -> ToyBatch:
            time.sleep(float(seconds))
            return super().batch(k)

    train = {"eval_every": 7, "save_every": 3, "log_every": 2}
    job = toy_job(Path(folder), num_steps=int(steps), train=train, source=Slow(), export=export)
    return run_supervised(job).exit_code


def pair(rank: str, port: str, folder: str, stop_at: str) -> int:
    """One of two processes with two devices each; the second one signals itself while it makes batch `stop_at`."""
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank))
    mesh = make_mesh({"fsdp": -1})
    frozen = jax.device_put({"bias": np.float32(0.5)}, NamedSharding(mesh, PartitionSpec()))

    class Half(ToySource):
        def batch(self, k: int) -> ToyBatch:
            if (rank, str(k), self.seed) == ("1", stop_at, 0):
                os.kill(os.getpid(), signal.SIGTERM)
            rows = slice(int(rank) * self.rows // 2, (int(rank) + 1) * self.rows // 2)
            return ToyBatch(*(x[rows] for x in super().batch(k)))

    result = run_supervised(
        toy_job(
            Path(folder),
            mesh=mesh,
            place=partial(to_global, mesh=mesh),
            source=Half(),
            evals={"held_out": Half(99, batches=3)},
            frozen=frozen,
            export=export,
        )
    )
    print(f"stopped={result.stopped} step={result.step}")
    return result.exit_code


if __name__ == "__main__":
    raise SystemExit(pair(*sys.argv[2:]) if sys.argv[1] == "pair" else slow(*sys.argv[1:]))
