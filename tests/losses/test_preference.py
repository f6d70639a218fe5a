"""Every preference loss, value and gradient, against float64 NumPy (`preference_oracles`); and values known by hand."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from preference_oracles import ORACLES, Fixed, Pair

from jaxpost import config_preference_losses as sections
from jaxpost.assemble.preference_losses import PIECES, make_preference_loss, preference_hyper, reads_reference
from jaxpost.losses.preference.objective import Needs, measure
from jaxpost.losses.preference.pairs import Answers, AnswerStats, answers_of, sides
from jaxpost.losses.preference.unpaired import kl_baseline, no_shift, remember_shift
from jaxpost.metrics.terms import means, reduce_term
from jaxpost.train.step import make_eval_step
from jaxpost.types import AnswerBatch, Model, Outputs

SECTIONS = [
    sections.DPOLoss(),
    sections.DPOLoss(label_smoothing=0.2, margin=0.3),
    sections.DPOLoss(divergence="forward_kl"),
    sections.DPOLoss(divergence="jensen_shannon", beta=0.7),
    sections.DPOLoss(divergence="alpha", alpha=0.3, margin=0.1),
    sections.DPONormLoss(beta=3.0, margin=0.2),
    sections.LDDPOLoss(ld_alpha=0.3, beta=0.5),
    sections.WPOLoss(label_smoothing=0.1),
    sections.RobustLoss(label_smoothing=0.2),
    sections.HingeLoss(beta=0.4),
    sections.IPOLoss(beta=0.3),
    sections.IPOSumLoss(beta=0.3),
    sections.EXOLoss(beta=0.6),
    sections.EXOLoss(divergence="forward_kl", label_smoothing=0.1),
    sections.NCALoss(beta=0.5),
    sections.BCOPairLoss(beta=0.5),
    sections.SPPOLoss(beta=0.2),
    sections.APOZeroLoss(beta=0.5),
    sections.APODownLoss(beta=0.5),
    sections.DiscoPOPLoss(),
    sections.AOTLoss(label_smoothing=0.1),
    sections.AOTUnpairedLoss(beta=0.4),
    sections.KTOLoss(beta=0.5, desirable_weight=1.3, undesirable_weight=0.7),
    sections.BCOLoss(beta=0.5, undesirable_weight=0.5),
    sections.APOZeroUnpairedLoss(beta=0.5, desirable_weight=1.5),
    sections.ORPOLoss(odds_weight=0.4),
    sections.SimPOLoss(label_smoothing=0.1),
    sections.AlphaPOLoss(),
    sections.AlphaPOLoss(alpha=-0.5),
    sections.AlphaPOLoss(alpha=0.0),
    sections.CPOLoss(label_smoothing=0.1),
    sections.NLLLoss(),
    sections.NLLLoss(mean="token"),
    sections.NLLLoss(mean="sum"),
    sections.XPOLoss(),
]


def name_of(section: Any) -> str:
    default = type(section)()
    changed = {k: v for k, v in vars(section).items() if v != getattr(default, k)}
    return section.kind + "".join(f"-{v}" for v in changed.values())


every_section = pytest.mark.parametrize("index", range(len(SECTIONS)), ids=[name_of(s) for s in SECTIONS])


# One batch of six pairs, for the library and for the oracles

PAIRS = 6
QUICK = {"xla_backend_optimization_level": 0}


@cache
def known() -> tuple[Pair, ...]:
    rng = np.random.default_rng(4)
    out = []
    for i in range(PAIRS):
        n, m, k = rng.integers(1, 6, 3)
        logp = lambda n: -rng.gamma(2.0, 0.4, n)  # noqa: E731
        c, r, other = logp(n), logp(m), np.stack([logp(k) + 0.4, logp(k)])
        near = lambda x: x + rng.normal(0, 0.6, x.shape)  # noqa: E731
        out.append(Pair(c, r, near(c), near(r), 0.3 * near(c), 0.3 * near(r), other, strength=float(i % 3 + 1)))
    return tuple(out)


def laid_out(pairs: tuple[Pair, ...]) -> tuple[AnswerBatch, dict[str, np.ndarray]]:
    """Two pairs in a row, their sides in turns, each with an answer to another prompt; per-token arrays at targets.

    Segment 1 is a prompt that all answers of the row share.
    """
    width, rows = 48, (len(pairs) + 1) // 2
    names = ("logprobs", "ref", "likeness", "weights")
    tokens = {name: np.zeros((rows, width)) for name in names}
    segments, tables = np.zeros((rows, width), np.int32), np.zeros((3, rows, 8), np.int32)
    strengths, drawn = np.ones((rows, 8)), np.zeros((rows, 8))
    for row in range(rows):
        segments[row, :3], at, segment = 1, 3, 1
        for g, p in enumerate(pairs[2 * row : 2 * row + 2]):
            chosen_first = (row + g) % 2
            parts = [(0, p.c, p.ref_c, p.like_c), (1, p.r, p.ref_r, p.like_r)][:: 1 if chosen_first else -1]
            for rank, now, ref, like in [*parts, (-1, *p.other, np.zeros(p.other.shape[1]))]:
                segment += 1
                place = (row, slice(at, at + len(now)))
                for name, x in zip(names, (now, ref, like, np.ones(len(now))), strict=True):
                    tokens[name][place] = x
                segments[place] = segment
                tables[:2, row, segment - 1] = g + 1, rank
                strengths[row, segment - 1] = p.strength
                drawn[row, segment - 1] = rank == (0 if (2 * row + g) % 2 else 1)
                at += len(now)
    ids = jnp.zeros((rows, width), jnp.int32)
    batch = AnswerBatch(
        ids, ids, jnp.asarray(segments), jnp.asarray(tokens["weights"], jnp.float32), jnp.arange(rows),
        jnp.asarray(tables[0]), jnp.asarray(tables[1]), jnp.asarray(strengths, jnp.float32),
        from_reference=jnp.asarray(drawn, jnp.float32),
    )  # fmt: skip
    return batch, tokens


@cache
def computed() -> tuple[np.ndarray, np.ndarray]:
    """Value and gradient by token of all sections, their weights set to 1, in one program."""
    batch, tokens = laid_out(known())
    logprobs, ref, likeness = (jnp.asarray(tokens[name], jnp.float32) for name in ("logprobs", "ref", "likeness"))

    def values(logprobs: Any) -> tuple[Any, Any]:
        answers = answers_of(batch, batch.weights, logprobs, ref, likeness=likeness, shared=True)
        out = jnp.stack([loss_of(replace(section, weight=1.0), answers) for section in SECTIONS])
        return out, out

    grads, out = jax.jit(jax.jacrev(values, has_aux=True), compiler_options=QUICK)(logprobs)
    return np.asarray(out), np.asarray(grads)


def loss_of(section: Any, answers: Any) -> Any:
    piece, hyper = PIECES[section.kind](section), preference_hyper([section])
    own = {name.split("/")[1]: value for name, value in hyper.items()}
    own |= {} if piece.remember is None else piece.remember(answers, own, piece.memory)
    return means({"": reduce_term(piece.term(answers, own))})["loss"]


@every_section
def test_value_and_gradient_are_the_papers(index: int) -> None:
    section, value, grads = SECTIONS[index], *(x[index] for x in computed())
    h = vars(section) | {"fixed": Fixed()}
    oracle = ORACLES[section.kind]
    np.testing.assert_allclose(value, oracle(known(), h), rtol=2e-5, atol=1e-6)
    batch, _ = laid_out(known())
    segments, groups, ranks = (np.asarray(x) for x in (batch.segment_ids, batch.groups, batch.ranks))
    eps = 1e-6
    for i, pair in enumerate(known()):
        row, group = divmod(i, 2)
        for rank, side in ((0, "c"), (1, "r")):
            column = int(np.flatnonzero((groups[row] == group + 1) & (ranks[row] == rank))[0])
            got = grads[row][segments[row] == column + 1]
            for t in range(len(getattr(pair, side))):
                moved = []
                for sign in (1, -1):
                    array = getattr(pair, side).copy()
                    array[t] += sign * eps
                    changed = replace(pair, **{side: array})
                    moved.append(oracle([*known()[:i], changed, *known()[i + 1 :]], h))
                want = (moved[0] - moved[1]) / (2 * eps)
                np.testing.assert_allclose(got[t], want, rtol=1e-4, atol=2e-6, err_msg=f"pair {i} side {side}")
        other = np.flatnonzero((groups[row] == group + 1) & (ranks[row] == -1))
        np.testing.assert_array_equal(grads[row][np.isin(segments[row], other + 1)], 0, err_msg="a baseline is fixed")


def test_every_section_is_tested() -> None:
    kinds = {one.kind for one in sections.PreferenceLossSection.__args__}  # ty: ignore
    assert kinds == {section.kind for section in SECTIONS} == set(PIECES) == set(ORACLES)


# Values known by hand


def quiet() -> tuple[Any, Any, AnswerBatch]:
    """A bigram table as the model, its parameters, and a batch of two pairs of one row each, one of them a tie."""
    forward = lambda params, inputs, cache=None: Outputs(jnp.take(params["table"], inputs.tokens, axis=0))  # noqa: E731
    model = Model(None, (), lambda key: {}, forward, lambda params, hidden: hidden @ params["head"], lambda *_: None)
    rng = np.random.default_rng(1)
    params = {"table": rng.normal(size=(7, 4)), "head": rng.normal(size=(4, 7))}
    rows = lambda *x: jnp.asarray(x)  # noqa: E731
    tokens = rows([0, 1, 2, 0, 3, 4, 5, 0], [0, 2, 6, 6, 0, 1, 0, 0])
    segments = rows([1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 2, 2, 0, 0])
    weights = rows([0.0, 1, 1, 0, 1, 1, 1, 0], [0.0, 1, 1, 1, 0, 1, 0, 0])
    batch = AnswerBatch(
        tokens, tokens, segments, weights, jnp.arange(2), rows([1, 1], [1, 1]), rows([1, 0], [0, 0]), jnp.ones((2, 2))
    )
    return model, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params), batch


def told(these: list[Any], *, frozen: Any = None, batch: Any = None, live: bool = True) -> dict[str, float]:
    model, params, whole = quiet()
    loss = make_preference_loss(these, model, live_reference=live)
    frozen = {"reference": params} if frozen is None else frozen
    evaluate = jax.jit(make_eval_step(loss), compiler_options=QUICK)
    out = evaluate({"policy": params}, frozen, batch or whole, jax.random.key(0), preference_hyper(these))
    return {name: float(x) for name, x in means(out).items()} | {f"n/{k}": float(s.weight) for k, s in out.items()}


def test_a_policy_that_is_its_own_reference() -> None:
    """Margins are 0, DPO is ln 2, IPO its square of 1 / (2 beta); a tie is no pair."""
    out = told([sections.DPOLoss(), sections.IPOLoss(beta=0.25), sections.HingeLoss(), sections.APOZeroLoss()])
    assert out["dpo"] == pytest.approx(math.log(2), rel=1e-6)
    assert (out["ipo"], out["hinge"], out["apo_zero"]) == (4.0, 1.0, 1.0)
    assert (out["rewards/chosen"], out["rewards/rejected"], out["rewards/margin"], out["kl"]) == (0, 0, 0, 0)
    assert out["rewards/accuracy"] == 0.5
    assert (out["n/dpo"], out["n/rewards/margin"]) == (1, 1)


def test_metrics_by_hand() -> None:
    """Against the table's log-probabilities: the pair's rank 0 is its second answer; the tie's two count as chosen."""
    _, params, _ = quiet()
    logits = np.asarray(params["table"] @ params["head"], np.float64)
    logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    path = lambda *tokens: sum(logp[a, b] for a, b in itertools.pairwise(tokens))  # noqa: E731
    chosen, rejected, ties = path(0, 3, 4, 5), path(0, 1, 2), (path(0, 2, 6, 6), path(0, 1))
    out = told([sections.SimPOLoss(beta=2.0, gamma=0.5)], live=False)
    margin = 2 * chosen / 3 - 2 * rejected / 2
    assert out["simpo"] == pytest.approx(math.log1p(math.exp(0.5 - margin)), rel=1e-5)
    assert out["rewards/margin"] == pytest.approx(margin, rel=1e-5)
    assert out["rewards/accuracy"] == float(margin > 0)
    assert out["logprobs/rejected"] == pytest.approx(rejected, rel=1e-5)
    assert out["logprobs/chosen"] == pytest.approx((chosen + sum(ties)) / 3, rel=1e-5)
    assert (out["tokens/chosen"], out["tokens/rejected"], out["n/tokens/chosen"]) == (pytest.approx(7 / 3), 2, 3)


