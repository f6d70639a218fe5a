"""Cross-entropy, label smoothing, DFT and AdamW against PyTorch and TRL."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import optax  # noqa: E402

from jaxpost.config import AdamWSection, ScheduleSection  # noqa: E402
from jaxpost.losses.supervised import cross_entropy, dft  # noqa: E402
from jaxpost.metrics.terms import means  # noqa: E402
from jaxpost.models.transformer import build_model  # noqa: E402
from jaxpost.train.optim import make_optimizer  # noqa: E402
from jaxpost.train.step import init_state, make_eval_step, make_train_step  # noqa: E402
from jaxpost.types import Model, Outputs, Term, TokenBatch  # noqa: E402
from jaxpost.weights import huggingface  # noqa: E402

ROWS, LENGTH, WIDTH, VOCAB = 3, 10, 12, 50
IGNORE = -100


def arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Hidden states of each position, head, tokens and a 0/1 mask of trained tokens."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)
    head = rng.normal(size=(WIDTH, VOCAB)).astype(np.float32)
    return hidden, head, rng.integers(0, VOCAB, (ROWS, LENGTH)), rng.random((ROWS, LENGTH)) < 0.6


def ours(loss: Any) -> tuple[float, np.ndarray]:
    """Loss and the gradient of the head."""
    hidden, head, tokens, mask = arrays()
    forward = lambda params, inputs, cache=None: Outputs(jnp.asarray(hidden))  # noqa: E731
    model = Model(None, (), lambda key: {}, forward, lambda p, h: h @ p["head"], lambda *_: None)
    ids = jnp.asarray(tokens, jnp.int32)
    ones = jnp.ones_like(ids)
    batch = TokenBatch(ids, jnp.cumsum(ones, 1) - 1, ones, jnp.asarray(mask, jnp.float32), jnp.arange(ROWS))
    evaluate = make_eval_step(partial(loss, model))
    total = lambda p: means(evaluate({"policy": p}, {}, batch, jax.random.key(0), {}))["loss"]  # noqa: E731
    value, grads = jax.value_and_grad(total)({"head": jnp.asarray(head)})
    return float(value), np.asarray(grads["head"])


def theirs(loss: Any) -> tuple[float, np.ndarray]:
    """The same from loss(logits, labels), labels not yet shifted and IGNORE where not trained."""
    hidden, head, tokens, mask = arrays()
    weight = torch.tensor(head, requires_grad=True)
    labels = torch.tensor(np.where(mask, tokens, IGNORE))
    value = loss(torch.tensor(hidden) @ weight, labels)
    value.backward()
    return value.item(), weight.grad.numpy()


@pytest.mark.parametrize("smoothing", [0.0, 0.15])
def test_cross_entropy_with_label_smoothing(smoothing: float) -> None:
    def reference(logits: Any, labels: Any) -> Any:
        flat = logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1)
        return torch.nn.functional.cross_entropy(*flat, label_smoothing=smoothing, ignore_index=IGNORE)

    (value, grad), (want, want_grad) = ours(partial(cross_entropy, label_smoothing=smoothing)), theirs(reference)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(grad, want_grad, rtol=1e-4, atol=1e-6)


def sft_trainer(tmp_path: Path, loss_type: str) -> Any:
    """TRL's trainer around a tiny Llama and a dataset that is tokenised already."""
    trl, transformers = pytest.importorskip("trl"), pytest.importorskip("transformers")
    tokenizers, datasets = pytest.importorskip("tokenizers"), pytest.importorskip("datasets")
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), eos_token="w1", pad_token="w2"
    )
    torch.manual_seed(0)
    return trl.SFTTrainer(
        transformers.LlamaForCausalLM(config).float(),
        trl.SFTConfig(
            output_dir=str(tmp_path), loss_type=loss_type, report_to=[], use_cpu=True, bf16=False,
            gradient_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None,
        ),
        train_dataset=datasets.Dataset.from_list([{"input_ids": [1, 2], "labels": [1, 2]}]),
        processing_class=tokenizer,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("loss_type", "loss"), [("nll", cross_entropy), ("dft", dft)])
