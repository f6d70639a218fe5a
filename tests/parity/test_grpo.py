"""Policy losses against TRL's GRPOTrainer on equal log-probabilities, advantages and masks: value and gradient."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from trl import GRPOTrainer  # noqa: E402

from jaxpost.losses.aggregate import constant_mean, sequence_mean, token_mean  # noqa: E402
from jaxpost.losses.kl import k3, plain  # noqa: E402
from jaxpost.losses.policy import policy_gradient  # noqa: E402
from jaxpost.losses.rescore import logprobs_and_entropy  # noqa: E402
from jaxpost.losses.surrogates import cispo, gspo, ppo, sapo  # noqa: E402
from jaxpost.metrics.terms import means, reduce_terms  # noqa: E402
from jaxpost.rl.advantages import grpo, rloo, uncertain  # noqa: E402
from jaxpost.types import Model, Outputs, RolloutBatch  # noqa: E402

ROWS, PROMPT, ANSWER, VOCAB, WIDTH = 6, 3, 7, 11, 5
LOW, HIGH, DELTA, BETA = 0.2, 0.28, 1.6, 0.15
TAUS = {"tau_positive": 0.8, "tau_negative": 1.3}


def arrays() -> dict[str, np.ndarray]:
    """Tokens, ragged masks with a hole (a tool's turn), advantages per sample, log-probabilities per token."""
    rng = np.random.default_rng(0)
    lengths = np.array([7, 4, 1, 6, 7, 3])
    mask = (np.arange(ANSWER) < lengths[:, None]).astype(np.float32)
    mask[0, 2] = 0
    out = {"mask": mask, "advantages": np.array([1.2, -0.7, 0.4, -1.5, 0.9, -0.2], np.float32)}
    out["hidden"] = rng.normal(size=(ROWS, PROMPT + ANSWER, WIDTH)).astype(np.float32)
    out["head"] = rng.normal(size=(WIDTH, VOCAB)).astype(np.float32)
    out["tokens"] = rng.integers(0, VOCAB, (ROWS, PROMPT + ANSWER))
    logits = out["hidden"] @ out["head"]
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    now = np.take_along_axis(logp[:, PROMPT - 1 : -1], out["tokens"][:, PROMPT:, None], -1)[..., 0]
    out["old"] = (now + rng.normal(0, 0.5, now.shape)).astype(np.float32)
    out["ref"] = (now + rng.normal(0, 0.5, now.shape)).astype(np.float32)
    return out


def theirs(
    loss_type: str, level: str, delta: float | None, beta: float, high: float, *, top: float = 1.0
) -> tuple[float, np.ndarray, dict]:
    """`GRPOTrainer._compute_loss` on its own, its trainer's settings beside it."""
    a = {name: torch.tensor(value) for name, value in arrays().items()}
    head = a["head"].clone().requires_grad_(True)
    logp = torch.log_softmax(a["hidden"] @ head, -1)[:, PROMPT - 1 : -1]
    now = torch.gather(logp, -1, a["tokens"][:, PROMPT:, None])[..., 0]
    entropies = -(logp.exp() * logp).sum(-1)
    accelerator = SimpleNamespace(
        num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x,
        pad_across_processes=lambda x, dim, pad_index: x,
    )  # fmt: skip
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (now, entropies.detach(), None),
        args=SimpleNamespace(
            delta=delta, use_bias_correction_kl=False, steps_per_generation=1,
            sapo_temperature_pos=TAUS["tau_positive"], sapo_temperature_neg=TAUS["tau_negative"],
        ),
        model=SimpleNamespace(training=True), _metrics=defaultdict(lambda: defaultdict(list)), accelerator=accelerator,
        aux_loss_enabled=False, top_entropy_quantile=top, off_policy_mask_threshold=None, beta=beta, use_vllm=False,
        importance_sampling_level=level, loss_type=loss_type, epsilon_low=LOW, epsilon_high=high,
        current_gradient_accumulation_steps=1, max_completion_length=ANSWER, _entropy_bonus_enabled=False,
    )  # fmt: skip
    trainer.get_high_entropy_mask = partial(GRPOTrainer.get_high_entropy_mask, trainer)
    inputs = {
        "prompt_ids": a["tokens"][:, :PROMPT], "prompt_mask": torch.ones(ROWS, PROMPT),
        "completion_ids": a["tokens"][:, PROMPT:], "completion_mask": a["mask"], "advantages": a["advantages"],
        "old_per_token_logps": a["old"], "ref_per_token_logps": a["ref"], "num_items_in_batch": a["mask"].sum(),
    }  # fmt: skip
    value = GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    value.backward()
    return value.item(), head.grad.numpy(), trainer._metrics["train"]


