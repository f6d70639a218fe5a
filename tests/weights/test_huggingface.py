"""Model folders: round trips bit for bit, loading by shard, and what damaged or foreign folders are told."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file
from tiny_families import TINY_FAMILIES, random_params

from jaxpost.config import MeshSection
from jaxpost.models.config import ModelConfig
from jaxpost.models.families import config_from_hf
from jaxpost.models.table import abstract_params, axes_tree, flatten, nest, parameter_table
from jaxpost.models.transformer import build_model
from jaxpost.ops.linear import LoRA
from jaxpost.sharding import make_mesh, param_shardings
from jaxpost.weights import huggingface
from jaxpost.weights.files import Checkpoint
from jaxpost.weights.huggingface import load, read_config, save


@pytest.fixture(params=TINY_FAMILIES)
def tiny_config(request) -> ModelConfig:
    return config_from_hf(TINY_FAMILIES[request.param])


@pytest.fixture
def llama_config() -> ModelConfig:
    return config_from_hf(TINY_FAMILIES["llama-tied"])


def shardings_over(axes: dict[str, int], config) -> dict:
    count = int(np.prod(list(axes.values())))
    mesh = make_mesh(MeshSection(**{"fsdp": 1} | axes), jax.devices()[:count])
    table = parameter_table(config)
    return param_shardings(axes_tree(table), mesh, abstract_params(table))


def assert_same(got, expected) -> None:
    got, expected = flatten(got), flatten(expected)
    assert got.keys() == expected.keys()
    for path, leaf in expected.items():
        assert got[path].dtype == leaf.dtype, path
        # Bits, not values: -0.0 is not 0.0.
        np.testing.assert_array_equal(np.asarray(got[path]).view(np.uint8), np.asarray(leaf).view(np.uint8), str(path))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_import_of_export_is_the_same_bit_for_bit(tiny_config, dtype, tmp_path):
    params = random_params(tiny_config, dtype)
    save(tmp_path / "m", tiny_config, params, max_shard_bytes=5_000)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    assert read_config(tmp_path / "m") == tiny_config
    assert_same(load(tmp_path / "m", tiny_config), params)


def test_sharded_parameters_come_back_from_any_mesh_to_any_mesh(llama_config, tmp_path):
    params = random_params(llama_config)
    save(tmp_path / "a", llama_config, params)
    model = build_model(llama_config)
    first = load(tmp_path / "a", model, shardings=shardings_over({"fsdp": 2, "tensor": 2}, llama_config))
    save(tmp_path / "b", llama_config, first)
    second = load(tmp_path / "b", model, shardings=shardings_over({"fsdp": 8}, llama_config))
    assert_same(second, params)
    kernel = second["stacks"]["0"]["0"]["gate_proj"]["kernel"]
    assert {s.data.shape for s in kernel.addressable_shards} == {(3, 2, 24)}
    assert (
        load_file(tmp_path / "a" / "model.safetensors").keys() == load_file(tmp_path / "b" / "model.safetensors").keys()
    )


def test_a_stack_sharded_by_layers_reads_only_its_layers(llama_config, tmp_path, monkeypatch):
    params = random_params(llama_config)
    save(tmp_path / "m", llama_config, params)
    mesh = Mesh(np.asarray(jax.devices()[:3]), ("stage",))
    by_layer = {
        spec.path: NamedSharding(mesh, PartitionSpec("stage" if spec.path[0] == "stacks" else None))
        for spec in parameter_table(llama_config)
    }
    count = []
    read = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, *a: count.append(out := read(self, *a)) or out)
    assert_same(load(tmp_path / "m", llama_config, shardings=nest(by_layer)), params)
    assert sum(x.nbytes for x in count) == sum(x.nbytes for x in jax.tree.leaves(params))


def put_by_copy(put, x: np.ndarray, device) -> jax.Array:
    """device_put as an accelerator does it: a CPU device would keep an aligned host buffer as its own memory."""
    buffer = np.empty(x.nbytes + 128, np.uint8)
    start = -buffer.ctypes.data % 64 + 4
    unaligned = buffer[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    unaligned[...] = x
    return put(unaligned, device)


def test_host_memory_stays_near_one_shard(tmp_path, monkeypatch):
    config = config_from_hf(
        {"model_type": "llama", "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 1024,
         "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True}
    )  # fmt: skip
    params = random_params(config)
    save(tmp_path / "m", config, params)
    shardings = shardings_over({"fsdp": 8}, config)
    largest = max(x.nbytes for x in jax.tree.leaves(params))
    del params
    monkeypatch.setattr(jax, "device_put", partial(put_by_copy, jax.device_put))
    load(tmp_path / "m", config, shardings=shardings)  # imports and caches, once
    tracemalloc.start()
    loaded = load(tmp_path / "m", config, shardings=shardings)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # A shard, the slice of one layer that is copied into it (1/8 of it here), the test's copies of this shard and of
    # the one before (jax lets go of a buffer at the next transfer), Python's objects. A whole stack is 8 shards.
    assert peak < 3.2 * largest / 8 + 300_000
    assert sum(x.nbytes for x in jax.tree.leaves(loaded)) > 30 * largest / 8


def test_saving_holds_one_layer_at_a_time(tmp_path):
    config = config_from_hf(
        {"model_type": "llama", "vocab_size": 64, "hidden_size": 256, "intermediate_size": 1024,
         "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 4}
    )  # fmt: skip
    params = jax.device_put(random_params(config), shardings_over({"fsdp": 8}, config))
    save(tmp_path / "once", config, params)
    tracemalloc.start()
    save(tmp_path / "again", config, params)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    layer = 256 * 1024 * 4
    assert peak < 2.2 * layer + 300_000  # the matrix and its transposed copy


def test_dtype_is_cast_only_when_asked(llama_config, tmp_path):
    params = random_params(llama_config)
    save(tmp_path / "m", llama_config, params, dtype=jnp.bfloat16)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "bfloat16"
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params)
    assert_same(load(tmp_path / "m", llama_config), rounded)
    widened = jax.tree.map(lambda x: x.astype(np.float32), rounded)
    assert_same(load(tmp_path / "m", llama_config, dtype=np.float32), widened)


def test_tokenizer_and_special_ids_travel(llama_config, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "README.md",
    ):
        (source / name).write_text(name)
    (source / "config.json").write_text(json.dumps({"eos_token_id": [2, 5], "pad_token_id": 0, "hidden_size": 9}))
    save(tmp_path / "m", llama_config, random_params(llama_config), tokenizer_from=source)
    written = {p.name for p in (tmp_path / "m").iterdir()}
    assert written == {"model.safetensors"} | {p.name for p in source.iterdir()} - {"README.md"}
    hf = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (hf["eos_token_id"], hf["pad_token_id"], hf["hidden_size"]) == ([2, 5], 0, 16)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    with pytest.raises(FileNotFoundError, match="holds no tokenizer"):
        save(tmp_path / "n", llama_config, random_params(llama_config), tokenizer_from=source)
    assert not (tmp_path / "n").exists()


def test_existing_folders_are_kept_unless_told(llama_config, tmp_path):
    params = random_params(llama_config)
    save(tmp_path / "m", llama_config, params)
    with pytest.raises(FileExistsError, match="exists already"):
        save(tmp_path / "m", llama_config, params)
    other = random_params(llama_config, seed=1)
    save(tmp_path / "m", llama_config, other, overwrite=True)
    assert_same(load(tmp_path / "m", llama_config), other)


def test_disk_full_while_saving_leaves_the_old_folder(llama_config, tmp_path, monkeypatch):
    params = random_params(llama_config)
    save(tmp_path / "m", llama_config, params)

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path / "m", llama_config, random_params(llama_config, seed=1), overwrite=True)
    assert_same(load(tmp_path / "m", llama_config), params)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def edit(folder: Path, change) -> None:
    """Rewrite a single-file folder's tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({n: np.ascontiguousarray(x) for n, x in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            r"lacks the tensor model\.layers\.1\.mlp\.up_proj\.weight of a llama",
        ),
        (
            lambda t: t.update({"model.layers.3.mlp.up_proj.weight": np.zeros((2, 2), np.float32)}),
            r"model\.safetensors holds the tensor model\.layers\.3\.mlp\.up_proj\.weight, unknown to .* 3 layers",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(17, np.float32)}),
            r"model\.safetensors: model\.norm\.weight has shape \(17,\), but this model needs \(16,\)",
        ),
        (
            lambda t: t.update({n: x.T for n, x in t.items() if n.endswith("1.mlp.up_proj.weight")}),
            r"model\.layers\.1\.mlp\.up_proj\.weight has shape \(16, 24\), but this model needs \(24, 16\)",
        ),
        (
            lambda t: t.update({n: x.astype(np.float16) for n, x in t.items() if n.endswith("2.mlp.up_proj.weight")}),
            r"layers\.2\.mlp\.up_proj\.weight is float16, but model\.layers\.0\.mlp\.up_proj\.weight is float32",
        ),
        (
            lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}),
            r"lm_head\.weight differs from model\.embed_tokens\.weight",
        ),
        (
            lambda t: t.update({"vision_tower.x": np.zeros(1, np.float32)}),
            r"the tensor vision_tower\.x, unknown to a llama model",
        ),
    ],
    ids=["missing", "extra", "norm-shape", "transposed", "dtype", "untied-head", "vision"],
)
def test_a_checkpoint_that_does_not_fit_names_the_weight(llama_config, change, complaint, tmp_path):
    save(tmp_path / "m", llama_config, random_params(llama_config))
    edit(tmp_path / "m", change)
    with pytest.raises(ValueError, match=complaint):
        load(tmp_path / "m", llama_config)