def test_losses_equal_trls(tmp_path: Path, loss_type: str, loss: Any) -> None:
    """SFTTrainer.compute_loss on the same weights and batch, padded at the right; value and two gradients."""
    trainer = sft_trainer(tmp_path, loss_type)
    trainer.model.save_pretrained(tmp_path / "model")
    _, _, tokens, mask = arrays()
    real = np.arange(LENGTH) < np.asarray([[LENGTH], [LENGTH - 3], [LENGTH - 1]])
    inputs = {"input_ids": tokens, "attention_mask": real, "labels": np.where(mask & real, tokens, IGNORE)}
    value = trainer.compute_loss(trainer.model, {k: torch.tensor(x) for k, x in inputs.items()})
    value.backward()

    folder = tmp_path / "model"
    model = build_model(huggingface.read_config(folder))
    params = {"policy": huggingface.load(folder, model, dtype=jnp.float32)}
    ids = lambda x: jnp.asarray(x, jnp.int32)  # noqa: E731
    weights = jnp.asarray(mask & real, jnp.float32)
    batch = TokenBatch(ids(tokens), ids(np.arange(LENGTH) * real), ids(real), weights, jnp.arange(ROWS))
    evaluate = make_eval_step(partial(loss, model))
    total = lambda p: means(evaluate(p, {}, batch, jax.random.key(0), {}))["loss"]  # noqa: E731
    got, grads = jax.jit(jax.value_and_grad(total))(params)
    np.testing.assert_allclose(got, value.item(), rtol=1e-5)
    head, query = grads["policy"]["lm_head"]["kernel"], grads["policy"]["stacks"]["0"]["0"]["q_proj"]["kernel"]
    for ours, theirs in (
        (head, trainer.model.lm_head.weight),
        (query[1], trainer.model.model.layers[1].self_attn.q_proj.weight),
    ):
        want = theirs.grad.numpy().T
        assert np.linalg.norm(ours - want) < 2e-5 * np.linalg.norm(want)


@pytest.mark.parametrize("clip_norm", [None, 0.7])
def test_adamw_equals_torchs(clip_norm: float | None) -> None:
    rng = np.random.default_rng(0)
    start, targets = rng.normal(size=(4, 6)).astype(np.float32), rng.normal(size=(5, 4, 6)).astype(np.float32)
    schedule = ScheduleSection(kind="cosine", warmup=2.0, final=0.1)
    section = AdamWSection(lr=0.05, b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.3, clip_norm=clip_norm, schedule=schedule)
    tx, lr_at = make_optimizer(section, 5)

    def loss(params: Any, frozen: Any, batch: Any, key: Any, hyper: Any) -> Any:
        return {"square": Term(jnp.square(params["kernel"] - batch[0]), jnp.ones((4, 6)))}, {}

    step, state = jax.jit(make_train_step(loss, tx)), init_state({"kernel": jnp.asarray(start)}, tx)
    weight = torch.nn.Parameter(torch.tensor(start))
    reference = torch.optim.AdamW([weight], lr=0.05, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3)
    for t, target in enumerate(targets):
        state, metrics = step(state, {}, jnp.asarray(target)[None], jax.random.key(0), {})
        reference.param_groups[0]["lr"] = float(lr_at(t))
        reference.zero_grad()
        torch.square(weight - torch.tensor(target)).mean().backward()
        norm = torch.nn.utils.clip_grad_norm_([weight], clip_norm or float("inf"))
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
        reference.step()
        np.testing.assert_allclose(state.params["kernel"], weight.detach().numpy(), rtol=1e-5, atol=1e-6)
    assert optax.tree.norm(jax.tree.map(jnp.subtract, state.params, {"kernel": jnp.asarray(start)})) > 0.1
