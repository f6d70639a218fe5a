"""Safetensors reading and writing against the safetensors package; folders that appear whole or not at all."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxpost.weights.files import INDEX, SINGLE, Checkpoint, TensorInfo, replaced_folder, write_checkpoint

RNG = np.random.default_rng(0)
TENSORS = {
    "a": RNG.normal(size=(5, 7)).astype(np.float32),
    "b": RNG.normal(size=(3,)).astype(ml_dtypes.bfloat16),
    "c": RNG.normal(size=(6, 4)).astype(np.float16).T,  # not contiguous
}
INFOS = [TensorInfo(name, x.shape, x.dtype) for name, x in TENSORS.items()]


@pytest.mark.parametrize("limit", [10**9, 150, 1])
def test_written_files_are_what_safetensors_reads(tmp_path, limit):
    write_checkpoint(tmp_path, INFOS, lambda info: TENSORS[info.name], max_shard_bytes=limit)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == {10**9: 1, 150: 2, 1: 3}[limit]
    read = {name: x for file in files for name, x in load_file(file).items()}
    for name, x in TENSORS.items():
        assert read[name].dtype == x.dtype
        np.testing.assert_array_equal(read[name], x)
    if limit < 10**9:
        index = json.loads((tmp_path / INDEX).read_text())
        assert set(index["weight_map"]) == set(TENSORS)
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in TENSORS.values())
    checkpoint = Checkpoint(tmp_path)
    np.testing.assert_array_equal(checkpoint.read("a", (slice(1, 3), slice(2, 7))), TENSORS["a"][1:3, 2:7])
    assert checkpoint.info("b") == INFOS[1]


def test_a_tensor_other_than_announced_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a is float64"):
        write_checkpoint(tmp_path, INFOS, lambda info: np.zeros(info.shape), max_shard_bytes=10**9)


def test_damaged_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"neither {SINGLE} nor {INDEX}"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match="pickle"):
        Checkpoint(tmp_path)
    write_checkpoint(tmp_path, INFOS, lambda info: TENSORS[info.name], max_shard_bytes=1)
    second = tmp_path / "model-00002-of-00003.safetensors"
    content = second.read_bytes()
    second.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=f"{second.name} is not a readable safetensors file"):
        Checkpoint(tmp_path)
    save_file({"other": np.zeros(1, np.float32)}, second)
    with pytest.raises(ValueError, match=f"lists b in {second.name}, but that file has no such tensor"):
        Checkpoint(tmp_path)
    second.unlink()
    with pytest.raises(FileNotFoundError, match=f"names {second.name}"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is not valid JSON"),
        ('{"weight_map": {"a": "mo', "is not valid JSON"),
        ("[1]", "must hold a JSON object, not list"),
        ("{}", "has no weight_map"),
        ('{"weight_map": ["a"]}', "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "has no weight_map"),
    ],
)
def test_a_damaged_index_is_named(tmp_path, content, words):
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(ValueError, match=rf"{INDEX} {words}"):
        Checkpoint(tmp_path)


def test_integer_tensors_are_refused(tmp_path):
    save_file({"a": np.zeros(2, np.int8)}, tmp_path / SINGLE)
    with pytest.raises(ValueError, match="a has dtype I8"):
        Checkpoint(tmp_path).info("a")


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "model"

    def fail(*, overwrite: bool) -> None:
        with replaced_folder(target, overwrite=overwrite) as new:
            (new / "x").write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail(overwrite=False)
    assert list(tmp_path.iterdir()) == []
    with replaced_folder(target, overwrite=False) as new:
        (new / "x").write_text("one")
        assert not target.exists()
    with pytest.raises(FileExistsError, match="exists already"):
        fail(overwrite=False)
    with pytest.raises(OSError, match="disk full"):
        fail(overwrite=True)
    assert (target / "x").read_text() == "one"
    with replaced_folder(target, overwrite=True) as new:
        (new / "y").write_text("two")
    assert [p.name for p in target.iterdir()] == ["y"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
