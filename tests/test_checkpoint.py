"""Checkpoints: bits in, bits out, on any mesh; nothing half-written is ever taken for one."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxpost.checkpoint import CheckpointError, CheckpointMismatch, Checkpoints, check_manifest, manifest


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any


def some_state(seed: int = 0) -> State:
    rng = np.random.default_rng(seed)
    params = {
        "kernel": jnp.asarray(rng.normal(size=(8, 16)), jnp.float32),
        "scale": jnp.asarray(rng.normal(size=(16,)), jnp.bfloat16),
    }
    return State(jnp.int32(seed), params, (jax.tree.map(jnp.ones_like, params), jnp.uint8(7)))


def assert_same_bits(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_restores_bits_and_meta_onto_another_mesh(tmp_path: Path):
    def sharded(state: State, sizes: tuple[int, int]) -> State:
        mesh = jax.make_mesh(sizes, ("a", "b"), axis_types=(AxisType.Auto,) * 2)
        place = lambda x: jax.device_put(  # noqa: E731
            x, NamedSharding(mesh, PartitionSpec("a", "b") if x.ndim == 2 else PartitionSpec())
        )
        return jax.tree.map(place, state)

    saved, target = sharded(some_state(3), (4, 2)), sharded(some_state(0), (2, 4))
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(3, saved, {"position": 17, "files": {"metrics.jsonl": 5}})
    with Checkpoints(tmp_path / "c") as checkpoints:
        restored, meta = checkpoints.restore(target)
    assert_same_bits(restored, saved)
    assert restored.params["kernel"].sharding == target.params["kernel"].sharding
    assert (meta["position"], meta["files"], meta["step"]) == (17, {"metrics.jsonl": 5}, 3)
    assert meta["versions"]["jax"] == jax.__version__


def test_the_copy_is_taken_before_save_returns(tmp_path: Path):
    """The loop donates the state right after `save`, and the meta may change too."""
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + jnp.ones((), x.dtype), s), donate_argnums=0)
    state = {"w": jax.device_put(jnp.arange(2_000_000, dtype=jnp.float32))}
    meta = {"files": {"a": 1}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, meta)
        meta["files"]["a"] = 2
        for _ in range(5):
            state = advance(state)
        jax.block_until_ready(state)
        checkpoints.wait()
        restored, found = checkpoints.restore({"w": jax.ShapeDtypeStruct((2_000_000,), jnp.float32)})
    np.testing.assert_array_equal(restored["w"], np.arange(2_000_000, dtype=np.float32))
    assert found["files"] == {"a": 1}


def test_in_the_foreground_it_is_complete_when_save_returns(tmp_path: Path):
    with Checkpoints(tmp_path, background=False) as checkpoints:
        checkpoints.save(4, {"w": jnp.float32(1)}, {})
        assert [p.name for p in tmp_path.iterdir()] == ["4"]


def test_keeps_the_newest(tmp_path: Path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 5, 9):
            checkpoints.save(step, {"w": jnp.float32(step)}, {})
        checkpoints.wait()
        assert checkpoints.steps == [5, 9]
        assert float(checkpoints.restore({"w": jnp.float32(0)}, 5)[0]["w"]) == 5.0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["5", "9"]


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ({"a": {"w": jnp.zeros((3, 2))}}, r"a/w: shape \(2, 3\) in the checkpoint, \(3, 2\) in this run"),
        ({"a": {"w": jnp.zeros((2, 3), jnp.bfloat16)}}, r"a/w: dtype float32 in the checkpoint, bfloat16 in this run"),
        ({"a": {"v": jnp.zeros((2, 3))}}, r"a/v: this run has it, the checkpoint does not\n  a/w: the checkpoint has"),
    ],
)
def test_names_the_weight_that_does_not_fit(tmp_path: Path, wanted: Any, sentence: str):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": {"w": jnp.zeros((2, 3))}}, {})
        checkpoints.wait()
        with pytest.raises(CheckpointMismatch, match=sentence):
            checkpoints.restore(wanted)


def test_lists_a_few_misfits_and_counts_the_rest():
    old, new = manifest([jnp.zeros(1)] * 9), manifest([jnp.zeros(2)] * 9)
    with pytest.raises(CheckpointMismatch, match="and 3 more"):
        check_manifest(old, new, Path("c"))
    check_manifest(old, old, Path("c"))


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """RLIMIT_FSIZE makes the file system refuse further bytes, from Python and from tensorstore's C++ alike."""
    rng = np.random.default_rng(0)
    state = {"w": jnp.asarray(rng.normal(size=300_000), jnp.float32)}
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, unlimited[1]))
        try:
            checkpoints.save(2, state, {})
            with pytest.raises(CheckpointError, match=r"disk .* is full.*checkpoint of step 1 is intact"):
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert [p.name for p in tmp_path.iterdir()] == ["1"], "the unfinished save gives its space back"
        assert_same_bits(checkpoints.restore(state)[0], state)
        checkpoints.save(3, state, {})
        checkpoints.wait()
        assert checkpoints.steps == [3], "saving works again once there is space"
    assert "Traceback" not in capfd.readouterr().err


