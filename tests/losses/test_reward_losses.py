"""Losses of reward models against float64 NumPy, written from the papers with loops, gradients included."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.losses.reward import (
    bradley_terry,
    every_token,
    label_loss,
    last_tokens,
    plackett_luce,
    ranking_loss,
    split_outputs,
    squared_error,
)
from jaxpost.metrics.terms import means, reduce_terms
from jaxpost.types import AnswerBatch, Model, Outputs

KEY = jax.random.key(0)
QUICK = {"xla_backend_optimization_level": 0}
# A model whose hidden states are its parameters: gradients with respect to scores, and nothing else in the way.
GIVEN = Model(None, (), None, lambda p, inputs: Outputs(p), None, None)
read_all = lambda params, hidden: hidden  # noqa: E731


def batch_of(rows, *, length=24, labels=None):
    """Rows of groups of (rank, tokens) answers with a strength: [(strength, [(rank, n), ...]), ...]."""
    columns = max(sum(len(answers) for _, answers in row) for row in rows)
    shape = (len(rows), length)
    segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    weights, marks = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    groups, ranks = np.zeros((len(rows), columns), np.int32), np.zeros((len(rows), columns), np.int32)
    strengths = np.zeros((len(rows), columns), np.float32)
    for b, row in enumerate(rows):
        at = s = 0
        for g, (strength, answers) in enumerate(row):
            for rank, n in answers:
                inside = slice(at, at + n)
                segments[b, inside], positions[b, inside] = s + 1, np.arange(n)
                weights[b, at + 1 : at + n], marks[b, at + n - 1] = 1.0, 1.0
                groups[b, s], ranks[b, s], strengths[b, s] = g + 1, rank, strength
                at, s = at + n, s + 1
    tokens, ids = np.zeros(shape, np.int32), np.arange(len(rows), dtype=np.int32)
    found = AnswerBatch(tokens, positions, segments, weights, ids, groups, ranks, strengths, marks, labels)
    return jax.tree.map(jnp.asarray, found)


RANKED = batch_of([
    [(1.0, [(0, 3), (1, 4)]), (0.5, [(1, 2), (0, 5), (2, 3)])],
    [(2.0, [(0, 4), (1, 4), (1, 3), (0, 2), (2, 2)]), (1.0, [(0, 2), (0, 2)])],
    [(1.0, [(1, 6), (0, 2), (-1, 3)])],
])  # fmt: skip


def hidden_for(batch, outputs, seed=0, scale=1.0):
    shape = (*batch.tokens.shape, outputs)
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


def answers_of(batch):
    """Per group: [(row, last token, rank), ...], its strength."""
    found = {}
    for b in range(batch.groups.shape[0]):
        for s in range(batch.groups.shape[1]):
            if batch.groups[b, s] > 0:
                last = int(np.flatnonzero(np.asarray(batch.segment_ids[b]) == s + 1)[-1])
                key = (b, int(batch.groups[b, s]))
                found.setdefault(key, []).append((b, last, int(batch.ranks[b, s]), float(batch.strengths[b, s])))
    return list(found.values())


def check(loss, expected, hidden, tolerance=2e-5):
    """Value and gradient of `loss(hidden)` in float32 against `expected(float64)` and its central differences."""
    value, gradient = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(hidden)
    there = np.asarray(hidden, np.float64)
    np.testing.assert_allclose(value, expected(there), rtol=1e-5)
    numeric = np.zeros_like(there)
    for at in np.argwhere(np.asarray(gradient) != 0):
        step = np.zeros_like(there)
        step[tuple(at)] = 1e-5
        numeric[tuple(at)] = (expected(there + step) - expected(there - step)) / 2e-5
    error = np.linalg.norm(gradient - numeric) / np.linalg.norm(numeric)
    assert error < tolerance
    return value


def total(loss, batch, hyper, hidden):
    return means(reduce_terms(*loss({"policy": hidden}, {}, batch, KEY, hyper)))["loss"]


def logistic(x):
    return np.log1p(np.exp(-x))


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize(("margin", "smoothing", "centre"), [(0.0, 0.0, 0.0), (0.7, 0.1, 0.01)])
def test_bradley_terry_of_pairs_and_of_all_pairs_of_a_ranking(members, margin, smoothing, centre):
    def expected(hidden):
        each = []
        for answers in answers_of(RANKED):
            pairs = [(i, j) for i in answers for j in answers if 0 <= i[2] < j[2]]
            found = []
            for i, j in pairs:
                r, q = hidden[i[0], i[1]], hidden[j[0], j[1]]
                d = r - q - margin * i[3]
                found.append((1 - smoothing) * logistic(d) + smoothing * logistic(-d) + centre * (r + q) ** 2)
            each += [np.mean(found)] if found else []
        return np.mean(each)

    hyper = {"margin": margin, "label_smoothing": smoothing, "centre": centre}
    loss = partial(ranking_loss, GIVEN, read_all, centred=centre > 0)
    check(partial(total, loss, RANKED, hyper), expected, hidden_for(RANKED, members))


def brute(scores, ranks):
    """P of an order with ties under Plackett-Luce: the sum over every full order that agrees with it."""
    weights, found = np.exp(scores), 0.0
    for order in itertools.permutations(range(len(scores))):
        if all(ranks[a] <= ranks[b] for a, b in itertools.pairwise(order)):
            left, p = weights.sum(), 1.0
            for i in order:
                p, left = p * weights[i] / left, left - weights[i]
            found += p
    return found


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_plackett_luce_equals_the_enumeration_of_orders(scale):
    def expected(hidden):
        each = []
        for answers in answers_of(RANKED):
            kept = [a for a in answers if a[2] >= 0]
            ranks = [a[2] for a in kept]
            if len(set(ranks)) > 1:
                each.append(-np.log(brute(np.array([hidden[a[0], a[1], 0] for a in kept]), ranks)))
        return np.mean(each)

    loss = partial(ranking_loss, GIVEN, read_all, objective=plackett_luce, name="plackett_luce")
    check(partial(total, loss, RANKED, {}), expected, hidden_for(RANKED, 1, scale=scale), tolerance=1e-4)


def test_a_pair_is_bradley_terry_for_plackett_luce():
    batch = batch_of([[(1.0, [(0, 2), (1, 3)])]])
    hidden = hidden_for(batch, 1, scale=3.0)
    losses = [total(partial(ranking_loss, GIVEN, read_all, objective=o), batch, {}, hidden) for o in
              (bradley_terry, plackett_luce)]  # fmt: skip
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_the_first_loss_of_a_head_at_zero_is_log_two_and_metrics_say_so():
    terms, metrics = ranking_loss(GIVEN, read_all, {"policy": jnp.zeros((3, 24, 2))}, {}, RANKED, KEY, {})
    found = means(reduce_terms(terms, metrics))
    assert found["loss"] == pytest.approx(np.log(2))
    assert (found["rewards/accuracy"], found["rewards/margin"], found["uncertainty"]) == (0.5, 0.0, 0.0)


def labelled(objectives=0):
    batch = batch_of([[(1.0, [(0, 5)]), (1.0, [(0, 4)])], [(1.0, [(0, 9)])]], length=12)
    marks = np.zeros((2, 12), np.float32)
    for b, t, w in [(0, 2, 1.0), (0, 4, 1.0), (0, 8, 2.0), (1, 3, 1.0), (1, 5, 1.0), (1, 8, 0.5)]:
        marks[b, t] = w
    rng = np.random.default_rng(4)
    labels = rng.uniform(size=(2, 12, *([objectives] if objectives else []))).astype(np.float32)
    if objectives:
        labels[0, 8, 0] = np.nan
    return batch._replace(marks=jnp.asarray(marks), labels=jnp.asarray(labels))


@pytest.mark.parametrize("classes", [1, 2])
def test_classification_with_soft_labels_of_one_or_two_outputs(classes):
    batch = labelled()

    def expected(hidden):
        z = hidden[..., 0] if classes == 1 else hidden[..., 1] - hidden[..., 0]
        y = 0.9 * np.asarray(batch.labels, np.float64) + 0.05
        each = y * logistic(z) + (1 - y) * logistic(-z)
        marks = np.asarray(batch.marks, np.float64)
        return np.sum(each * marks) / np.sum(marks)

    loss = partial(label_loss, GIVEN, read_all, classes=classes)
    check(partial(total, loss, batch, {"label_smoothing": 0.1}), expected, hidden_for(batch, classes))


def test_regression_of_several_objectives_leaves_out_unknown_labels():
    batch = labelled(objectives=3)

    def expected(hidden):
        each = [(hidden[..., 3 * n : 3 * n + 3] - np.asarray(batch.labels, np.float64)) ** 2 for n in range(2)]
        weights = np.asarray(batch.marks, np.float64)[..., None] * ~np.isnan(np.asarray(batch.labels))
        return np.nansum(np.mean(each, axis=0) * weights) / np.sum(weights)

    loss = partial(label_loss, GIVEN, read_all, objective=squared_error, name="regression", members=2)
    check(partial(total, loss, batch, {}), expected, hidden_for(batch, 6))
    with pytest.raises(ValueError, match="6 objectives, but the data has 3"):
        loss({"policy": hidden_for(batch, 12)}, {}, batch, KEY, {})


def test_every_token_of_an_answer_carries_its_label():
    batch = labelled()
    marks, labels = every_token(batch)
    for b, s, last in [(0, 1, 4), (0, 2, 8), (1, 1, 8)]:
        inside = (np.asarray(batch.segment_ids[b]) == s) & (np.asarray(batch.weights[b]) > 0)
        np.testing.assert_allclose(np.asarray(labels[b])[inside], batch.labels[b, last])
        np.testing.assert_allclose(np.asarray(marks[b])[inside].sum(), batch.marks[b, last], rtol=1e-6)
    assert float(jnp.sum(marks)) == pytest.approx(3.5)


def test_scores_are_read_at_the_last_token_that_counts():
    batch = RANKED._replace(marks=None)
    at, present = last_tokens(batch)
    np.testing.assert_array_equal(present, batch.groups > 0)
    for answers in answers_of(batch):
        for b, last, *_ in answers:
            assert last in np.asarray(at[b])[np.asarray(present[b])]


def test_outputs_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="3 outputs"):
        split_outputs(jnp.zeros(3), members=2)