def test_redundant_tensors_of_old_exporters_are_accepted(llama_config, tmp_path):
    params = random_params(llama_config)
    save(tmp_path / "m", llama_config, params)
    edit(
        tmp_path / "m",
        lambda t: t.update(
            {
                "lm_head.weight": t["model.embed_tokens.weight"],
                "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32),
            }
        ),
    )
    assert_same(load(tmp_path / "m", llama_config), params)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_multimodal_checkpoints_is_read(prefix, tmp_path):
    config = config_from_hf({"model_type": "gemma3_text", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8,
                             "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
                             "head_dim": 4})  # fmt: skip
    params = random_params(config)
    save(tmp_path / "m", config, params)

    def rename(tensors: dict) -> None:
        for name in list(tensors):
            tensors[prefix + name.removeprefix("model.")] = tensors.pop(name)
        tensors["vision_tower.patch"] = np.zeros(2, np.float32)

    edit(tmp_path / "m", rename)
    hf = json.loads((tmp_path / "m" / "config.json").read_text())
    nested = {"model_type": "gemma3", "text_config": hf, "vision_config": {}}
    (tmp_path / "m" / "config.json").write_text(json.dumps(nested))
    assert read_config(tmp_path / "m") == config
    assert_same(load(tmp_path / "m", config), params)


