"""Every preference loss, value and gradient, against float64 NumPy (`preference_oracles`); and values known by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from preference_oracles import ORACLES, Fixed, Pair

from jaxpost import config_preference_losses as sections
from jaxpost.assemble.preference_losses import PIECES, preference_hyper
from jaxpost.losses.preference.objective import combine
from jaxpost.losses.preference.pairs import answers_of
from jaxpost.metrics.terms import means, reduce_terms
from jaxpost.types import AnswerBatch

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


def loss_of(section: Any, batch: AnswerBatch, logprobs: Any, ref: Any, likeness: Any) -> tuple[Any, Any]:
    """The loss, with its weight set to 1, and all metrics."""
    answers = answers_of(batch, batch.weights, logprobs, ref, likeness=likeness, kl=0 * ref, shared=True)
    section = replace(section, weight=1.0)
    piece = PIECES[section.kind](section)
    memory = {piece.name: dict(piece.memory)} if piece.remember else {}
    out = means(reduce_terms(*combine([piece], answers, preference_hyper([section]), memory)[:2]))
    return out["loss"], out


@cache
def computed() -> Any:
    """Value, gradient by token and metrics of all sections, in one program."""
    batch, tokens = laid_out(known())
    arrays = [jnp.asarray(tokens[name], jnp.float32) for name in ("logprobs", "ref", "likeness")]

    def everything(logprobs: Any, *rest: Any) -> Any:
        one = lambda s: jax.value_and_grad(partial(loss_of, s, batch), has_aux=True)(logprobs, *rest)  # noqa: E731
        return [one(section) for section in SECTIONS]

    return jax.device_get(jax.jit(everything, compiler_options={"xla_backend_optimization_level": 0})(*arrays))


@every_section
def test_value_and_gradient_are_the_papers(index: int) -> None:
    section, ((value, _), grads) = SECTIONS[index], computed()[index]
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
