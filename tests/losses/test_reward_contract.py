"""What every loss promises (`test_contract`), for reward models: all objectives at once on one transformer and head."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_contract import QUICK, VOCAB, assert_close, model_of, params_of

from jaxpost import sharding
from jaxpost.losses.policy import joined
from jaxpost.losses.reward import label_loss, plackett_luce, ranking_loss, squared_error
from jaxpost.models import heads
from jaxpost.models.table import axes_tree
from jaxpost.train.gradients import weights_only
from jaxpost.train.step import init_state, make_train_step
from jaxpost.types import AnswerBatch

ROWS, LENGTH, COLUMNS = 8, 48, 10
HYPER = {"margin": 0.5, "label_smoothing": 0.1, "centre": 0.02}


def loss_on(model):
    """Every objective, each on its own outputs of the head."""
    head = lambda part: lambda params, hidden: heads.score(params["head"], hidden)[..., part]  # noqa: E731
    ranked, labelled = partial(ranking_loss, model), partial(label_loss, model)

    def quiet(loss):
        return lambda *args: (loss(*args)[0], {})

    return joined(
        quiet(partial(ranked, head(slice(0, 2)), centred=True)),
        quiet(partial(ranked, head(slice(2, 3)), objective=plackett_luce, name="plackett_luce")),
        quiet(partial(labelled, head(slice(3, 7)), members=2, classes=2, at="tokens")),
        quiet(partial(labelled, head(slice(7, 8)), objective=squared_error, name="regression")),
    )


@cache
def examples():
    """A pair, a tie in a ranking, and single answers: [(prompt, [(tokens, rank)])] of ragged lengths."""
    rng = np.random.default_rng(5)
    draw = lambda n: rng.integers(0, VOCAB, n)  # noqa: E731
    ranks = ([0, 1], [1, 0, 1], [0], [0, 1, 2], [0, 1], [0], [1, 0], [0, 1])
    return [(draw(rng.integers(1, 5)), [(draw(rng.integers(1, 6)), rank) for rank in group]) for group in ranks]


def to_rows(rows, *, share=False):
    """Rows of groups, each answer behind its own prompt or all of a group behind one."""
    ints = {name: np.zeros((ROWS, LENGTH), np.int32) for name in ("tokens", "positions", "segments", "prefixes")}
    floats = {name: np.zeros((ROWS, LENGTH), np.float32) for name in ("weights", "marks", "labels")}
    groups, ranks = np.zeros((2, ROWS, COLUMNS), np.int32)
    strengths = np.zeros((ROWS, COLUMNS), np.float32)
    for r, row in enumerate(rows):
        at = segment = 0
        for g, (prompt, answers) in enumerate(row):
            prefix, lead, first = 0, prompt, 0
            if share and len(prompt) > 1:
                segment, prefix, lead, first = segment + 1, segment + 1, prompt[-1:], len(prompt) - 1
                place = (r, slice(at, at + first))
                ints["tokens"][place], ints["positions"][place] = prompt[:-1], np.arange(first)
                ints["segments"][place], at = segment, at + first
            for tokens, rank in answers:
                segment, n = segment + 1, len(lead) + len(tokens)
                place = (r, slice(at, at + n))
                ints["tokens"][place], ints["positions"][place] = [*lead, *tokens], first + np.arange(n)
                ints["segments"][place], ints["prefixes"][place] = segment, prefix
                floats["weights"][r, at + len(lead) : at + n], floats["marks"][r, at + n - 1] = 1.0, 1.0
                floats["labels"][r, at + n - 1] = (tokens.sum() % 5) / 4
                groups[r, segment - 1], ranks[r, segment - 1], strengths[r, segment - 1] = g + 1, rank, len(prompt) / 4
                at += n
    batch = AnswerBatch(
        ints["tokens"], ints["positions"], ints["segments"], floats["weights"], np.arange(ROWS, dtype=np.int32),
        groups, ranks, strengths, floats["marks"], floats["labels"], prefix_ids=ints["prefixes"],
    )  # fmt: skip
    return jax.tree.map(jnp.asarray, batch)


def alone():
    return to_rows([[group] for group in examples()])


@cache
def compiled(microbatches=1, axes=()):
    mesh = sharding.make_mesh(dict(axes)) if axes else None
    rule = lambda optimizer, grads, state, **_: (grads, state.opt_state)  # noqa: E731
    step = make_train_step(loss_on(model_of(mesh)), optax.identity(), num_microbatches=microbatches, update_rule=rule)
    return jax.jit(step, compiler_options=QUICK), mesh


@cache
def params():
    return {**params_of(), "head": heads.init_head(jax.random.key(3), heads.head_table(16, 8, bias=True))}


def gradient(batch, microbatches=1, axes=()):
    step, mesh = compiled(microbatches, axes)
    placed = params()
    if mesh is not None:
        policy = sharding.param_shardings(axes_tree(model_of().table), mesh, placed["policy"])
        placed = {"policy": jax.device_put(placed["policy"], policy), "head": placed["head"]}
        placed["head"] = jax.device_put(placed["head"], sharding.replicated(mesh))
        batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    state, metrics = step(init_state(placed, optax.identity()), {}, batch, jax.random.key(1), HYPER)
    assert not metrics["skipped"]
    policy = {name: part for name, part in state.params["policy"].items() if name != "lm_head"}  # no score reads it
    return {"policy": policy, "head": state.params["head"]}, metrics


@cache
def reference():
    return gradient(alone())


@pytest.mark.parametrize("microbatches", [8])
def test_microbatches(microbatches):
    assert_close(gradient(alone(), microbatches), reference())


@pytest.mark.parametrize("axes", [(("data", 2), ("fsdp", 2), ("tensor", 2))], ids=["all"])
def test_shards(axes):
    assert_close(gradient(alone(), 1, axes), reference())


@pytest.mark.parametrize("share", [False, True], ids=["own prompts", "shared prompts"])
def test_packing(share):
    e = examples()
    rows = [[e[0], e[1]], [e[2], e[4], e[5]], [e[3], e[7]], [e[6]]]
    assert_close(gradient(to_rows(rows, share=share)), reference())


def test_a_masked_row_changes_nothing_and_nothing_at_all_is_skipped():
    e = examples()
    batch = to_rows([[e[0], e[1]], [e[2]], [e[3]], [e[4], e[5]], [e[6]], [e[7]], [e[3]]])
    off = (jnp.arange(ROWS)[:, None] != 6).astype(jnp.float32)
    batch = batch._replace(weights=batch.weights * off, marks=batch.marks * off)
    assert_close(gradient(batch), reference())
    nothing = batch._replace(weights=0 * batch.weights, marks=0 * batch.marks)
    step, _ = compiled()
    new, metrics = step(init_state(params(), optax.identity()), {}, nothing, jax.random.key(1), HYPER)
    assert (metrics["loss"], metrics["grad_norm"], metrics["empty"]) == (0, 0, 1)
    jax.tree.map(np.testing.assert_array_equal, new.params, params())


def test_weights_do_not_read_params():
    nan = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params())
    weights_only(loss_on(model_of()), nan, {}, alone(), jax.random.key(1), HYPER)  # raises where they do