def test_another_architecture_is_refused(llama_config, tmp_path):
    save(tmp_path / "m", llama_config, random_params(llama_config))
    qwen = config_from_hf({**json.loads((tmp_path / "m" / "config.json").read_text()), "model_type": "qwen2"})
    with pytest.raises(ValueError, match="holds a llama model, but a qwen2 model is wanted"):
        load(tmp_path / "m", qwen)
    deeper = replace(llama_config, stacks=(replace(llama_config.stacks[0], repeats=4),))
    with pytest.raises(ValueError, match=r"model\.layers\.3\.input_layernorm\.weight"):
        load(tmp_path / "m", deeper)


def test_bad_config_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ValueError, match=r"config\.json: model_type 'mamba' is not supported"):
        read_config(tmp_path)


def test_only_whole_plain_trees_are_saved(llama_config, tmp_path):
    params = flatten(random_params(llama_config))
    path = ("stacks", "0", "0", "q_proj", "kernel")
    with pytest.raises(ValueError, match="lack stacks/0/0/q_proj/kernel"):
        save(tmp_path / "m", llama_config, nest({k: v for k, v in params.items() if k != path}))
    with pytest.raises(ValueError, match="have the unknown extra/x"):
        save(tmp_path / "m", llama_config, nest(params | {("extra", "x"): params[path]}))
    with pytest.raises(ValueError, match=r"q_proj/kernel has shape \(1,\)"):
        save(tmp_path / "m", llama_config, nest(params | {path: np.zeros(1, np.float32)}))
    leaf = LoRA(jnp.ones((3, 16, 32)), jnp.ones((3, 16, 1)), jnp.ones((3, 1, 32)), jnp.ones(3))
    with pytest.raises(ValueError, match="q_proj/kernel is a LoRA, not an array; merge adapters first"):
        save(tmp_path / "m", llama_config, nest(params | {path: leaf}))
    assert list(tmp_path.iterdir()) == []


TWO_PROCESSES = """
import sys, jax
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from jaxpost.config import MeshSection
from jaxpost.models.table import abstract_params, axes_tree, parameter_table
from jaxpost.sharding import make_mesh, param_shardings
from jaxpost.weights.huggingface import load, read_config, save
config = read_config(sys.argv[3])
table = parameter_table(config)
mesh = make_mesh(MeshSection(fsdp=4))
params = load(sys.argv[3], config, shardings=param_shardings(axes_tree(table), mesh, abstract_params(table)))
assert not params["embed"]["table"].is_fully_addressable
save(sys.argv[4], config, params)
"""


def test_two_processes_load_and_save_together(llama_config, tmp_path):
    save(tmp_path / "in", llama_config, random_params(llama_config), max_shard_bytes=5_000)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-c", TWO_PROCESSES, address]
    root = Path(huggingface.__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    running = [
        subprocess.Popen(
            [*command, str(rank), tmp_path / "in", tmp_path / "out"], env=env, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    assert_same(load(tmp_path / "out", llama_config), load(tmp_path / "in", llama_config))