def ours(
    high: float, delta: float | None, beta: float, *, top: float = 1.0, **how: Any
) -> tuple[dict[str, float], np.ndarray]:
    a = arrays()
    forward = lambda params, inputs, cache=None: Outputs(jnp.asarray(a["hidden"]))  # noqa: E731
    model = Model(None, (), lambda key: {}, forward, lambda p, h: h @ p["head"], lambda *_: None)
    whole = lambda x: jnp.asarray(np.concatenate([np.zeros((ROWS, PROMPT)), x], 1), jnp.float32)  # noqa: E731
    ids = jnp.asarray(a["tokens"], jnp.int32)
    ones = jnp.ones_like(ids)
    batch = RolloutBatch(
        ids, jnp.cumsum(ones, 1) - 1, ones, whole(a["mask"]), jnp.arange(ROWS),
        whole(np.broadcast_to(a["advantages"][:, None], (ROWS, ANSWER))), whole(a["old"]), None, whole(a["ref"]),
    )  # fmt: skip
    if top < 1:
        said = logprobs_and_entropy(model, {"head": jnp.asarray(a["head"])}, batch, {})
        high_entropy = uncertain(said["entropy"], batch.weights, top)
        batch = batch._replace(advantages=jnp.where(high_entropy, batch.advantages, 0.0))
    hyper = (
        TAUS | {"clip_low": LOW, "clip_high": high, "kl_coef": beta} | ({} if delta is None else {"dual_clip": delta})
    )

    def total(params: Any) -> Any:
        key = jax.random.key(0)
        out = means(reduce_terms(*policy_gradient(model, {"policy": params}, {}, batch, key, hyper, **how)))
        return out["loss"], out

    grads, metrics = jax.grad(total, has_aux=True)({"head": jnp.asarray(a["head"])})
    return {name: float(x) for name, x in metrics.items()}, np.asarray(grads["head"])


MEANS = {"grpo": sequence_mean, "bnpo": token_mean, "dapo": token_mean, "dr_grpo": constant_mean(ANSWER)}


@pytest.mark.parametrize("beta", [0.0, BETA])
@pytest.mark.parametrize("delta", [None, DELTA])
@pytest.mark.parametrize("loss_type", MEANS)
def test_grpo_and_its_aggregates(loss_type: str, delta: float | None, beta: float) -> None:
    kl = plain(k3) if beta else None
    metrics, grad = ours(HIGH, delta, beta, surrogate=ppo, aggregate=MEANS[loss_type], kl=kl)
    value, want, told = theirs(loss_type, "token", delta, beta, HIGH)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["entropy"], told["entropy"][0], rtol=1e-5)
    if beta:
        np.testing.assert_allclose(metrics["kl"], told["kl"][0], rtol=1e-5)
    if delta is None:
        for side in ("low", "high"):
            np.testing.assert_allclose(metrics[f"clip_{side}"], told[f"clip_ratio/{side}_mean"][0], rtol=1e-5)


def test_gspo() -> None:
    """Ratios of whole sequences; all weights of a sample are alike there, and so in ours."""
    metrics, grad = ours(HIGH, None, 0.0, surrogate=gspo, aggregate=sequence_mean)
    value, want, _ = theirs("grpo", "sequence", None, 0.0, HIGH)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-6)


def test_cispo() -> None:
    """Its epsilon_high is the cap itself, ours the distance from 1."""
    metrics, grad = ours(0.4, None, 0.0, surrogate=cispo, aggregate=token_mean)
    value, want, _ = theirs("cispo", "token", None, 0.0, 1.4)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-6)


def test_sapo() -> None:
    metrics, grad = ours(HIGH, None, BETA, surrogate=sapo, aggregate=sequence_mean, kl=plain(k3))
    value, want, _ = theirs("sapo", "token", None, BETA, HIGH)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-6)


def test_luspo() -> None:
    """GSPO's loss times the sample's length is the sum over its tokens, where each has the sample's ratio."""
    metrics, grad = ours(HIGH, None, 0.0, surrogate=gspo, aggregate=constant_mean(1))
    value, want, _ = theirs("luspo", "sequence", None, 0.0, HIGH)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("loss_type", "top"), [("grpo", 0.2), ("dapo", 0.5)])
def test_top_entropy(loss_type: str, top: float) -> None:
    """The KL term stays on every token, and so does what the mean divides by."""
    how = {"surrogate": ppo, "aggregate": MEANS[loss_type], "kl": plain(k3)}
    metrics, grad = ours(HIGH, None, BETA, top=top, **how)
    value, want, _ = theirs(loss_type, "token", None, BETA, HIGH, top=top)
    assert abs(value - theirs(loss_type, "token", None, BETA, HIGH)[0]) > 0.01, "it makes a difference"
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-6)


def test_advantages_of_groups() -> None:
    """TRL's formulas, written with torch: group mean, deviation with n - 1, 1e-4; leave-one-out."""
    rewards = torch.tensor([[1.0, 0.0, 0.5, 1.0], [0.25, 0.0, 1.0, -1.0]])
    want = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    groups = jnp.repeat(jnp.arange(2), 4)
    np.testing.assert_allclose(grpo(jnp.asarray(rewards.numpy().ravel()), groups), want.ravel(), rtol=1e-5)
    others = (rewards.sum(1, keepdim=True) - rewards) / 3
    np.testing.assert_allclose(
        rloo(jnp.asarray(rewards.numpy().ravel()), groups), (rewards - others).ravel(), rtol=1e-5
    )
