"""Preference losses against TRL's on the same log-probabilities per token: value, gradient and metrics."""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from trl import DPOTrainer, KTOTrainer  # noqa: E402
from trl.experimental.cpo import CPOTrainer  # noqa: E402
from trl.experimental.orpo import ORPOTrainer  # noqa: E402

from jaxpost import config_preference_losses as sections  # noqa: E402
from jaxpost.assemble.preference_losses import PIECES, preference_hyper  # noqa: E402
from jaxpost.losses.preference.objective import combine  # noqa: E402
from jaxpost.losses.preference.pairs import answers_of  # noqa: E402
from jaxpost.metrics.terms import means, reduce_terms  # noqa: E402
from jaxpost.types import AnswerBatch  # noqa: E402

PAIRS, TOKENS = 6, 7


@cache
def arrays() -> dict[str, np.ndarray]:
    """Of chosen, then rejected answers, then answers to other prompts: log-probabilities by token, 0 behind the end."""
    rng = np.random.default_rng(3)
    mask = (np.arange(TOKENS) < rng.integers(1, TOKENS + 1, 3 * PAIRS)[:, None]).astype(np.float32)
    now = -rng.gamma(2.0, 0.5, mask.shape)
    ref, squares = now + rng.normal(-0.1, 0.5, mask.shape), now + rng.normal(0, 0.5, mask.shape)
    return {"mask": mask} | {
        name: (mask * x).astype(np.float32) for name, x in (("now", now), ("ref", ref), ("squares", squares))
    }


def known(name: str) -> Any:
    return torch.tensor(arrays()[name])


def settings(**more: Any) -> SimpleNamespace:
    """What a trainer's loss reads of its trainer."""
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    defaults = {
        "accelerator": accelerator, "model": SimpleNamespace(training=True), "aux_loss_enabled": False,
        "_metrics": defaultdict(lambda: defaultdict(list)), "_total_train_tokens": 0, "_tp_size": 1, "beta": 0.1,
        "precompute_ref_logps": True, "ld_alpha": None, "f_divergence_type": "reverse_kl", "label_smoothing": 0.0,
        "f_alpha_divergence_coef": 0.5, "use_weighting": False, "args": SimpleNamespace(discopop_tau=0.05),
        "loss_types": ["sigmoid"], "loss_weights": [1.0],
    }  # fmt: skip
    return SimpleNamespace(**(defaults | more))


def network(now: Any, squares: Any) -> Any:
    """A model whose log-probabilities are given; its training flag is what the losses ask for."""
    zero = torch.zeros_like(now)
    outputs = SimpleNamespace(
        log_probs=now, log_sum_sq_probs=squares, entropy=zero, mean_logits=zero, is_top1=zero.bool()
    )
    return lambda **_: outputs


def inputs(mask: Any) -> dict[str, Any]:
    first = torch.zeros(len(mask), 1)
    whole = torch.cat([first, mask], 1)
    return {"input_ids": whole.long(), "attention_mask": torch.ones_like(whole), "completion_mask": whole}


def theirs_of_pairs(**how: Any) -> tuple[float, np.ndarray, Any]:
    pairs = slice(0, 2 * PAIRS)
    now = known("now")[pairs].requires_grad_(True)
    trainer = settings(**how)
    batch = inputs(known("mask")[pairs])
    ref = known("ref")[pairs]
    if trainer.ld_alpha is not None:
        model = network(ref, known("squares")[pairs])
        sides = DPOTrainer.compute_ref_log_probs(_without_context(trainer), model, batch)
    else:
        sides = ref.sum(1).chunk(2)
    batch |= dict(zip(("ref_chosen_logps", "ref_rejected_logps"), sides, strict=True))
    value = DPOTrainer._compute_loss(trainer, network(now, known("squares")[pairs]), batch, False)
    value.backward()
    return value.item(), now.grad.numpy(), trainer._metrics["train"]


def _without_context(trainer: SimpleNamespace) -> SimpleNamespace:
    import contextlib

    trainer.ref_model, trainer.args.gradient_checkpointing_kwargs = object(), None
    trainer.accelerator.autocast = contextlib.nullcontext
    return trainer


