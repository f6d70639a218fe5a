"""The loop on a toy regression: what it computes, writes, refuses, and how it stops."""

from __future__ import annotations

import json
import math
import os
import signal
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from toy_run import CONFIG, WIDTH, ToyBatch, ToySource, first_state, read_run, toy_eval, toy_job, toy_step

from jaxpost.config import GuardSection
from jaxpost.metrics.terms import Sums
from jaxpost.sharding import make_mesh, to_global
from jaxpost.train.compiled import ShapeChanged
from jaxpost.train.guards import StopSignals, TrainingStopped
from jaxpost.train.supervised import run_supervised
from jaxpost.types import TrainState


def by_hand(num_steps: int, source: ToySource | None = None) -> TrainState:
    """The same updates in a plain loop."""
    source, state = source or ToySource(), first_state()
    for k in range(num_steps):
        key = jax.random.fold_in(jax.random.key(0), k)
        batch = jax.tree.map(jnp.asarray, source.batch(k))
        state, _ = jax.jit(toy_step)(state, {"bias": jnp.float32(0.5)}, batch, key, {"lr": jnp.float32(0.005)})
    return state


def kinds(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [r for r in read_run(folder)[0] if r["kind"] == kind]


def test_trains_as_a_plain_loop_does(tmp_path: Path):
    source = ToySource()
    result = run_supervised(toy_job(tmp_path / "run", source=source))
    np.testing.assert_allclose(result.state.params["w"], by_hand(12).params["w"], rtol=1e-6)
    assert (result.step, result.stopped, result.exit_code) == (12, None, 0)
    assert source.read == list(range(12)), "each batch is read once, in order"


def test_logs_every_update_and_the_exact_counts(tmp_path: Path):
    run_supervised(toy_job(tmp_path / "run"))
    train = kinds(tmp_path / "run", "train")
    assert [r["step"] for r in train] == list(range(1, 13))
    batches = [ToySource().batch(k) for k in range(12)]
    assert train[-1]["tokens"] == 12 * 8
    assert train[-1]["tokens_trained"] == sum(int((b.weights > 0).sum()) for b in batches)
    b, zero = batches[0], np.zeros(WIDTH)
    first_loss = np.average((b.x.astype(np.float64) @ zero + 0.5 - b.y) ** 2, weights=b.weights)
    assert train[0]["loss"] == pytest.approx(first_loss, rel=1e-5)
    assert all(r["lr"] == 0.005 and r["skipped"] == 0 for r in train)


def test_a_window_logs_means(tmp_path: Path):
    run_supervised(toy_job(tmp_path / "each"))
    run_supervised(toy_job(tmp_path / "fives", train={"log_every": 5}))
    each, fives = kinds(tmp_path / "each", "train"), kinds(tmp_path / "fives", "train")
    assert [r["step"] for r in fives] == [5, 10, 12]
    for record, steps in zip(fives, (range(5), range(5, 10), range(10, 12)), strict=True):
        assert record["loss"] == pytest.approx(np.mean([each[i]["loss"] for i in steps]), rel=1e-12)


def test_evaluation_is_the_exact_mean_over_ragged_batches(tmp_path: Path):
    held_out = ToySource(99, batches=3)
    result = run_supervised(toy_job(tmp_path / "run", evals={"held_out": held_out}))
    evals = kinds(tmp_path / "run", "eval")
    assert [r["step"] for r in evals] == [0, 5, 10, 12]
    w = np.asarray(result.state.params["w"], np.float64)
    batches = [held_out.batch(k) for k in range(3)]
    total = sum(np.sum((b.x @ w + 0.5 - b.y) ** 2 * b.weights) for b in batches)
    exact = total / sum(b.weights.sum() for b in batches)
    assert evals[-1]["loss"] == pytest.approx(exact, rel=1e-5)
    best = min(evals, key=lambda r: r["loss"])
    assert (evals[-1]["best/loss"], evals[-1]["best/loss_step"]) == (best["loss"], best["step"])
    assert result.metrics["eval/loss"] == evals[-1]["loss"]


def test_several_evaluation_sets_and_a_limit(tmp_path: Path):
    first, second = ToySource(1, batches=3), ToySource(2, batches=3, rows=4)
    run_supervised(toy_job(tmp_path / "run", evals={"a": first, "b": second}, train={"eval_batches": 2}, num_steps=1))
    record = kinds(tmp_path / "run", "eval")[0]
    assert {"a/loss", "b/loss", "best/a/loss", "best/b/loss"} <= record.keys()
    assert max(first.read) == 1


def test_the_folder_explains_the_run(tmp_path: Path):
    def export(state: TrainState, to: Path) -> None:
        to.mkdir()
        (to / "model").write_text("weights")

    folder = tmp_path / "run"
    run_supervised(toy_job(folder, export=export))
    names = {p.name for p in folder.iterdir()} - {".lock"}
    assert names == {
        *("config.yaml", "environment.json", "metrics.jsonl", "samples.jsonl", "curves.svg"),
        *("checkpoints", "export", "log.txt", "README.md"),
    }
    assert (folder / "config.yaml").read_text() == CONFIG
    (start,) = json.loads((folder / "environment.json").read_text())
    assert start["command"] == "jaxpost train toy.yaml"
    assert start["versions"]["jax"] == jax.__version__
    readme = (folder / "README.md").read_text()
    assert "jaxpost train toy.yaml" in readme
    assert "Finished 12 updates" in readme
    assert f"jaxpost generate {folder / 'export'}" in readme
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [0, 5, 10, 12]
    tree = ElementTree.parse(folder / "curves.svg")
    assert sum(e.tag.endswith("circle") for e in tree.iter()) >= 4, "a dot for each evaluation"
    time = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-2])["time"]
    assert {"tokens_per_second", "trained_tokens_per_second", "mfu_percent", "data_wait_percent"} <= time.keys()
    assert time["peak_memory_gib"] > 0.01
    assert time["compile_seconds"] > 0


