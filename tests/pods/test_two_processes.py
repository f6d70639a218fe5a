"""Two processes that talk over jax.distributed train what one process trains. Nothing here is faked but the devices."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from _worker import ROWS, name_of, train
from safetensors.numpy import load_file

WORKER = Path(__file__).with_name("_worker.py")
REPOSITORY = WORKER.parents[2]
DEVICES = 4
SECONDS = 240


def start_group(command, processes, env=None):
    """`processes` copies of a Python command that share 4 CPU devices, as one group if there are several."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(DEVICES // processes),
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(REPOSITORY),
        **(env or {}),
    }
    group = []
    for i in range(processes):
        mine = {
            "JAXPOST_COORDINATOR": f"127.0.0.1:{port}",
            "JAXPOST_NUM_PROCESSES": str(processes),
            "JAXPOST_PROCESS_ID": str(i),
        }
        group.append(
            subprocess.Popen(
                [sys.executable, *map(str, command)],
                env=common | (mine if processes > 1 else {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return group


def finish(group):
    """Waits for all; their outputs. Whoever fails takes the others along, since they would wait for it."""
    try:
        outputs = [process.communicate(timeout=SECONDS)[0] for process in group]
    finally:
        for process in group:
            process.kill()
            process.wait()
            process.stdout.close()
    for process, output in zip(group, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]
    return outputs


def run(command, processes, env=None):
    return finish(start_group(command, processes, env))


def difference(a, b):
    return np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(a)


# One axis each: the CPU backend may enter collectives over different groups of devices in different orders, and hang.
MESHES = [{"fsdp": DEVICES}, {"tensor": DEVICES}]


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """Where two processes ended: (mesh, process) -> arrays."""
    folder = tmp_path_factory.mktemp("two")
    run([WORKER, folder, json.dumps(MESHES)], 2)
    return {(name_of(m), i): dict(np.load(folder / f"{name_of(m)}_{i}.npz")) for m in MESHES for i in range(2)}


@pytest.mark.parametrize("sizes", MESHES, ids=["rows_split", "tensor_across"])
def test_the_step_gives_the_same_parameters(sizes, ends):
    """With tensor=4 both processes feed all rows; with fsdp=4 each feeds its half."""
    one, first, second = train(sizes, jax.devices()[:DEVICES]), ends[name_of(sizes), 0], ends[name_of(sizes), 1]
    assert [int(x.pop("processes")) for x in (one, first, second)] == [1, 2, 2]
    rows = [x.pop("rows").tolist() for x in (one, first, second)]
    every = list(range(ROWS))
    halves = [every[: ROWS // 2], every[ROWS // 2 :]]
    assert rows == [every, *([every, every] if "tensor" in sizes else halves)]
    for name, expected in one.items():
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
        assert difference(expected, first[name]) < 1e-5, name


PRESET = """\
method: sft
model: {{path: {model}}}
data: {{train: [{{path: {data}}}], seq_len: 64}}
optim: {{kind: adamw, lr: 1e-2, schedule: {{kind: constant, warmup: 0}}}}
train: {{batch_size: 4, save_every: 1}}
run: {{dir: "{folder}/{{name}}", export: true}}
"""


def losses_of(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {r["step"]: r["loss"] for r in records if r["kind"] == "train"}


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_with_one(tiny_model, tmp_path):
    """Four steps by one process; two steps by two processes, then two more by one from their checkpoint."""
    data, preset = tmp_path / "chat.jsonl", tmp_path / "preset.yaml"
    turns = [("user", "say {}"), ("assistant", "{} {}")]
    rows = [{"messages": [{"role": r, "content": c.format(i, i)} for r, c in turns]} for i in range(24)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    preset.write_text(PRESET.format(model=tiny_model, data=data, folder=tmp_path), encoding="utf-8")
    train_command = ["-m", "jaxpost.cli", "train", preset]
    env = {"JAXPOST_CACHE": str(tmp_path / "cache")}
    run([*train_command, "--run.name", "one", "--train.steps", "4"], 1, env)
    run([*train_command, "--run.name", "two", "--train.steps", "2"], 2, env)
    first = losses_of(tmp_path / "two")
    assert json.loads((tmp_path / "two" / "environment.json").read_text(encoding="utf-8"))[0]["processes"] == 2
    resumed = ["--run.name", "two", "--train.steps", "4", "--run.resume", "must", "--run.allow_changed_config", "true"]
    run([*train_command, *resumed], 1, env)
    expected, there = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    assert len(first) == 2
    assert expected.keys() == there.keys()
    assert len(expected) == 4
    assert {step: there[step] for step in first} == first
    np.testing.assert_allclose(list(there.values()), list(expected.values()), rtol=1e-5)
    a, b = (load_file(tmp_path / name / "export" / "model.safetensors") for name in ("one", "two"))
    assert a.keys() == b.keys()
    for name in a:
        assert difference(a[name], b[name]) < 1e-5, name


RL_PRESET = """\
method: rl
model: {{path: {model}}}
prompts: {{kind: arithmetic, low: 1, high: 9}}
rollout: {{prompts: 4, samples: 4, max_tokens: 6, rows: 16, uninformative: count}}
reward: {{parts: [{{kind: function, path: "{reward}:digits"}}]}}
loss: {{kind: ppo, aggregate: token_mean}}
kl: {{coef: 0.01}}
learner: {{minibatches: 2}}
optim: {{kind: adamw, lr: 1e-2, schedule: {{kind: constant, warmup: 0}}}}
train: {{steps: 2, save_every: 0}}
run: {{dir: "{folder}/{{name}}", export: true}}
"""

REWARD = """\
def digits(examples, completions):
    return [sum(token % 7 for token in c.tokens) / 40 for c in completions]
"""


@pytest.mark.slow
def test_two_processes_learn_from_the_same_samples_as_one(tiny_model, tmp_path):
    """Two steps of GRPO with a reference and two minibatches: the same samples, and parameters within 1e-5."""
    reward, preset = tmp_path / "reward.py", tmp_path / "preset.yaml"
    reward.write_text(REWARD, encoding="utf-8")
    preset.write_text(RL_PRESET.format(model=tiny_model, reward=reward, folder=tmp_path), encoding="utf-8")
    for name, processes in (("one", 1), ("two", 2)):
        run(["-m", "jaxpost.cli", "train", preset, "--run.name", name], processes)
    texts = [
        [
            (row["example"], row["sample"], row["text"])
            for row in map(json.loads, (tmp_path / name / "samples.jsonl").read_text(encoding="utf-8").splitlines())
        ]
        for name in ("one", "two")
    ]
    assert len(texts[0]) == 2 * 16
    assert texts[0] == texts[1]
    a, b = (load_file(tmp_path / name / "export" / "model.safetensors") for name in ("one", "two"))
    for name in a:
        assert difference(a[name], b[name]) < 1e-5, name
