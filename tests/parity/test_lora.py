"""LoRA against PEFT, both ways: its folders give our logits, our folders give its logits, starts are alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
reference = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from jaxpost.adapters import lora, peft  # noqa: E402
from jaxpost.adapters.bind import bind, count, merge  # noqa: E402
from jaxpost.config import LoRASection  # noqa: E402
from jaxpost.models.table import flatten  # noqa: E402
from jaxpost.models.transformer import build_model  # noqa: E402
from jaxpost.types import Inputs  # noqa: E402
from jaxpost.weights import huggingface  # noqa: E402

# PEFT asks transformers by a name that is being replaced.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TOLERANCE = 2e-5
TOKENS = np.random.default_rng(0).integers(0, 60, (2, 9))
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def gemma() -> Any:
    config = transformers.Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, sliding_window=4, query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] + ["sliding_attention"] * 2,
    )  # fmt: skip
    return transformers.Gemma3ForCausalLM(config)


def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def base_folder(tmp_path: Path, make: Any) -> Path:
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def their_model(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def their_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def our_model(folder: Path) -> tuple[Any, Any]:
    model = build_model(huggingface.read_config(folder))
    return model, huggingface.load(folder, model, dtype=jnp.float32)


def our_logits(model: Any, params: Any) -> np.ndarray:
    tokens = jnp.asarray(TOKENS, jnp.int32)
    inputs = Inputs(tokens, jnp.tile(jnp.arange(tokens.shape[1]), (2, 1)), jnp.ones_like(tokens))
    return np.asarray(jax.jit(lambda p: model.unembed(p, model.forward(p, inputs).hidden))(params))


def assert_equal(got: np.ndarray, want: np.ndarray) -> None:
    assert np.abs(got - want).max() / np.abs(want).max() < TOLERANCE


def randomised(model: Any) -> Any:
    """A PEFT model as after training: neither factor is zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.add_(0.2 * torch.randn_like(p))
    return model.eval()


SETTINGS = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": LINEARS},
    "patterns": {
        "r": 4, "lora_alpha": 8, "target_modules": LINEARS,
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2, "down_proj": 6},
        "alpha_pattern": {"layers.0.mlp.up_proj": 3, "o_proj": 16},
    },
    "some layers": {"r": 3, "lora_alpha": 5, "target_modules": ["up_proj", "k_proj"], "layers_to_transform": [0, 2]},
}  # fmt: skip


@pytest.mark.parametrize("make", [llama, gemma], ids=["llama", "gemma3"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_their_folder_gives_our_logits_and_ours_theirs(tmp_path: Path, make: Any, settings: dict[str, Any]) -> None:
    folder = base_folder(tmp_path, make)
    theirs = randomised(reference.get_peft_model(their_model(folder), reference.LoraConfig(**settings)))
    want, plain = their_logits(theirs), their_logits(their_model(folder))
    theirs.save_pretrained(tmp_path / "theirs")

    model, base = our_model(folder)
    overlay, scales = peft.load(tmp_path / "theirs", model.config)
    bound = bind(base, overlay, scales)
    assert np.abs(want - plain).max() / np.abs(plain).max() > 0.05
    assert_equal(our_logits(model, base), plain)
    assert_equal(our_logits(model, bound), want)
    assert_equal(our_logits(model, merge(bound)), want)

    peft.save(tmp_path / "ours", model.config, overlay, scales, base_model=str(folder))
    back = reference.PeftModel.from_pretrained(their_model(folder), tmp_path / "ours").eval()
    assert_equal(their_logits(back), want)
    merged = huggingface.save(tmp_path / "merged", model.config, merge(bound))
    assert_equal(their_logits(their_model(merged)), want)


def test_a_head_adapter_crosses_over(tmp_path: Path) -> None:
    folder = base_folder(tmp_path, llama)
    config = reference.LoraConfig(r=4, lora_alpha=8, target_modules=["lm_head", "q_proj"])
    theirs = randomised(reference.get_peft_model(their_model(folder), config))
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)  # else the base weights come along
    model, base = our_model(folder)
    overlay, scales = peft.load(tmp_path / "theirs", model.config)
    assert_equal(our_logits(model, bind(base, overlay, scales)), their_logits(theirs))
    peft.save(tmp_path / "ours", model.config, overlay, scales, base_model=str(folder))
    back = reference.PeftModel.from_pretrained(their_model(folder), tmp_path / "ours").eval()
    assert_equal(their_logits(back), their_logits(theirs))


def test_new_adapters_are_alike(tmp_path: Path) -> None:
    """The same modules, sizes, scale and spread of the start as PEFT's all-linear."""
    folder = base_folder(tmp_path, llama)
    config = reference.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    theirs = reference.get_peft_model(their_model(folder), config)
    model, _ = our_model(folder)
    overlay, scales = lora.init(jax.random.key(0), model.table, LoRASection(rank=8, alpha=16.0))
    assert count(overlay) == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    layer = theirs.base_model.model.model.layers[0].mlp.down_proj
    assert {float(s) for x in flatten(scales).values() for s in x} == {layer.scaling["default"]}
    ours = np.concatenate([np.ravel(leaf.a) for leaf in flatten(overlay).values()])
    want = np.concatenate([p.detach().numpy().ravel() for n, p in theirs.named_parameters() if "lora_A" in n])
    np.testing.assert_allclose([abs(ours).max(), ours.std()], [abs(want).max(), want.std()], rtol=0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias = 'lora_only' is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    ],
)
def test_what_is_more_than_plain_lora_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    folder = base_folder(tmp_path, llama)
    config = reference.LoraConfig(r=2, target_modules=["q_proj"], **settings)
    reference.get_peft_model(their_model(folder), config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=message):
        peft.load(tmp_path / "theirs", our_model(folder)[0].config)
