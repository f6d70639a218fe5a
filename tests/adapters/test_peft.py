"""PEFT adapter folders: what is written and read back, and what bad folders get. Against PEFT itself: tests/parity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxpost.adapters import lora, peft
from jaxpost.adapters.bind import LowRank
from jaxpost.config import LoRASection
from jaxpost.models.config import BlockConfig, ModelConfig, RopeConfig, StackConfig
from jaxpost.models.table import parameter_table

# Gemma's shape of stacks: layers 0, 1, 2, 3 are blocks (0, 0), (0, 1), (0, 0), (0, 1), and layer 4 a stack of its own.
KINDS = (BlockConfig(rope=RopeConfig(), window=3), BlockConfig(rope=RopeConfig()))
CONFIG = ModelConfig(
    family="llama", vocab_size=24, width=16, mlp_width=24, heads=2, kv_heads=1, head_dim=8,
    stacks=(StackConfig(repeats=2, period=KINDS), StackConfig(repeats=1, period=KINDS[:1])), max_positions=64,
    tie_embeddings=False,
)  # fmt: skip
TABLE = parameter_table(CONFIG)


def adapter(*targets: str, rank: int = 3, **settings: Any) -> tuple[Any, Any]:
    section = LoRASection(rank=rank, alpha=6.0, targets=targets or ("all-linear",), **settings)
    overlay, scales = lora.init(jax.random.key(0), TABLE, section)
    return jax.tree.map(lambda x: x + 1.0, overlay), scales


def write(folder: Path, *targets: str, **settings: Any) -> Path:
    return peft.save(folder / "adapter", CONFIG, *adapter(*targets, **settings), base_model="org/base")


def edit(folder: Path, **settings: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_round_trip_is_exact(tmp_path: Path) -> None:
    overlay, scales = adapter("all-linear", "lm_head")
    folder = peft.save(tmp_path / "a", CONFIG, overlay, scales, base_model="org/base")
    loaded = peft.load(folder, CONFIG)
    jax.tree.map(np.testing.assert_array_equal, loaded, (overlay, scales))
    assert jax.tree.structure(loaded) == jax.tree.structure((overlay, scales))


def test_names_shapes_and_layers(tmp_path: Path) -> None:
    overlay, _ = adapter()
    tensors = load_file(write(tmp_path) / "adapter_model.safetensors")
    assert len(tensors) == 5 * 7 * 2
    for layer, (stack, block, repeat) in enumerate([(0, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 0)]):
        leaf = overlay["stacks"][str(stack)][str(block)]["down_proj"]["kernel"]
        name = f"base_model.model.model.layers.{layer}.mlp.down_proj"
        np.testing.assert_array_equal(tensors[f"{name}.lora_A.weight"], leaf.a[repeat].T)
        np.testing.assert_array_equal(tensors[f"{name}.lora_B.weight"], leaf.b[repeat].T)


def test_the_config_says_what_is_needed(tmp_path: Path) -> None:
    settings = json.loads((write(tmp_path, "q_proj", "stacks/1/*/v_proj") / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["model.layers.4.self_attn.v_proj", "q_proj"]
    assert (settings["r"], settings["lora_alpha"], settings["use_rslora"]) == (3, 6.0, False)
    assert (settings["base_model_name_or_path"], settings["task_type"]) == ("org/base", "CAUSAL_LM")
    assert settings["rank_pattern"] == settings["alpha_pattern"] == {}


def test_rslora_round_trip(tmp_path: Path) -> None:
    overlay, scales = adapter(rslora=True, rank=5)
    folder = peft.save(tmp_path / "a", CONFIG, overlay, scales, base_model="x", rslora=True)
    assert json.loads((folder / "adapter_config.json").read_text())["lora_alpha"] == 6.0
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), peft.load(folder, CONFIG), (overlay, scales))


def test_ranks_and_alphas_by_layer(tmp_path: Path) -> None:
    """Layer 2 has rank 2 and alpha 8, all others rank 4 and alpha 4: one stack, the smaller filled up with zeros."""
    rng = np.random.default_rng(0)
    folder = write(tmp_path, "q_proj")
    tensors = {}
    for layer in range(5):
        rank = 2 if layer == 2 else 4
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = rng.normal(size=(rank, 16)).astype(np.float32)
        tensors[f"{name}.lora_B.weight"] = rng.normal(size=(16, rank)).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    edit(folder, r=4, lora_alpha=4, rank_pattern={"layers.2.self_attn.q_proj": 2}, alpha_pattern={r"layers\.2.*": 8})
    overlay, scales = peft.load(folder, CONFIG)
    leaf = overlay["stacks"]["0"]["0"]["q_proj"]["kernel"]
    assert leaf.a.shape == (2, 16, 4)
    np.testing.assert_array_equal(leaf.a[1, :, 2:], np.zeros((16, 2)))
    np.testing.assert_array_equal(leaf.b[1, 2:], np.zeros((2, 16)))
    np.testing.assert_array_equal(scales["stacks"]["0"]["0"]["q_proj"]["kernel"], [1.0, 4.0])
    again = peft.save(tmp_path / "again", CONFIG, overlay, scales, base_model="x")
    for name, tensor in load_file(again / "adapter_model.safetensors").items():
        np.testing.assert_array_equal(tensor, tensors[name])
    settings = json.loads((again / "adapter_config.json").read_text())
    assert settings["rank_pattern"] == {r"model\.layers\.2\.self_attn\.q_proj": 2}
    assert settings["alpha_pattern"] == {r"model\.layers\.2\.self_attn\.q_proj": 8.0}
    jax.tree.map(np.testing.assert_array_equal, peft.load(again, CONFIG), (overlay, scales))


def test_layers_without_adapter_are_zero_and_not_written(tmp_path: Path) -> None:
    folder = write(tmp_path, "q_proj")
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({k: x for k, x in tensors.items() if ".layers.2." not in k}, folder / "adapter_model.safetensors")
    overlay, scales = peft.load(folder, CONFIG)
    leaf = overlay["stacks"]["0"]["0"]["q_proj"]["kernel"]
    assert not leaf.a[1].any()
    assert not leaf.b[1].any()
    again = peft.save(tmp_path / "again", CONFIG, overlay, scales, base_model="x")
    assert set(load_file(again / "adapter_model.safetensors")) == {k for k in tensors if ".layers.2." not in k}
    targets = json.loads((again / "adapter_config.json").read_text())["target_modules"]
    assert targets == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1, 3, 4)]


def test_half_precision_files_are_read(tmp_path: Path) -> None:
    overlay, scales = adapter("q_proj")
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), overlay)
    folder = peft.save(tmp_path / "a", CONFIG, low, scales, base_model="x")
    loaded, _ = peft.load(folder, CONFIG)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y.astype(jnp.float32)), loaded, low)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"bias": "all"}, "bias = 'all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\] is not supported"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"something_new": 3}, "something_new = 3 is not supported"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base model's weights"),
        ({"r": None}, "r is missing or no number"),
        (
            {"r": 7},
            r"lora_A.weight has shape \(3, 16\), but the model and adapter_config.json \(rank 7\) need \(7, 16\)",
        ),
    ],
)
def test_options_that_plain_lora_does_not_have(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    folder = write(tmp_path)
    edit(folder, **settings)
    with pytest.raises(ValueError, match=message) as error:
        peft.load(folder, CONFIG)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t | {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": np.ones((3, 16), np.float32)},
            "layers.9.*unknown",
        ),
        (
            lambda t: {k: x for k, x in t.items() if "0.self_attn.q_proj.lora_B" not in k},
            "lacks .*q_proj.lora_B.weight",
        ),
        (
            lambda t: {"base_model.model.model.embed_tokens.lora_embedding_A": np.ones((2, 2), np.float32)},
            "embed_tokens",
        ),
        (lambda t: {}, "holds no adapter"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, change: Any, message: str) -> None:
    folder = write(tmp_path)
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(ValueError, match=message):
        peft.load(folder, CONFIG)


def test_pickles_are_refused_unread(tmp_path: Path) -> None:
    folder = write(tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_model\.safetensors"):
        peft.load(folder, CONFIG)
    (folder / "adapter_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(FileNotFoundError, match="is a pickle, which can run code and is never read"):
        peft.load(folder, CONFIG)


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    folder = write(tmp_path)
    (folder / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        peft.load(folder, CONFIG)
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        peft.load(tmp_path / "nothing", CONFIG)


def test_save_refuses_what_peft_cannot_hold(tmp_path: Path) -> None:
    overlay, scales = adapter("q_proj")
    for stranger in (
        {"embed": {"table": LowRank(jnp.ones((24, 1)), jnp.ones((1, 16)))}},
        {"final_norm": {"scale": jnp.ones(16)}},
    ):
        with pytest.raises(ValueError, match="is no low-rank update of a linear layer"):
            peft.save(tmp_path / "a", CONFIG, overlay | stranger, scales, base_model="x")
    zero = jax.tree.map(jnp.zeros_like, overlay)
    with pytest.raises(ValueError, match="the adapter is zero everywhere"):
        peft.save(tmp_path / "a", CONFIG, zero, scales, base_model="x")
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_kept(tmp_path: Path) -> None:
    folder = write(tmp_path)
    with pytest.raises(FileExistsError, match="exists already"):
        write(tmp_path)
    peft.save(folder, CONFIG, *adapter("v_proj"), base_model="new", overwrite=True)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "new"