def test_runs_sharded_over_a_mesh(tmp_path: Path):
    mesh = make_mesh({"fsdp": -1})
    everywhere = NamedSharding(mesh, PartitionSpec())
    result = run_supervised(
        toy_job(
            tmp_path / "run",
            mesh=mesh,
            place=lambda batch: to_global(batch, mesh),
            frozen=jax.device_put({"bias": np.float32(0.5)}, everywhere),
            hyper={"lr": np.float32(0.005)},
        )
    )
    np.testing.assert_allclose(result.state.params["w"], by_hand(12).params["w"], rtol=1e-4)
    assert result.state.params["w"].sharding == everywhere


def test_a_batch_of_another_shape_is_an_error_that_names_it(tmp_path: Path):
    class Ragged(ToySource):
        def batch(self, k: int) -> ToyBatch:
            b = super().batch(k)
            return b if k < 3 else ToyBatch(*(x[:5] for x in b))

    with pytest.raises(ShapeChanged, match=r"training step would be compiled again.*x: \(\(8, 6\), 'float32'\) before"):
        run_supervised(toy_job(tmp_path / "run", source=Ragged()))


def test_the_step_is_traced_once(tmp_path: Path):
    traces = []

    def counted(*args: Any) -> Any:
        traces.append(1)
        return toy_step(*args)

    run_supervised(toy_job(tmp_path / "run", step=counted))
    assert len(traces) == 1


