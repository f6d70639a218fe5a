"""Exact resume: killed at any moment, the run ends with the same bits as one that was left alone."""

from __future__ import annotations

import os
import random
import re
import resource
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_run import CONFIG, ToySource, first_state, read_run, toy_job

from jaxpost.checkpoint import CheckpointMismatch
from jaxpost.config import RunSection
from jaxpost.train.folder import RunFolderError, config_changes, open_folder
from jaxpost.train.supervised import run_supervised

TOY = Path(__file__).with_name("toy_run.py")
KILLS = int(os.environ.get("JAXPOST_TEST_KILLS", "2"))
STEPS = 20 * KILLS


def start(*args: str) -> subprocess.Popen[bytes]:
    cache = jax.config.jax_compilation_cache_dir or ""
    variables = {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(TOY.parents[2]),
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, str(TOY), *args]
    return subprocess.Popen(command, env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_killed_at_random_moments_it_ends_bit_for_bit_the_same(tmp_path: Path):
    """SIGKILL, with saves every third update always in flight; JAXPOST_TEST_KILLS=10 for a longer trial."""
    whole = start(str(tmp_path / "whole"), str(STEPS), "0.02")
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    alive = 0
    for attempt in range(KILLS):
        before = lines(tmp_path / "cut" / "metrics.jsonl")
        child = start(str(tmp_path / "cut"), str(STEPS), "0.05")
        until = time.monotonic() + 60
        # Every third one may be hit while it starts, restores or compiles.
        while attempt % 3 < 2 and child.poll() is None and lines(tmp_path / "cut" / "metrics.jsonl") == before:
            assert time.monotonic() < until, "the run did not get going"
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.6 if attempt % 3 < 2 else 4.0))
        alive += child.poll() is None
        child.kill()
        child.communicate()
    assert alive > KILLS / 2, "kills must come while the run is at work"
    last = start(str(tmp_path / "cut"), str(STEPS), "0.0")
    assert last.communicate(timeout=120) is not None
    _, errors = whole.communicate(timeout=120)
    assert (last.returncode, whole.returncode) == (0, 0), errors.decode()[-2000:]
    params = [(tmp_path / name / "export" / "params.bin").read_bytes() for name in ("whole", "cut")]
    assert params[0] == params[1], f"seed {seed}"
    assert read_run(tmp_path / "whole") == read_run(tmp_path / "cut"), f"seed {seed}"


def test_goes_on_from_a_checkpoint_and_not_from_the_start(tmp_path: Path):
    run_supervised(toy_job(tmp_path / "run", num_steps=12))
    for kept in (tmp_path / "run" / "checkpoints").iterdir():
        if kept.name == "12":
            kept.rename(tmp_path / "lost")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "kind": "tr')
    source, made = ToySource(), []

    def init() -> Any:
        made.append(1)
        return first_state()

    run_supervised(toy_job(tmp_path / "run", num_steps=12, source=source, init_state=init))
    assert source.read == [8, 9, 10, 11]
    assert not made, "weights are not loaded when a checkpoint is restored"
    run_supervised(toy_job(tmp_path / "whole", num_steps=12))
    assert read_run(tmp_path / "run") == read_run(tmp_path / "whole")


def test_a_finished_run_is_finished(tmp_path: Path):
    exports = []
    export = lambda state, to: (to.mkdir(), exports.append(to))  # noqa: E731
    run_supervised(toy_job(tmp_path / "run", export=export))
    before = read_run(tmp_path / "run")
    source = ToySource()
    again = run_supervised(toy_job(tmp_path / "run", export=export, source=source))
    assert (again.step, again.stopped, source.read, len(exports)) == (12, None, [], 1)
    assert read_run(tmp_path / "run") == before


OTHER = CONFIG.replace("0.05", "0.1")


def test_a_changed_configuration_is_shown_and_refused(tmp_path: Path):
    run_supervised(toy_job(tmp_path / "run"))
    with pytest.raises(RunFolderError, match=r"optim\.lr: 0\.05 -> 0\.1\n.*--run\.allow-changed-config"):
        run_supervised(toy_job(tmp_path / "run", config_text=OTHER))
    assert (tmp_path / "run" / "config.yaml").read_text() == CONFIG
    allowed = toy_job(tmp_path / "run", config_text=OTHER, num_steps=14, run={"allow_changed_config": True})
    assert run_supervised(allowed).step == 14
    assert (tmp_path / "run" / "config.yaml").read_text() == OTHER
    assert (tmp_path / "run" / "config.1.yaml").read_text() == CONFIG


def test_the_checkpoint_knows_what_it_was_trained_with(tmp_path: Path):
    """The folder's config.yaml may have been replaced since."""
    run_supervised(toy_job(tmp_path / "run"))
    (tmp_path / "run" / "config.yaml").write_text(OTHER)
    with pytest.raises(CheckpointMismatch, match=r"trained with other settings:\n  optim\.lr: 0\.05 -> 0\.1"):
        run_supervised(toy_job(tmp_path / "run", config_text=OTHER))


def test_other_data_under_the_same_configuration_is_refused(tmp_path: Path):
    run_supervised(toy_job(tmp_path / "run", identity={"model": "a"}))
    with pytest.raises(
        CheckpointMismatch, match=r"data: fingerprint .*its content changed\)\n  model: fingerprint a -> b"
    ):
        run_supervised(toy_job(tmp_path / "run", source=ToySource(5), identity={"model": "b"}))


