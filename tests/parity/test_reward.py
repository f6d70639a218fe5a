"""Reward models against transformers, PEFT and TRL: scores of the same folders, and the loss on the same rewards."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from jaxpost.adapters import peft as our_peft
from jaxpost.adapters.bind import bind
from jaxpost.generate.scoring import Scorer
from jaxpost.losses.reward import ranking_loss
from jaxpost.metrics.terms import means, reduce_terms
from jaxpost.models import heads
from jaxpost.models.families import config_to_hf
from jaxpost.models.transformer import build_model
from jaxpost.types import AnswerBatch, Model, Outputs
from jaxpost.weights import heads as stored_heads
from jaxpost.weights import huggingface

torch = pytest.importorskip("torch")

TINY = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip
GEMMA = {**TINY, "num_hidden_layers": 7, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 5}
FAMILIES = {"llama": TINY, "qwen2": TINY, "qwen3": {**TINY, "head_dim": 16}, "gemma3_text": GEMMA}
SEQUENCES = [np.random.default_rng(i).integers(1, 61, n).tolist() for i, n in enumerate((3, 9, 17, 12))]
PADDED = torch.tensor([s + [0] * (17 - len(s)) for s in SEQUENCES])
MASK = torch.tensor([[1] * len(s) + [0] * (17 - len(s)) for s in SEQUENCES])


def theirs(family: str, auto: type, folder: Path, labels: int):
    """A random classifier of transformers, saved."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **FAMILIES[family], num_labels=labels)
    model = auto.from_config(config).eval()
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    return model


def ours(folder: Path):
    """The folder's model and head, read by us: (model, params, stored head)."""
    model = build_model(replace(huggingface.read_config(folder), tie_embeddings=True))
    stored = stored_heads.read_head(folder)
    head = jax.tree.map(jnp.asarray, stored.params)
    return model, {"policy": huggingface.load(folder, model, trunk=True), "head": head}, stored


def scores(model: Model, params, places) -> list[np.ndarray]:
    return Scorer(model, lambda p, h: heads.score(p["head"], h))(params, SEQUENCES, places)


def resaved(folder: Path, model: Model, params, stored) -> Path:
    fields = stored_heads.head_config(config_to_hf(model.config), stored.labels, tokens=stored.tokens)
    head = (params["head"], stored_heads.head_sources(params["head"]), fields | {"pad_token_id": 0})
    return huggingface.save(folder, model.config, params["policy"], head=head)


@pytest.mark.parametrize("family", FAMILIES)
def test_sequence_classifiers_score_alike_in_and_out(family, tmp_path):
    auto = transformers.AutoModelForSequenceClassification
    reference = theirs(family, auto, tmp_path / "in", labels=3)
    with torch.no_grad():
        expected = reference(PADDED, attention_mask=MASK).logits.numpy()
    model, params, stored = ours(tmp_path / "in")
    assert (stored.outputs, stored.tokens) == (3, False)
    found = scores(model, params, [[len(s) - 1] for s in SEQUENCES])
    np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-4)
    back = auto.from_pretrained(resaved(tmp_path / "out", model, params, stored)).eval()
    assert type(back) is type(reference)
    with torch.no_grad():
        np.testing.assert_allclose(back(PADDED, attention_mask=MASK).logits.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_token_classifiers_score_alike_in_and_out(family, tmp_path):
    auto = transformers.AutoModelForTokenClassification
    reference = theirs(family, auto, tmp_path / "in", labels=2)
    torch.nn.init.normal_(reference.score.bias)
    reference.save_pretrained(tmp_path / "in")
    with torch.no_grad():
        expected = reference(PADDED, attention_mask=MASK).logits.numpy()
    model, params, stored = ours(tmp_path / "in")
    assert stored.tokens
    for row, each in enumerate(scores(model, params, [list(range(len(s))) for s in SEQUENCES])):
        np.testing.assert_allclose(each, expected[row, : len(each)], atol=1e-4)
    back = auto.from_pretrained(resaved(tmp_path / "out", model, params, stored)).eval()
    with torch.no_grad():
        again = back(PADDED, attention_mask=MASK).logits.numpy()
    np.testing.assert_allclose(again[MASK.numpy() > 0], expected[MASK.numpy() > 0], atol=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT, about transformers
def test_an_adapter_with_its_head_goes_to_peft_and_back(tmp_path):
    peft = pytest.importorskip("peft")
    auto = transformers.AutoModelForSequenceClassification
    base = theirs("llama", auto, tmp_path / "base", labels=1)
    settings = peft.LoraConfig(task_type="SEQ_CLS", r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"],
                               init_lora_weights=False)  # fmt: skip
    adapted = peft.get_peft_model(base, settings).eval()
    torch.nn.init.normal_(adapted.base_model.model.score.modules_to_save["default"].weight)
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted(PADDED, attention_mask=MASK).logits.numpy()
    model, params, _ = ours(tmp_path / "base")
    overlay, scales = our_peft.load(tmp_path / "adapter", model.config, trunk=True)
    head = our_peft.load_head(tmp_path / "adapter")
    tree = {"policy": bind(params["policy"], overlay, scales), "head": head}
    found = scores(model, tree, [[len(s) - 1] for s in SEQUENCES])
    np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-4)
    our_peft.save(tmp_path / "ours", model.config, overlay, scales, base_model=str(tmp_path / "base"), head=head)
    back = auto.from_pretrained(tmp_path / "base", num_labels=1)
    back = peft.PeftModel.from_pretrained(back, tmp_path / "ours").eval()
    with torch.no_grad():
        np.testing.assert_allclose(back(PADDED, attention_mask=MASK).logits.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize(("margin", "centre"), [(False, None), (True, None), (True, 0.01)])
def test_bradley_terry_is_trls_loss_on_equal_rewards(margin, centre):
    trl = pytest.importorskip("trl")
    rng = np.random.default_rng(0)
    rewards, margins = rng.normal(size=(2, 6)).astype(np.float32), rng.uniform(size=6).astype(np.float32)
    trainer = SimpleNamespace(
        args=SimpleNamespace(center_rewards_coefficient=centre),
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    model = lambda **_: SimpleNamespace(logits=torch.tensor(rewards.reshape(-1, 1)))  # noqa: E731
    inputs = {"attention_mask": torch.ones(12, 1)} | ({"margin": torch.tensor(margins)} if margin else {})
    expected = trl.RewardTrainer.compute_loss(trainer, model, inputs).item()
    # One pair a row, each answer one token whose hidden state is its reward.
    row = lambda *x: jnp.tile(jnp.array([x]), (6, 1))  # noqa: E731
    given = Model(None, (), None, lambda p, _: Outputs(p), None, None)
    batch = AnswerBatch(row(1, 1), row(0, 0), row(1, 2), row(1.0, 1.0), jnp.arange(6), row(1, 1), row(0, 1),
                        jnp.stack([margins, margins], axis=1))  # fmt: skip
    hyper = {"margin": 1.0 if margin else 0.0, "centre": centre or 0.0}
    params = {"policy": jnp.asarray(rewards.T[:, :, None])}
    found = ranking_loss(given, lambda p, h: h, params, {}, batch, jax.random.key(0), hyper, centred=centre is not None)
    assert float(means(reduce_terms(*found))["loss"]) == pytest.approx(expected, rel=1e-6)