def test_a_live_reference_is_one_that_came_with_the_batch() -> None:
    model, params, batch = quiet()
    other = jax.tree.map(lambda x: 0.5 * x, params)
    scored = measure(model, {"policy": other}, {}, batch, jax.random.key(0), {}, needs=Needs(reference=False))
    tokens = per_token_logprobs(model, other, batch)
    assert float(jnp.sum(tokens)) == pytest.approx(float(jnp.sum(scored.stats.logprob)), rel=1e-6)
    these = [sections.DPOLoss(), sections.KTOLoss()]
    live = told(these, frozen={"reference": other, "base": params})
    assert live == pytest.approx(told(these, frozen={"base": other}), rel=1e-6)
    assert live == pytest.approx(told(these, batch=batch._replace(ref_logprobs=tokens), live=False), rel=1e-6)
    assert live["rewards/margin"] != 0
    assert live["kl"] > 0


def per_token_logprobs(model: Any, params: Any, batch: AnswerBatch) -> Any:
    logp = jax.nn.log_softmax(model.unembed(params, jnp.take(params["table"], batch.tokens, axis=0)))
    before = jnp.take_along_axis(logp[:, :-1], batch.tokens[:, 1:, None], axis=2)[..., 0]
    return jnp.pad(before, ((0, 0), (1, 0))) * batch.weights


