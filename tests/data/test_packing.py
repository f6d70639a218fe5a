"""The plan: nothing lost, nothing twice, exact shares, a pure function of (seed, k), dense bins."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpost.data.packing import Plan, best_fit_decreasing, make_plan
from jaxpost.text.messages import DataError

SEQ = 16
lengths_of = st.lists(st.integers(1, SEQ), min_size=1, max_size=40).map(np.array)


def stream(plan, rows, start=0):
    """Rows of the stream by way of batches, as a run reads them."""
    size = plan.batch_size
    batches = range(start // size, -(-(start + rows) // size))
    flat = [row for k in batches for row in plan.batch(k)]
    return flat[start - batches[0] * size :][:rows]


@settings(deadline=None)
@given(lengths_of, st.integers(1, 5), st.booleans(), st.integers(0, 3))
def test_each_epoch_holds_every_example_once(lengths, batch_size, packing, seed):
    plan = make_plan(lengths, seq_len=SEQ, batch_size=batch_size, packing=packing, seed=seed)
    n = plan.rows_per_epoch
    for epoch in range(3):
        rows = stream(plan, n, start=epoch * n)
        assert sorted(np.concatenate(rows).tolist()) == list(range(len(lengths)))
        assert all(lengths[row].sum() <= SEQ for row in rows)
        assert all(len(row) == 1 for row in rows) or packing


@settings(deadline=None, max_examples=30)
@given(lengths_of, st.integers(1, 5), st.lists(st.integers(0, 40), min_size=1, max_size=5), st.booleans())
def test_a_batch_depends_on_seed_and_number_only(lengths, batch_size, numbers, mixed):
    options = {"seq_len": SEQ, "batch_size": batch_size, "seed": 7}
    if mixed and len(lengths) > 1:
        options |= {"starts": [0, 1, len(lengths)], "shares": [1.0, 2.0]}
    straight = make_plan(lengths, **options)
    expected = [straight.batch(k) for k in range(41)]
    jumping = make_plan(lengths, **options)
    for k in numbers:
        for a, b in zip(jumping.batch(k), expected[k], strict=True):
            np.testing.assert_array_equal(a, b)


@settings(deadline=None)
@given(lengths_of, st.integers(1, 5), st.booleans())
def test_evaluation_reads_all_in_order_and_fills_up_the_last_batch(lengths, batch_size, packing):
    plan = make_plan(lengths, seq_len=SEQ, batch_size=batch_size, packing=packing, endless=False)
    rows = [row for k in range(plan.num_batches_per_epoch) for row in plan.batch(k)]
    assert np.concatenate(rows).tolist() == list(range(len(lengths)))
    assert len(rows) == plan.num_batches_per_epoch * batch_size
    empty = [len(row) == 0 for row in rows]
    assert sum(empty) < batch_size
    assert empty == sorted(empty)
    assert all(lengths[row].sum() <= SEQ for row in rows)


@settings(deadline=None)
@given(lengths_of)
def test_bins_against_first_fit_by_hand(lengths):
    ordered = np.sort(lengths)[::-1]
    bins, count = best_fit_decreasing(ordered, SEQ)
    free: list[int] = []
    for length in ordered.tolist():  # the definition, slowly
        fits = [(room, i) for i, room in enumerate(free) if room >= length]
        if fits:
            free[min(fits)[1]] -= length
        else:
            free.append(SEQ - length)
    used = np.bincount(bins, weights=ordered, minlength=count)
    assert sorted(SEQ - used) == sorted(free)
    assert bins.max() + 1 == count == len(free)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 9)), min_size=1, max_size=4),
    st.integers(1, 6),
    st.integers(0, 2),
)
def test_shares_of_a_mixture_are_exact_and_passes_are_whole(sources, epochs, seed):
    sizes, weights = zip(*sources, strict=True)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    total = int(starts[-1])
    plan = make_plan(
        np.ones(total, int), seq_len=3, batch_size=2, seed=seed, starts=starts, shares=[float(w) for w in weights]
    )
    drawn = np.concatenate([plan.draws(epoch) for epoch in range(epochs)])
    for source, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        mine = drawn[(drawn >= starts[source]) & (drawn < starts[source + 1])]
        assert abs(len(mine) - weight / sum(weights) * total * epochs) < 1
        for begin in range(0, len(mine) - size + 1, size):
            assert len(set(mine[begin : begin + size].tolist())) == size
    rows = np.concatenate([row for epoch in range(epochs) for row in plan.epoch(epoch)])
    assert Counter(rows.tolist()) == Counter(drawn.tolist())


def test_shares_by_size_give_every_example_once():
    plan = make_plan(np.ones(12, int), seq_len=4, batch_size=2, starts=[0, 9, 12], shares=[3.0, 1.0])
    for epoch in range(3):
        assert sorted(plan.draws(epoch).tolist()) == list(range(12))


def test_epochs_and_seeds_are_shuffled_differently():
    lengths = np.arange(64) % 8 + 1

    def order(seed, epoch):
        plan = make_plan(lengths, seq_len=SEQ, batch_size=4, seed=seed)
        return np.concatenate(plan.epoch(epoch)).tolist()

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(o) for o in orders}) == 4


def test_rows_are_not_sorted_by_length_and_are_full():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.5, 0.8, 4000).astype(int), 1, 1024)
    plan = make_plan(lengths, seq_len=1024, batch_size=8)
    assert plan.efficiency > 0.98
    assert plan.rows_per_epoch <= np.ceil(lengths.sum() / 1024) * 1.02
    counts = np.array([len(row) for row in plan.epoch(0)], float)
    place = np.arange(len(counts), dtype=float)
    assert abs(np.corrcoef(counts, place)[0, 1]) < 0.15
    padded = make_plan(lengths, seq_len=1024, batch_size=8, packing=False)
    assert padded.efficiency == pytest.approx(lengths.mean() / 1024)


def test_a_data_set_smaller_than_a_batch_repeats_epochs():
    plan = make_plan(np.array([3, 3]), seq_len=4, batch_size=5)
    counts = Counter(np.concatenate(plan.batch(0)).tolist())
    assert sorted(counts.values()) == [2, 3]
    assert plan.num_batches_per_epoch == 1
    assert plan.num_steps(10) == 4


@pytest.mark.parametrize("shares", [None, [1.0, 3.0]])
def test_each_epoch_is_packed_once_while_a_run_passes_through(shares, monkeypatch):
    plan = make_plan(np.full(10, 4), seq_len=8, batch_size=3, starts=[0, 4, 10], shares=shares)
    packed = []
    pack = Plan._pack
    monkeypatch.setattr(Plan, "_pack", lambda self, epoch: packed.append(epoch) or pack(self, epoch))
    for k in range(20):
        plan.batch(k)
    assert packed == list(range(len(packed)))
    assert len(packed) >= 10


def test_steps_of_epochs():
    plan = make_plan(np.full(10, 4), seq_len=4, batch_size=4)
    assert [plan.num_steps(epochs) for epochs in (0.1, 0.4, 1, 2, 4)] == [1, 1, 3, 5, 10]
    assert plan.num_batches_per_epoch == 3


@pytest.mark.parametrize(
    ("lengths", "options", "words"),
    [
        ([], {}, "no examples"),
        ([5], {}, "1 to 4; they are 5 to 5"),
        ([0], {}, "they are 0 to 0"),
        ([1], {"shares": [1.0, 2.0]}, "one number > 0 for each source"),
        ([1, 1], {"shares": [1.0, 0.0], "starts": [0, 1, 2]}, "one number > 0 for each source"),
    ],
)
def test_errors(lengths, options, words):
    with pytest.raises(DataError, match=words):
        make_plan(np.array(lengths, int), seq_len=4, batch_size=1, **options)