@pytest.fixture(autouse=True)
def plain_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in for a model has no layers to switch checkpointing off in."""
    import contextlib

    import trl.trainer.dpo_trainer as module

    monkeypatch.setattr(module, "disable_gradient_checkpointing", lambda *_: contextlib.nullcontext())


def theirs_of_answers(loss_type: str, beta: float, up: float, down: float) -> tuple[float, np.ndarray, Any]:
    pairs = slice(0, 2 * PAIRS)
    now = known("now")[pairs].requires_grad_(True)
    other = slice(2 * PAIRS, 3 * PAIRS)
    trainer = settings(
        loss_type=loss_type, beta=beta, desirable_weight=up, undesirable_weight=down, calculate_KL=loss_type == "kto",
        _compute_kl_logps=lambda *_: known("now")[other].sum(1),
    )  # fmt: skip
    batch = inputs(known("mask")[pairs]) | {"label": torch.arange(2 * PAIRS) < PAIRS}
    batch |= {"ref_logps": known("ref")[pairs].sum(1), "ref_KL_logps": known("ref")[other].sum(1)}
    value = KTOTrainer._compute_loss(trainer, network(now, known("squares")[pairs]), batch, False)
    value.backward()
    return value.item(), now.grad.numpy(), trainer._metrics["train"]


def ours(*these: Any) -> tuple[float, np.ndarray, dict[str, float]]:
    """Every row an example: its chosen answer, its rejected one, and an answer to another prompt."""
    row = lambda x: jnp.asarray(np.concatenate(np.split(x, 3), axis=1))  # noqa: E731
    table = lambda *x: jnp.tile(jnp.asarray(x), (PAIRS, 1))  # noqa: E731
    segments = jnp.tile(jnp.repeat(jnp.arange(1, 4), TOKENS), (PAIRS, 1))
    mask, ref, squares = (row(arrays()[name]) for name in ("mask", "ref", "squares"))
    batch = AnswerBatch(
        segments, segments, segments, mask, jnp.arange(PAIRS), table(1, 1, 1), table(0, 1, -1), table(1.0, 1.0, 1.0)
    )
    pieces = [PIECES[section.kind](section) for section in these]
    memory = {piece.name: dict(piece.memory) for piece in pieces if piece.remember}

    def total(now: Any) -> Any:
        answers = answers_of(batch, mask, now, ref, likeness=jax.lax.stop_gradient(now) - squares, shared=True)
        out = means(reduce_terms(*combine(pieces, answers, preference_hyper(these), memory)[:2]))
        return out["loss"], out

    grad, out = jax.grad(total, has_aux=True)(row(arrays()["now"]))
    grad = np.concatenate(np.split(np.asarray(grad), 3, axis=1))[: 2 * PAIRS]
    return float(out["loss"]), grad, {name: float(x) for name, x in out.items()}


def assert_equal(mine: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    np.testing.assert_allclose(mine[0], other[0], rtol=1e-5)
    mask = arrays()["mask"][: 2 * PAIRS]
    np.testing.assert_allclose(mine[1] * mask, other[1] * mask, rtol=1e-4, atol=1e-6)


DIVERGENCES = {
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "jensen_shannon": {"f_divergence_type": "js_divergence"},
    # TRL counts alpha from the other end.
    "alpha": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1 - 0.3},
}
OF_PAIRS = {
    "dpo": ([sections.DPOLoss(beta=0.3)], {"beta": 0.3}),
    "hinge": ([sections.HingeLoss(beta=0.3)], {"loss_types": ["hinge"], "beta": 0.3}),
    "ipo": ([sections.IPOLoss(beta=0.3)], {"loss_types": ["ipo"], "beta": 0.3}),
    "exo": ([sections.EXOLoss(beta=0.3)], {"loss_types": ["exo_pair"], "beta": 0.3, "label_smoothing": 1e-3}),
    "nca": ([sections.NCALoss(beta=0.3)], {"loss_types": ["nca_pair"], "beta": 0.3}),
    "robust": (
        [sections.RobustLoss(beta=0.3, label_smoothing=0.2)],
        {"loss_types": ["robust"], "beta": 0.3, "label_smoothing": 0.2},
    ),
    "bco_pair": ([sections.BCOPairLoss(beta=0.3)], {"loss_types": ["bco_pair"], "beta": 0.3}),
    "sppo": ([sections.SPPOLoss(beta=0.3)], {"loss_types": ["sppo_hard"], "beta": 0.3}),
    "aot": (
        [sections.AOTLoss(beta=0.3, label_smoothing=0.1)],
        {"loss_types": ["aot"], "beta": 0.3, "label_smoothing": 0.1},
    ),
    "aot_unpaired": ([sections.AOTUnpairedLoss(beta=0.3)], {"loss_types": ["aot_unpaired"], "beta": 0.3}),
    "apo_zero": ([sections.APOZeroLoss(beta=0.3)], {"loss_types": ["apo_zero"], "beta": 0.3}),
    "apo_down": ([sections.APODownLoss(beta=0.3)], {"loss_types": ["apo_down"], "beta": 0.3}),
    "discopop": ([sections.DiscoPOPLoss()], {"loss_types": ["discopop"], "beta": 0.05}),
    "dpo_norm": ([sections.DPONormLoss(beta=2.0)], {"loss_types": ["sigmoid_norm"], "beta": 2.0}),
    "nll": ([sections.NLLLoss(mean="token")], {"loss_types": ["sft"]}),
    "ld_dpo": ([sections.LDDPOLoss(ld_alpha=0.3)], {"ld_alpha": 0.3}),
    "wpo": ([sections.WPOLoss()], {"use_weighting": True}),
    "mixture": (
        [sections.DPOLoss(beta=0.2), sections.BCOPairLoss(beta=0.2), sections.NLLLoss(mean="token", weight=0.7)],
        {"loss_types": ["sigmoid", "bco_pair", "sft"], "loss_weights": [1.0, 1.0, 0.7], "beta": 0.2},
    ),
} | {name: ([sections.DPOLoss(divergence=name, alpha=0.3)], how) for name, how in DIVERGENCES.items()}


@pytest.mark.parametrize("name", OF_PAIRS)
def test_losses_of_pairs(name: str) -> None:
    these, how = OF_PAIRS[name]
    mine, (value, grad, told) = ours(*these), theirs_of_pairs(**how)
    assert_equal(mine, (value, grad))
    if name == "dpo":
        names = {"rewards/chosen": "rewards/chosen", "rewards/rejected": "rewards/rejected"}
        names |= {"rewards/margin": "rewards/margins", "rewards/accuracy": "rewards/accuracies"}
        names |= {"logprobs/chosen": "logps/chosen", "logprobs/rejected": "logps/rejected"}
        for key, other in names.items():
            np.testing.assert_allclose(mine[2][key], told[other][-1], rtol=1e-5, err_msg=key)


@pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired"])
def test_losses_of_answers(kind: str) -> None:
    make = {"kto": sections.KTOLoss, "apo_zero_unpaired": sections.APOZeroUnpairedLoss}[kind]
    mine = ours(make(beta=0.3, desirable_weight=1.2, undesirable_weight=0.8))
    value, grad, told = theirs_of_answers(kind, 0.3, 1.2, 0.8)
    assert_equal(mine, (value, grad))
    for side in ("chosen", "rejected"):
        np.testing.assert_allclose(mine[2][f"rewards/{side}"], told[f"rewards/{side}"][-1], rtol=1e-5)


def theirs_free(trainer: Any, compare: Any, *, mean: bool, nll: float) -> tuple[float, np.ndarray]:
    """TRL's loss of both sides' log-probabilities, and `nll` times their mean over all chosen tokens."""
    now = known("now")[: 2 * PAIRS].requires_grad_(True)
    lengths = known("mask")[: 2 * PAIRS].sum(1)
    logps = now.sum(1) / (lengths if mean else 1)
    value = compare(trainer, *logps.chunk(2)) - nll * now[:PAIRS].sum() / lengths[:PAIRS].sum()
    value.backward()
    return value.item(), now.grad.numpy()


@pytest.mark.parametrize("kind", ["cpo", "simpo", "alphapo", "orpo"])
def test_losses_without_reference(kind: str) -> None:
    beta, gamma, token_nll = 0.4, 0.3, sections.NLLLoss(mean="token", weight=0.5)
    common = {"beta": beta, "alpha": 0.0, "simpo_gamma": gamma, "label_smoothing": 0.1, "loss_type": "simpo"}
    cpo = lambda trainer, c, r: CPOTrainer.cpo_loss(trainer, c, r)[0].mean()  # noqa: E731
    orpo = lambda trainer, c, r: -ORPOTrainer.odds_ratio_loss(trainer, c, r)[0].mean()  # noqa: E731
    same = {"beta": beta, "label_smoothing": 0.1}
    if kind == "cpo":  # TRL's likelihood term has the mean over tokens of the batch
        these = [sections.CPOLoss(nll_coef=0.0, **same), token_nll]
        other = theirs_free(settings(**common | {"loss_type": "sigmoid"}), cpo, mean=False, nll=0.5)
    elif kind == "simpo":
        these, other = [sections.SimPOLoss(gamma=gamma, **same)], theirs_free(settings(**common), cpo, mean=True, nll=0)
    elif kind == "alphapo":
        these = [sections.AlphaPOLoss(gamma=gamma, alpha=0.25, **same)]
        other = theirs_free(settings(**common | {"alpha": 0.25}), cpo, mean=True, nll=0)
    else:  # the likelihood of our ORPO has the mean of each answer: here we take it away again
        these = [sections.ORPOLoss(odds_weight=beta), sections.NLLLoss(weight=-1.0)]
        other = theirs_free(settings(beta=beta), orpo, mean=True, nll=0)
    assert_equal(ours(*these), other)
