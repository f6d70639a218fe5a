"""Samples behind one copy of their prompt against plain padded rows: the same numbers through the real model."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpost.losses import rescore
from jaxpost.losses.aggregate import sequence_mean
from jaxpost.losses.kl import k3, plain
from jaxpost.losses.policy import policy_gradient
from jaxpost.metrics.terms import means, reduce_terms
from jaxpost.models.config import BlockConfig, ModelConfig, RopeConfig, StackConfig
from jaxpost.models.table import nest
from jaxpost.models.transformer import build_model
from jaxpost.rl.rows import Answer, Packed, RowPlan, pack

VOCAB = 37
LLAMA = ModelConfig(
    family="llama", vocab_size=VOCAB, width=16, mlp_width=24, heads=4, kv_heads=2, head_dim=8, max_positions=64,
    stacks=(StackConfig(repeats=2, period=(BlockConfig(rope=RopeConfig()),)),),
)  # fmt: skip
LOCAL, GLOBAL = BlockConfig(rope=RopeConfig(theta=100.0), window=3), BlockConfig(rope=RopeConfig(theta=1e4))
GEMMA = replace(
    LLAMA, family="gemma3", stacks=(StackConfig(repeats=1, period=(LOCAL, GLOBAL, LOCAL)),), norm_offset=1.0,
    activation="gelu_tanh", qk_norm=True, post_norms=True, embed_scale=4.0, attention_scale=0.3, final_softcap=3.0,
)  # fmt: skip
CONFIGS = {"full attention": LLAMA, "sliding windows": GEMMA}
HYPER = {"clip_low": 0.2, "clip_high": 0.3, "kl_coef": 0.1, "entropy_coef": 0.02, "temperature": 0.8}


@cache
def made(name: str) -> tuple[Any, Any]:
    """A model, and weights large enough that every part of it matters."""
    model, rng = build_model(CONFIGS[name]), np.random.default_rng(0)
    center = {"scale": 1 - model.config.norm_offset}
    draw = lambda spec: rng.normal(center.get(spec.path[-1], 0.0), 0.3, spec.shape)  # noqa: E731
    return model, nest({spec.path: jnp.asarray(draw(spec), jnp.float32) for spec in model.table})


def groups(lengths: list[tuple[int, list[int]]], seed: int = 0) -> list[list[Answer]]:
    """Groups of (prompt tokens, tokens of each answer), with some tokens of the answers masked."""
    rng, out = np.random.default_rng(seed), []
    for prompt, answers in lengths:
        shared = rng.integers(0, VOCAB, prompt).tolist()
        weights = [rng.choice([0.0, 1.0], n, p=[0.2, 0.8]).tolist() for n in answers]
        out.append([Answer(shared, rng.integers(0, VOCAB, len(w)).tolist(), w) for w in weights])
    return out


LENGTHS = [(7, [3, 6, 1]), (1, [6, 2, 4]), (4, [5, 5, 5]), (2, [1, 1, 1]), (9, [6, 6, 6])]
"""The second prompt is one token; the last group needs two of the rows below."""
MOST = 6


def filled(packed: Packed, seed: int = 3) -> Any:
    """The batch with random advantages and log-probabilities, the same for each sample however it is packed."""
    rng = np.random.default_rng(seed)
    numbers = lambda: rng.normal(size=(len(packed.places), MOST)).astype(np.float32)  # noqa: E731
    fields = {"advantages": numbers(), "old_logprobs": numbers() - 3, "ref_logprobs": numbers() - 3}
    fields["sampler_logprobs"] = fields["old_logprobs"]
    return jax.tree.map(jnp.asarray, packed.batch._replace(**{k: packed.spread(v) for k, v in fields.items()}))


def plans() -> tuple[RowPlan, RowPlan, RowPlan]:
    """Shared and crowded; shared with a row for each group; a padded row for each sample."""
    make = partial(RowPlan.make, groups=len(LENGTHS), samples=3, prompt=9, answer=MOST)
    return make(row_tokens=24), make(row_tokens=48), make(share=False)


@pytest.mark.parametrize("name", CONFIGS)
def test_shared_prompts_change_neither_log_probabilities_nor_gradients(name: str) -> None:
    model, params = made(name)
    loss = partial(policy_gradient, model, aggregate=sequence_mean, kl=plain(k3), chunk_tokens=64)

    def both(batch: Any) -> Any:
        total = lambda p: means(reduce_terms(*loss({"policy": p}, {}, batch, jax.random.key(0), HYPER)))  # noqa: E731
        with_loss = lambda p: (found := total(p), (found["loss"], found))[1]  # noqa: E731
        return rescore.logprobs(model, params, batch, HYPER), jax.grad(with_loss, has_aux=True)(params)

    run = jax.jit(both, compiler_options={"xla_backend_optimization_level": 0})
    found = []
    for plan in plans():
        packed = pack(groups(LENGTHS), plan)
        logprobs, grads = run(filled(packed))
        found.append((packed.gather(np.asarray(logprobs), MOST), grads))
    *shared, (alone, (grads, metrics)) = found
    assert np.count_nonzero(alone) == sum(np.count_nonzero(a.weights) for g in groups(LENGTHS) for a in g)
    for logprobs, (got, told) in shared:
        np.testing.assert_allclose(logprobs, alone, rtol=1e-5, atol=1e-5)
        for path, want in jax.tree.leaves_with_path(grads):
            other = dict(jax.tree.leaves_with_path(got))[path]
            error = np.linalg.norm(np.asarray(other - want)) / np.linalg.norm(want)
            assert error < 1e-5, f"{jax.tree_util.keystr(path)}: {error:.1e}"
        for key, want in metrics.items():
            np.testing.assert_allclose(told[key], want, rtol=1e-5, atol=1e-6, err_msg=key)


def test_crowded_rows_hold_several_groups_and_parts_of_one() -> None:
    packed = pack(groups(LENGTHS), plans()[0])
    rows = [{packed.places[3 * g + s].row for s in range(3)} for g in range(len(LENGTHS))]
    assert len(rows[-1]) == 2, "the last group is split"
    assert any(rows[a] & rows[b] for a in range(len(rows)) for b in range(a)), "two groups share a row"
    segments, prefixes = packed.batch.segment_ids, packed.batch.prefix_ids
    for row in range(len(segments)):
        for segment, prefix in set(zip(segments[row], prefixes[row], strict=True)) - {(0, 0)}:
            assert prefix < segment
            if prefix:
                assert not packed.batch.weights[row][segments[row] == prefix].any(), "a prompt is not trained"


def test_a_row_as_the_module_draws_it() -> None:
    plan = RowPlan.make(groups=1, samples=2, prompt=3, answer=2, multiple=1, row_tokens=9)
    batch = pack([[Answer([5, 6, 7], [8, 9], [1, 1]), Answer([5, 6, 7], [3], [1])]], plan, pad_id=2).batch
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9, 7, 3, 2, 2]]
    assert batch.segment_ids.tolist() == [[1, 1, 2, 2, 2, 3, 3, 0, 0]]
    assert batch.prefix_ids.tolist() == [[0, 0, 1, 1, 1, 1, 1, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 2, 3, 0, 0]]
    assert batch.weights.tolist() == [[0, 0, 0, 1, 1, 0, 1, 0, 0]]


sizes = st.tuples(st.integers(1, 6), st.lists(st.integers(1, 5), min_size=1, max_size=4))


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(sizes, min_size=1, max_size=5),
    share=st.booleans(),
    extra=st.integers(0, 20),
    piece_rows=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_any_groups_fit_their_plan_and_gather_undoes_spread(
    lengths: list[tuple[int, list[int]]], share: bool, extra: int, piece_rows: int, seed: int
) -> None:
    plan = RowPlan.make(
        groups=len(lengths), samples=max(len(a) for _, a in lengths), prompt=6, answer=5, row_tokens=11 + extra,
        piece_rows=piece_rows, share=share,
    )  # fmt: skip
    assert plan.rows == plan.pieces * piece_rows
    assert plan.tokens % 8 == 0
    given_groups = groups(lengths, seed)
    answers = [answer for group in given_groups for answer in group]
    packed = pack(given_groups, plan, pad_id=VOCAB)
    batch, width = packed.batch, 5
    for place, answer in zip(packed.places, answers, strict=True):
        here = slice(place.start, place.start + len(answer.tokens))
        assert batch.tokens[place.row, here].tolist() == list(answer.tokens)
        np.testing.assert_array_equal(batch.weights[place.row, here], answer.weights)
        # What attention lets the sample's last token see, in order of position, is the prompt and the sample.
        last = place.start + len(answer.tokens) - 1
        near = batch.segment_ids[place.row] == batch.segment_ids[place.row, last]
        if batch.prefix_ids is not None and batch.prefix_ids[place.row, last]:
            near |= batch.segment_ids[place.row] == batch.prefix_ids[place.row, last]
        order = np.argsort(batch.positions[place.row][near])
        assert batch.tokens[place.row][near][order].tolist() == [*answer.prompt, *answer.tokens]
        assert sorted(batch.positions[place.row][near]) == list(range(near.sum()))
    values = np.random.default_rng(seed).normal(size=(len(answers), width)).astype(np.float32)
    inside = np.arange(width) < np.asarray([len(a.tokens) for a in answers])[:, None]
    np.testing.assert_array_equal(packed.gather(packed.spread(values), width), np.where(inside, values, 0.0))
    assert np.count_nonzero(packed.spread(values)) == inside.sum()
    # The step computes piece by piece, and empty pieces for nothing: pieces fill up one after another.
    live = (batch.segment_ids != 0).any(axis=1).reshape(-1, plan.pieces).any(axis=0)
    assert live.tolist() == sorted(live.tolist(), reverse=True)


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(
        ValueError, match=r"learner\.row_tokens is 10, but a prompt of 8 tokens and an answer of 4 need 12"
    ):
        RowPlan.make(groups=1, samples=2, prompt=8, answer=4, row_tokens=10)
    plan = RowPlan.make(groups=1, samples=1, prompt=4, answer=4)
    with pytest.raises(ValueError, match="a prompt of 9 tokens with an answer of 4 does not fit a row of 8"):
        pack([[Answer([0] * 9, [1] * 4, [1] * 4)]], plan)
    one = [Answer([0] * 4, [1] * 4, [1] * 4)]
    with pytest.raises(ValueError, match="1 rows of 8 tokens do not hold these groups"):
        pack([one, one], plan)
