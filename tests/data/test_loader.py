"""Batches: contents against the examples they were made from, slices of processes, resuming by number."""

import numpy as np
import pytest

from jaxpost.data.dataset import SourceStats, TokenDataset
from jaxpost.data.loader import make_source
from jaxpost.text.messages import DataError

LENGTHS = (5, 3, 2, 7, 1, 4, 6)


@pytest.fixture
def data():
    """Example i holds the tokens 100 * i, 100 * i + 1 ... with weights that tell them apart."""
    tokens = np.concatenate([100 * i + np.arange(n) for i, n in enumerate(LENGTHS)]).astype(np.int32)
    return TokenDataset(
        tokens=[tokens],
        weights=[(tokens % 100 / 8).astype(np.float32)],
        offsets=[np.concatenate([[0], np.cumsum(LENGTHS)])],
        shares=None,
        stats=[SourceStats(name="s", examples=len(LENGTHS), tokens=len(tokens))],
        fingerprint="f",
    )


def source(data, **options):
    return make_source(data, **{"seq_len": 8, "batch_size": 2, "pad_id": 9, "prefetch": 0, **options})


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("endless", [True, False])
def test_rows_hold_their_examples_one_after_another(data, packing, endless):
    batches = source(data, packing=packing, endless=endless)
    seen = []
    for k in range(batches.num_batches_per_epoch):
        batch = batches.batch(k)
        assert {a.dtype for a in batch[:3]} == {np.dtype(np.int32)}
        assert batch.weights.dtype == np.float32
        assert batch.row_ids.tolist() == [2 * k, 2 * k + 1]
        for r in range(2):
            ids = batch.segment_ids[r]
            count = ids.max()
            assert set(ids.tolist()) <= set(range(count + 1))
            padding = ids == 0
            assert padding.tolist() == sorted(padding.tolist())  # at the end only
            assert (batch.tokens[r][padding] == 9).all()
            assert not batch.weights[r][padding].any()
            for segment in range(1, count + 1):
                here = ids == segment
                tokens = batch.tokens[r][here]
                example = int(tokens[0]) // 100
                seen.append(example)
                np.testing.assert_array_equal(tokens, 100 * example + np.arange(LENGTHS[example]))
                np.testing.assert_array_equal(batch.positions[r][here], np.arange(LENGTHS[example]))
                np.testing.assert_array_equal(batch.weights[r][here], (tokens % 100 / 8).astype(np.float32))
    assert set(seen) == set(range(len(LENGTHS)))
    assert endless or seen == list(range(len(LENGTHS)))


def test_evaluation_ends_with_masked_rows(data):
    batches = source(data, packing=False, endless=False)
    last = batches.batch(batches.num_batches_per_epoch - 1)
    assert last.segment_ids[0].any()
    assert not last.segment_ids[1].any()
    assert not last.weights[1].any()


@pytest.mark.parametrize("rows", [([0, 1], [2, 3]), ([0, 2], [1, 3]), ([0], [1], [2], [3])])
@pytest.mark.parametrize("endless", [True, False])
def test_the_rows_of_processes_make_up_the_global_batch(data, rows, endless):
    whole = source(data, batch_size=4, endless=endless)
    parts = [source(data, batch_size=4, endless=endless, rows=mine) for mine in rows]
    for k in range(3):
        for expected, *pieces in zip(whole.batch(k), *(part.batch(k) for part in parts), strict=True):
            for mine, piece in zip(rows, pieces, strict=True):
                np.testing.assert_array_equal(piece, expected[mine])
    assert len({part.fingerprint for part in parts}) == 1


@pytest.mark.parametrize("rows", [[], [4], [-1, 0]])
def test_rows_that_the_batch_does_not_have(data, rows):
    with pytest.raises(DataError, match=r"rows must lie in 0 \.\. 3, got"):
        source(data, batch_size=4, rows=rows)


@pytest.mark.parametrize("prefetch", [0, 3])
def test_iteration_starts_anywhere_and_keeps_the_order(data, prefetch):
    batches = source(data, prefetch=prefetch)
    for start in (0, 5):
        found = batches.iterate(start)
        for k in range(start, start + 6):
            for a, b in zip(next(found), batches.batch(k), strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("prefetch", [0, 3])
def test_iteration_of_an_evaluation_ends(data, prefetch):
    batches = source(data, endless=False, packing=False, prefetch=prefetch)
    assert len(list(batches.iterate())) == batches.num_batches_per_epoch == 4
    assert len(list(batches.iterate(3))) == 1


def test_row_ids_wrap(data):
    batches = source(data)
    assert batches.batch(2**30).row_ids.tolist() == [-(2**31), -(2**31) + 1]


def test_the_fingerprint_follows_what_changes_batches(data):
    base = source(data)
    others = [
        source(data, seed=1),
        source(data, batch_size=4),
        source(data, seq_len=9),
        source(data, packing=False),
        source(data, endless=False),
    ]
    assert len({s.fingerprint for s in (base, *others)}) == 6
    assert source(data, prefetch=2).fingerprint == base.fingerprint


def test_stats(data):
    stats = source(data).stats
    assert stats["examples"] == 7
    assert stats["tokens"] == 28
    assert stats["packing_efficiency"] == 28 / (stats["rows_per_epoch"] * 8)