def test_a_checkpoint_of_another_shape_names_the_weight(tmp_path: Path):
    run_supervised(toy_job(tmp_path / "run"))
    wide = first_state()._replace(params={"w": jnp.zeros(9)})
    with pytest.raises(CheckpointMismatch, match=r"params/w: shape \(6,\) in the checkpoint, \(9,\) in this run"):
        run_supervised(toy_job(tmp_path / "run", abstract_state=jax.eval_shape(lambda: wide)))


def test_what_cannot_change_the_result_may_change():
    old = "run: {dir: a, name: b, loggers: []}\ntrain: {log_every: 1, save_every: 5, guard: {max_skips: 1}}"
    new = "run: {dir: c, name: d, loggers: [wandb]}\ntrain: {log_every: 3, save_every: 9, guard: {max_skips: 2}}"
    assert config_changes(old, new) == ["train.guard.max_skips: 1 -> 2"]
    assert config_changes("a: [1, 2]", "a: [1]") == ["a.1: 2 -> (absent)"]


def test_metrics_that_are_shorter_than_the_checkpoint_are_refused(tmp_path: Path):
    run_supervised(toy_job(tmp_path / "run"))
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"metrics\.jsonl has 0 bytes, but the checkpoint was saved"):
        run_supervised(toy_job(tmp_path / "run"))


def test_folders_that_are_not_ours_to_use(tmp_path: Path):
    open_one = partial(open_folder, config_text=CONFIG)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("words")
    with pytest.raises(RunFolderError, match="is not a jaxpost run"), open_one(tmp_path / "thesis"):
        pass
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter.txt"]
    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh" / "rejected.jsonl").write_text("{}")
    with open_one(tmp_path / "fresh") as folder:
        assert folder.writes
    with pytest.raises(RunFolderError, match="no run in"), open_one(tmp_path / "new", resume="must"):
        pass
    here = rf"Another process \(pid {os.getpid()} on "
    with open_one(tmp_path / "run"), pytest.raises(RunFolderError, match=here), open_one(tmp_path / "run"):
        pass
    with pytest.raises(RunFolderError, match="never forbids"), open_one(tmp_path / "run", resume="never"):
        pass
    with pytest.raises(RunFolderError, match="is a bucket; mount it"), open_one(Path("gs://bucket/run")):
        pass
    with pytest.raises(RunFolderError, match="no complete checkpoint"):
        run_supervised(toy_job(tmp_path / "run", run={"resume": "must"}))
    assert RunSection().resume == "auto"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.yaml", b"", "it holds no settings.* or start a new run"),
        ("config.yaml", b"optim: {lr: 0.05", "while parsing a flow mapping"),
        ("config.yaml", b"optim: \xff", "utf-8"),
        ("environment.json", b"", "Expecting value.* delete it and run the same command"),
        ("environment.json", b"{}", "it holds no list"),
    ],
)
def test_a_damaged_file_of_the_run_is_named(tmp_path: Path, name: str, content: bytes, words: str):
    with open_folder(tmp_path / "run", config_text=CONFIG) as folder:
        folder.record_start(["jaxpost"], 0)
    (tmp_path / "run" / name).write_bytes(content)
    found = rf"{re.escape(str(tmp_path / 'run' / name))} .*\(.*{words}"
    with (
        pytest.raises(RunFolderError, match=found),
        open_folder(tmp_path / "run", config_text=CONFIG) as folder,
    ):
        folder.record_start(["jaxpost"], 0)


def test_a_full_disk_at_the_start_does_not_refuse_the_next_one(tmp_path: Path):
    """RLIMIT_FSIZE makes the file system refuse further bytes."""
    folder, text = tmp_path / "run", CONFIG + "#" * 100_000
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, unlimited[1]))
    try:
        with (
            pytest.raises(OSError, match=re.escape(str(folder / "config.yaml"))),
            open_folder(folder, config_text=text),
        ):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert [p.name for p in folder.iterdir()] == [".lock"], "the file half written gives its space back"
    (folder / ".config.yaml.tmp").write_text("method: s")  # what a process killed while it wrote leaves
    with open_folder(folder, config_text=text) as opened:
        assert (opened.path / "config.yaml").read_text() == text


def test_two_processes_stop_at_the_same_update_and_one_goes_on(tmp_path: Path):
    """Only the second one gets the signal; rows are split between them. Then one process takes over."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    children = [start("pair", rank, port, str(tmp_path / "run"), "5") for rank in ("0", "1")]
    out = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [143, 143], "\n".join(e.decode()[-1500:] for _, e in out)
    ends = [o.decode().splitlines()[-1] for o, _ in out]
    assert ends[0] == ends[1]
    assert ends[0] in [f"stopped=SIGTERM step={step}" for step in (6, 7, 8)]
    resumed = run_supervised(toy_job(tmp_path / "run"))
    alone = run_supervised(toy_job(tmp_path / "alone"))
    np.testing.assert_allclose(resumed.state.params["w"], alone.state.params["w"], rtol=1e-5)
    together, apart = read_run(tmp_path / "run")[0], read_run(tmp_path / "alone")[0]
    assert len(together) == len(apart)
    for a, b in zip(together, apart, strict=True):
        assert a.pop("kind") == b.pop("kind")
        assert a == pytest.approx(b, rel=1e-4), "tokens, losses and best losses of every update and evaluation"