def test_what_is_missing_is_said() -> None:
    model, *_ = quiet()
    with pytest.raises(ValueError, match="ref_logprobs, which were not computed"):
        told([sections.DPOLoss()], live=False)
    with pytest.raises(ValueError, match="no from_reference"):
        told([sections.XPOLoss()], live=False)
    for these in ([], [sections.DPOLoss(), sections.DPOLoss(beta=1.0)]):
        with pytest.raises(ValueError, match="each by a name of its own"):
            make_preference_loss(these, model)


def test_which_losses_read_a_reference() -> None:
    free = {s.kind for s in SECTIONS if not reads_reference([s])}
    assert free == {"orpo", "simpo", "alphapo", "cpo", "nll", "xpo"}
    assert reads_reference([sections.NLLLoss(), sections.DPOLoss()])


def test_pairs_are_the_ends_of_a_group() -> None:
    """Three answers give best against worst; two of the best, a single answer and an empty side give none."""
    table = lambda *x: jnp.asarray([x])  # noqa: E731
    stats = AnswerStats(-jnp.arange(1.0, 11.0)[None], table(1.0, 1, 1, 1, 1, 1, 1, 1, 0, 1))
    groups, ranks = table(1, 1, 1, 2, 2, 2, 3, 4, 4, 0), table(1, 2, 0, 0, 0, 1, 0, 0, 1, 0)
    pairs = sides(Answers(stats, groups, ranks, table(3.0, 3, 3, 1, 1, 1, 1, 1, 1, 1)))
    assert pairs.weight.tolist() == [[1, 0, 0, 0, 0]]
    assert (float(pairs.chosen.logprob[0, 0]), float(pairs.rejected.logprob[0, 0]), pairs.strength[0, 0]) == (-3, -2, 3)


