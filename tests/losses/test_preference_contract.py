"""What every loss promises (`test_contract`), for preference losses: on rows of pairs, and for losses that couple rows.

All that a loss reads of a model passes through `measure`, so a mixture of losses that together read everything goes
through the model; what is left, a function of each answer's sums, is tested for every loss on sums alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_contract import QUICK, VOCAB, assert_close, model_of, params_of

from jaxpost import config_preference_losses as sections
from jaxpost import sharding
from jaxpost.assemble.preference_losses import PIECES, make_preference_loss, preference_hyper
from jaxpost.losses.preference.pairs import Answers, AnswerStats
from jaxpost.metrics.terms import means, reduce_term
from jaxpost.models.table import axes_tree
from jaxpost.train.coupled import uncoupled
from jaxpost.train.gradients import weights_only
from jaxpost.train.step import init_state, make_eval_step, make_train_step
from jaxpost.types import AnswerBatch, Coupled

ROWS, LENGTH, SEGMENTS = 8, 28, 8

MIXTURES = {
    "apart": (
        sections.DPOLoss(beta=0.3, margin=0.2, label_smoothing=0.1),
        sections.LDDPOLoss(beta=0.3, ld_alpha=0.4),
        sections.WPOLoss(beta=0.3),
        sections.ORPOLoss(),
        sections.NLLLoss(mean="token", weight=0.3),
        sections.XPOLoss(weight=0.05),
    ),
    "coupled": (
        sections.KTOLoss(beta=0.3, undesirable_weight=1.5),
        sections.AOTLoss(beta=0.3),
        sections.AOTUnpairedLoss(beta=0.3),
        sections.BCOLoss(beta=0.3, shift_decay=0.5),
    ),
}
every_mixture = pytest.mark.parametrize("name", MIXTURES)


# Batches


class Group(NamedTuple):
    """A prompt, and answers as (tokens, weights, rank)."""

    prompt: np.ndarray
    answers: tuple[tuple[np.ndarray, np.ndarray, int], ...]


@cache
def groups() -> tuple[Group, ...]:
    """A pair and an answer to another prompt in each; ragged lengths, some tokens without weight."""
    rng = np.random.default_rng(7)
    out = []
    for _ in range(ROWS):
        lengths, firsts = rng.integers(1, 6, 3), rng.permutation(VOCAB)[:3]
        answers = []
        for rank, n, first in zip((0, 1, -1), lengths, firsts, strict=True):
            weights = rng.choice([0.0, 1.0], n, p=[0.2, 0.8])
            weights[0] = 1.0
            # Answers of a group differ: of two equal ones, rounding alone would say which is better.
            answers.append((np.append(first, rng.integers(0, VOCAB, n - 1)), weights, rank))
        out.append(Group(rng.integers(0, VOCAB, rng.integers(1, 5)), tuple(answers)))
    return tuple(out)


def to_rows(
    rows: Sequence[Sequence[Group]], *, share: bool = False, left: bool = False, length: int = LENGTH
) -> AnswerBatch:
    """Each row's groups one after another; behind one copy of their prompt, or each answer behind its own."""
    shape, tables = (ROWS, length), (ROWS, SEGMENTS)
    arrays = {name: np.zeros(shape, np.int32) for name in ("tokens", "positions", "segments", "prefixes")}
    weights, table = np.zeros(shape, np.float32), np.zeros((2, *tables), np.int32)
    drawn = np.zeros(tables, np.float32)
    for r, row in enumerate(rows):
        pieces, segment = [], 0  # (tokens, first position, segment, prefix, weights)
        for g, group in enumerate(row):
            prefix, head, first = 0, group.prompt, 0
            if share and len(group.prompt) > 1:
                segment += 1
                pieces.append((head[:-1], 0, segment, 0, np.zeros(len(head) - 1)))
                prefix, head, first = segment, head[-1:], len(head) - 1
            for tokens, w, rank in group.answers:
                segment += 1
                table[:, r, segment - 1] = g + 1, rank
                drawn[r, segment - 1] = rank == 1
                pieces.append((np.append(head, tokens), first, segment, prefix, np.append(np.zeros(len(head)), w)))
        at = length - sum(len(p[0]) for p in pieces) if left else 0
        for tokens, first, segment, prefix, w in pieces:
            place = (r, slice(at, at + len(tokens)))
            arrays["tokens"][place], arrays["positions"][place] = tokens, np.arange(first, first + len(tokens))
            arrays["segments"][place], arrays["prefixes"][place], weights[place] = segment, prefix, w
            at += len(tokens)
    angle = arrays["tokens"] * 3.0 + arrays["positions"] * 7.0
    batch = AnswerBatch(
        arrays["tokens"], arrays["positions"], arrays["segments"], weights, np.arange(ROWS, dtype=np.int32), *table,
        strengths=np.ones(tables, np.float32), prefix_ids=arrays["prefixes"], from_reference=drawn,
        ref_logprobs=np.where(weights != 0, -4 + 2 * np.sin(angle), np.nan).astype(np.float32),
    )  # fmt: skip
    return jax.tree.map(jnp.asarray, batch)