def test_a_bad_update_is_skipped_counted_and_survived(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    result = run_supervised(toy_job(tmp_path / "run", source=ToySource(poison=(3, 7)), train={"log_every": 6}))
    train = kinds(tmp_path / "run", "train")
    assert [r["skipped"] for r in train] == [1, 1]
    assert "Skipped update 8 (loss nan, grad_norm nan); 1 in a row, 2 in all" in capsys.readouterr().out
    assert all(math.isfinite(r["loss"]) for r in train), "means leave skipped updates out"
    np.testing.assert_allclose(result.state.params["w"], by_hand(12, ToySource(poison=(3, 7))).params["w"], rtol=1e-6)


def test_bad_updates_in_a_row_stop_the_run_with_a_sentence(tmp_path: Path):
    job = toy_job(tmp_path / "run", source=ToySource(poison=tuple(range(5, 99))), guard=GuardSection(max_skips=3))
    with pytest.raises(TrainingStopped, match=r"3 updates in a row were skipped .* at step 8: loss = nan.*optim\.lr"):
        run_supervised(job)
    records = kinds(tmp_path / "run", "train")
    assert records[-1] == {"step": 8, "kind": "train", "loss": "nan", "skipped": 1, "lr": 0.005} | {
        k: records[-1][k] for k in ("tokens", "tokens_trained")
    }
    assert "Stopped at step" in (tmp_path / "run" / "README.md").read_text()


def test_guard_can_stop_at_the_first_bad_update(tmp_path: Path):
    job = toy_job(tmp_path / "run", source=ToySource(poison=(5,)), guard=GuardSection(on_nonfinite="stop"))
    with pytest.raises(TrainingStopped, match=r"Update 6: loss = nan.*on_nonfinite is 'stop'"):
        run_supervised(job)


def empty_at(*steps: int) -> Any:
    """Updates whose batch has nothing that counts."""

    def step(state: TrainState, *args: Any) -> Any:
        after, metrics = toy_step(state, *args)
        empty = jnp.any(state.step + 1 == jnp.array(steps))
        return after, metrics | {"skipped": empty.astype(jnp.int32), "empty": empty.astype(jnp.int32)}

    return step


def test_a_batch_without_a_trained_token_stops_the_run(tmp_path: Path):
    count = lambda batch: {"tokens": jnp.int32(8), "tokens_trained": jnp.int32(0)}  # noqa: E731
    with pytest.raises(TrainingStopped, match=r"Update 1: no token of its batch is trained.*data inspect"):
        run_supervised(toy_job(tmp_path / "run", step=empty_at(1), count=count))


def test_a_batch_that_the_loss_cannot_compare_is_skipped_and_many_stop_the_run(tmp_path: Path, capsys):
    guard = GuardSection(max_skips=3)
    run_supervised(toy_job(tmp_path / "some", step=empty_at(3, 4, 9), guard=guard))
    assert "Skipped update 4 (its batch holds nothing that the loss compares" in capsys.readouterr().out
    with pytest.raises(
        TrainingStopped, match=r"^3 updates in a row.*at step 6: its batch holds.*batch_size.*update 3\.$"
    ):
        run_supervised(toy_job(tmp_path / "many", step=empty_at(4, 5, 6), guard=guard))


def test_an_evaluation_in_which_nothing_counts_has_no_loss_and_is_not_the_best(tmp_path: Path, capsys):
    def weightless(*args: Any) -> dict[str, Sums]:
        return {
            name: sums._replace(total=sums.total * 0, weight=sums.weight * 0) for name, sums in toy_eval(*args).items()
        }

    run_supervised(toy_job(tmp_path / "run", eval_step=weightless))
    found = kinds(tmp_path / "run", "eval")
    assert {r["loss"] for r in found} == {r["mse"] for r in found} == {"nan"}
    assert not any("best/loss" in r for r in found)
    assert "held out: loss nan  in" in capsys.readouterr().out


class Signalling(ToySource):
    """Sends this process a signal while batch `at` is made."""

    def __init__(self, at: int, number: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.at, self.number = at, number

    def batch(self, k: int) -> ToyBatch:
        if k == self.at:
            os.kill(os.getpid(), self.number)
        return super().batch(k)


@pytest.mark.parametrize(("number", "name", "code"), [(signal.SIGTERM, "SIGTERM", 143), (signal.SIGINT, "SIGINT", 130)])
def test_a_signal_saves_and_a_second_start_ends_as_if_nothing_happened(
    tmp_path: Path, number: int, name: str, code: int, capfd: pytest.CaptureFixture[str]
):
    before = signal.getsignal(number)
    result = run_supervised(toy_job(tmp_path / "cut", source=Signalling(6, number)))
    assert (result.stopped, result.exit_code, result.step) == (name, code, 7)
    assert signal.getsignal(number) is before
    shown = capfd.readouterr()
    assert "a second one kills" in shown.err
    assert "Run the same command again" in shown.out
    assert name in (tmp_path / "cut" / "README.md").read_text()
    resumed = run_supervised(toy_job(tmp_path / "cut"))
    whole = run_supervised(toy_job(tmp_path / "whole"))
    assert np.asarray(resumed.state.params["w"]).tobytes() == np.asarray(whole.state.params["w"]).tobytes()
    assert read_run(tmp_path / "cut") == read_run(tmp_path / "whole")


@pytest.mark.parametrize("at_step", [0, 5, 12])
def test_a_signal_during_an_evaluation_gives_it_up_until_the_resume(tmp_path: Path, at_step: int):
    seen = []

    def sample(params: Any, frozen: Any) -> list[dict[str, str]]:
        seen.append(1)
        if len(seen) == {0: 1, 5: 2, 12: 4}[at_step]:
            os.kill(os.getpid(), signal.SIGTERM)
        return [{"prompt": "w", "text": str(np.asarray(params["w"]))}]

    result = run_supervised(toy_job(tmp_path / "cut", sample=sample))
    assert (result.stopped, result.step) == ("SIGTERM", at_step)
    run_supervised(toy_job(tmp_path / "cut", sample=sample))
    seen[:] = [0] * 9
    run_supervised(toy_job(tmp_path / "whole", sample=sample))
    assert read_run(tmp_path / "cut") == read_run(tmp_path / "whole")


def test_the_second_signal_has_its_usual_effect():
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == "SIGINT"
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_data_that_ends_is_an_error(tmp_path: Path):
    class Short(ToySource):
        def iterate(self, start: int) -> Any:
            return iter([self.batch(k) for k in range(start, 3)])

    with pytest.raises(ValueError, match="training data ended after batch 3"):
        run_supervised(toy_job(tmp_path / "run", source=Short(), evals={}))


def test_evaluation_data_needs_an_evaluation_step(tmp_path: Path):
    with pytest.raises(ValueError, match="no eval_step"):
        run_supervised(toy_job(tmp_path / "run", eval_step=None))