def test_baseline_of_kto_is_never_negative() -> None:
    table = lambda *x: jnp.asarray([x])  # noqa: E731
    of = lambda other: Answers(  # noqa: E731
        AnswerStats(table(0.0, 0.0, other), table(1.0, 1.0, 2.0), jnp.zeros((1, 3))), table(1, 2, 2), table(0, 1, -1),
        jnp.ones((1, 3)),
    )  # fmt: skip
    assert [float(kl_baseline(of(x))) for x in (3.0, -3.0)] == [3.0, 0.0]


def test_shift_of_bco_is_an_unbiased_running_mean() -> None:
    """Of batches whose shifts are 1 and 4, with decay 1/2: 1, then (1/2 1 + 1 4) / (1/2 + 1)."""
    table = lambda *x: jnp.asarray([x])  # noqa: E731
    of = lambda good, bad: Answers(  # noqa: E731
        AnswerStats(table(good, bad), jnp.ones((1, 2)), jnp.zeros((1, 2))), table(1, 2), table(0, 1), jnp.ones((1, 2))
    )
    hyper = {"beta": 2.0, "shift_decay": 0.5}
    first = remember_shift(of(2.0, -1.0), hyper, no_shift())
    second = remember_shift(of(5.0, -1.0), hyper, first)
    assert [float(x["shift"]) for x in (first, second)] == pytest.approx([1.0, 3.0])