def alone() -> AnswerBatch:
    return to_rows([[g] for g in groups()], length=2 * LENGTH)


# The gradient of a step


@cache
def compiled(name: str, *, microbatches: int = 1, axes: tuple[Any, ...] = (), dtype: Any = jnp.float32) -> Any:
    """A step whose new parameters are the gradients, jitted, and the state that it starts from."""
    mesh = sharding.make_mesh(dict(axes)) if axes else None
    loss = make_preference_loss(MIXTURES[name], model_of(mesh, dtype), mesh, chunk_tokens=24)
    rule = lambda optimizer, grads, state, **_: (grads, state.opt_state)  # noqa: E731
    step = make_train_step(loss, optax.identity(), num_microbatches=microbatches, update_rule=rule)
    start = partial(init_state, optimizer=optax.identity(), memory=loss.memory if isinstance(loss, Coupled) else ())
    return jax.jit(step, compiler_options=QUICK), start, mesh, step


def hyper_of(name: str) -> dict[str, Any]:
    return {key: jnp.float32(value) for key, value in preference_hyper(MIXTURES[name]).items()}


def gradient(name: str, batch: AnswerBatch, *, params: Any = None, eager: bool = False, **how: Any) -> Any:
    step, start, mesh, plain = compiled(name, **how)
    params = params_of() if params is None else params
    if mesh is not None:
        place = sharding.param_shardings(axes_tree(model_of().table), mesh, params["policy"])
        params = {"policy": jax.device_put(params["policy"], place)}
        batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    state, metrics = (plain if eager else step)(start(params), {}, batch, jax.random.key(1), hyper_of(name))
    assert not metrics["skipped"]
    return state.params, metrics


@cache
def reference(name: str) -> Any:
    """Gradient and metrics of one group a row, in one piece on one device."""
    return gradient(name, alone())


# The promises


@pytest.mark.slow
@every_mixture
def test_gradient_is_of_the_stated_loss(name: str) -> None:
    """The step's gradient is that of the whole batch's terms, taken plainly."""
    loss, key = make_preference_loss(MIXTURES[name], model_of(), chunk_tokens=1000), jax.random.key(1)
    plain = lambda p: means(make_eval_step(loss)(p, {}, alone(), key, hyper_of(name)))["loss"]  # noqa: E731
    grads = jax.jit(jax.grad(plain), compiler_options=QUICK)(params_of())
    assert_close((grads, {}), (reference(name)[0], {}))