def test_a_save_killed_half_way_is_never_a_checkpoint(tmp_path: Path):
    child = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        import jax.numpy as jnp, numpy as np
        from jaxpost.checkpoint import Checkpoints
        state = {"w": jnp.asarray(np.random.default_rng(0).normal(size=400_000), jnp.float32)}
        checkpoints = Checkpoints(Path(sys.argv[1]), keep=1)
        checkpoints.save(1, {"w": jnp.zeros(3)}, {})
        checkpoints.wait()
        # What makes a save a checkpoint is its last name.
        os.rename = os.replace = lambda *paths, **how: os.kill(os.getpid(), signal.SIGKILL)
        checkpoints.save(2, state, {})
        checkpoints.wait()
        """
    )
    ended = subprocess.run([sys.executable, "-c", child, str(tmp_path)], env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert ended.returncode == -signal.SIGKILL
    assert any("tmp" in p.name for p in tmp_path.iterdir()), "the kill came in time to leave something unfinished"
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.steps == [1]
        assert [p.name for p in tmp_path.iterdir()] == ["1"]
        np.testing.assert_array_equal(checkpoints.restore({"w": jnp.ones(3)})[0]["w"], np.zeros(3))


def test_says_when_a_checkpoint_is_damaged_missing_or_foreign(tmp_path: Path):
    with Checkpoints(tmp_path / "none") as checkpoints, pytest.raises(CheckpointError, match="no checkpoint in"):
        checkpoints.restore({"w": jnp.zeros(3)})
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, {"w": jnp.arange(3.0)}, {})
        checkpoints.wait()
        for file in (tmp_path / "c" / "1" / "state").rglob("d/*"):
            file.write_bytes(b"")
        with pytest.raises(CheckpointError, match=r"c/1 is damaged or unreadable"):
            checkpoints.restore({"w": jnp.zeros(3)})
    from orbax.checkpoint import v1 as ocp

    with ocp.training.Checkpointer(tmp_path / "foreign") as other:
        other.save(4, {"w": jnp.zeros(3)})
    with (
        Checkpoints(tmp_path / "foreign") as checkpoints,
        pytest.raises(CheckpointError, match="not written by jaxpost"),
    ):
        checkpoints.restore({"w": jnp.zeros(3)})


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("_CHECKPOINT_METADATA", r"is damaged, or was not written by jaxpost.* this run's, delete that folder"),
        ("state/_METADATA", r"is damaged or unreadable \(\w+: .*\)\. Delete that folder"),
    ],
)
@pytest.mark.parametrize("part", [0, 100])
def test_a_damaged_checkpoint_says_in_short_where_to_go_on(
    tmp_path: Path, file: str, words: str, part: int, capfd: pytest.CaptureFixture[str]
):
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for step in (4, 7):
            checkpoints.save(step, {"w": jnp.arange(3.0)}, {})
        checkpoints.wait()
    for step, where in ((7, "step 4"), (4, "the start")):
        damaged = tmp_path / str(step) / file
        damaged.write_bytes(damaged.read_bytes()[:part])
        found = rf"{step} {words} to go on from {where}"
        with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match=found) as caught:
            checkpoints.restore({"w": jnp.zeros(3)})
        assert len(str(caught.value)) < 450 + len(str(tmp_path))
        shutil.rmtree(tmp_path / str(step))
    assert "Failed to json parse" not in capfd.readouterr().err


def test_keep_must_be_positive(tmp_path: Path):
    with pytest.raises(ValueError, match="keep_checkpoints is 0"):
        Checkpoints(tmp_path, keep=0)