@pytest.mark.slow
@every_mixture
@pytest.mark.parametrize("microbatches", [2, 8])
def test_microbatches(name: str, microbatches: int) -> None:
    assert_close(gradient(name, alone(), microbatches=microbatches), reference(name))


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("coupled", {"data": 2, "fsdp": 2, "tensor": 2}),
        pytest.param("coupled", {"data": 8}, marks=pytest.mark.slow),
        pytest.param("apart", {"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
    ],
)
def test_shards_and_microbatches(name: str, axes: dict[str, int]) -> None:
    assert_close(gradient(name, alone(), axes=tuple(axes.items()), microbatches=2), reference(name))


VARIANTS = {
    "packed": lambda g: to_rows([g[i : i + 2] for i in range(0, ROWS, 2)], length=2 * LENGTH),
    "shared prompts": lambda g: to_rows([g[i : i + 2] for i in range(0, ROWS, 2)], share=True, length=2 * LENGTH),
    "left padded": lambda g: to_rows([[x] for x in g], left=True, length=2 * LENGTH),
    "another order": lambda g: to_rows([[x] for x in g[::-1]], length=2 * LENGTH),
    "a masked group": lambda g: to_rows([[masked(g[0]), g[1]], [g[0]], *[[x] for x in g[2:]]], length=2 * LENGTH),
    "masked tokens behind": lambda g: to_rows([[longer(x)] for x in g], length=2 * LENGTH),
}


def masked(group: Group) -> Group:
    return group._replace(answers=tuple((tokens, 0 * weights, rank) for tokens, weights, rank in group.answers))


def longer(group: Group) -> Group:
    more = lambda tokens, weights: (np.append(tokens, [1, 2]), np.append(weights, [0.0, 0.0]))  # noqa: E731
    return group._replace(answers=tuple((*more(tokens, weights), rank) for tokens, weights, rank in group.answers))


@every_mixture
@pytest.mark.parametrize("variant", VARIANTS)
def test_layout_is_free(name: str, variant: str) -> None:
    """The same answers laid out otherwise: no attention between answers, nothing read of what has no weight."""
    assert_close(gradient(name, VARIANTS[variant](list(groups()))), reference(name))


@pytest.mark.slow
@every_mixture
def test_jit_is_eager(name: str) -> None:
    assert_close(gradient(name, alone(), eager=True), reference(name))


@every_mixture
def test_weights_do_not_read_params(name: str) -> None:
    loss = make_preference_loss(MIXTURES[name], model_of())
    loss = uncoupled(loss) if isinstance(loss, Coupled) else loss
    weights_only(loss, params_of(), {}, alone(), jax.random.key(1), hyper_of(name))  # raises where they do


@every_mixture
@pytest.mark.parametrize("microbatches", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_all_masked(name: str, microbatches: int) -> None:
    step, start, *_ = compiled(name, **({} if microbatches == 1 else {"microbatches": 2}))
    state, batch = start(params_of()), alone()._replace(weights=jnp.zeros((ROWS, 2 * LENGTH)))
    new, metrics = step(state, {}, batch, jax.random.key(1), hyper_of(name))
    assert (metrics["loss"], metrics["grad_norm"], metrics["empty"]) == (0, 0, 1)
    jax.tree.map(np.testing.assert_array_equal, new.params, state.params)


@every_mixture
@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)], ids=str)
def test_finite_at_extremes(name: str, dtype: Any) -> None:
    """Logits of +-1e4, so that probabilities are exactly 0 and 1."""
    params = jax.tree.map(jnp.array, params_of(dtype))
    head = params["policy"]["lm_head"]["kernel"]
    params["policy"]["lm_head"]["kernel"] = (1e4 * jnp.sign(head) / head.shape[0] ** 0.5).astype(dtype)
    grads, metrics = gradient(name, alone(), params=params, **({} if dtype == jnp.float32 else {"dtype": dtype}))
    assert np.isfinite(metrics["loss"])
    assert all(np.isfinite(g.astype(jnp.float32)).all() for g in jax.tree.leaves(grads))


@every_mixture
def test_hyper_never_recompiles(name: str) -> None:
    step, start, *_ = compiled(name)
    states = [
        step.trace(start(params_of()), {}, alone(), jax.random.key(1), {k: f * v for k, v in hyper_of(name).items()})
        for f in (1.0, 0.5, 0.0)
    ]
    assert states[0].jaxpr is states[1].jaxpr is states[2].jaxpr


# Every loss, on sums


def all_sections() -> list[Any]:
    return [one() for one in sections.PreferenceLossSection.__args__]  # ty: ignore[unresolved-attribute]


@cache
def program() -> Any:
    """Every loss of three rows of a pair and an answer to another prompt: gradients by kind, values and weights."""
    table = lambda *x: jnp.tile(jnp.asarray(x), (3, 1))  # noqa: E731

    def losses(logprob: Any, length: Any) -> tuple[Any, Any]:
        stats = AnswerStats(logprob, length, 0.5 * length - 3, 0 * length, logprob, 0.5 * length - 3, -length)
        answers = Answers(stats, table(1, 1, 1), table(0, 1, -1), table(1.0, 1.0, 1.0), table(0.0, 1.0, 0.0))
        terms = {section.kind: term_of(section, answers) for section in all_sections()}
        values = jnp.stack([means({"": reduce_term(term)})["loss"] for term in terms.values()])
        return values, (values, [term.weight for term in terms.values()])

    return jax.jit(jax.jacrev(losses, has_aux=True), compiler_options=QUICK)


def term_of(section: Any, answers: Answers) -> Any:
    piece, hyper = PIECES[section.kind](section), preference_hyper([section])
    own = {name.split("/")[1]: value for name, value in hyper.items()}
    own |= {} if piece.remember is None else piece.remember(answers, own, piece.memory)
    return piece.term(answers, own)


def on_sums(logprob: np.ndarray, length: np.ndarray) -> dict[str, tuple[Any, Any, Any]]:
    """kind -> (value, weights, gradient)."""
    grads, (values, weights) = program()(logprob, length)
    return {s.kind: x for s, x in zip(all_sections(), zip(values, weights, grads, strict=True), strict=True)}


LENGTHS = np.array([[3.0, 2.0, 4.0], [1.0, 5.0, 2.0], [2.0, 2.0, 1.0]], np.float32)


@pytest.mark.parametrize("logprob", [0.0, -1e5], ids=["certain", "impossible"])
def test_every_loss_is_finite(logprob: float) -> None:
    for side in range(2):
        table = np.full((3, 3), -2.0, np.float32)
        table[:, side] = logprob
        for kind, (value, _, grad) in on_sums(table, LENGTHS).items():
            assert np.isfinite(value), kind
            assert np.isfinite(grad).all(), kind
            assert np.isfinite(np.linalg.norm(grad)), kind


def test_no_loss_of_a_pair_with_an_empty_side() -> None:
    """Its weight is 0 and so is its gradient, whatever stands in it; pairs beside it are what they are without it."""
    empty, table = LENGTHS.copy(), np.full((3, 3), -2.0, np.float32)
    empty[1] = 0
    for kind, (value, weight, grad) in on_sums(table, empty).items():
        assert np.isfinite(value), kind
        np.testing.assert_array_equal(grad[1], 0, err_msg=kind)
        assert np.sum(weight) > 0, kind
    for kind, (value, weight, grad) in on_sums(table, 0 * empty).items():
        assert value == 0, kind
        assert np.sum(weight) == 0, kind
        np.testing.assert_array_equal(grad, 0, err_msg=kind)


def test_weights_of_every_loss_come_from_the_batch() -> None:
    known = on_sums(np.full((3, 3), -2.0, np.float32), LENGTHS)
    broken = on_sums(np.full((3, 3), np.nan, np.float32), LENGTHS)
    for kind, (value, weight, _) in broken.items():
        np.testing.assert_array_equal(weight, known[kind][1], err_msg=kind)
        assert np.isnan(value), kind
