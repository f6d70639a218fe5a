"""Rows of groups: read back token by token, once an epoch, in any number of processes, from any step."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpost.data.answer_rows import make_answer_source, most_segments
from jaxpost.data.answers import AnswerDataset
from jaxpost.data.cache import SourceStats
from jaxpost.data.groups import Answer, AnswerOptions, Group
from jaxpost.data.packing import make_plan
from jaxpost.text.messages import DataError

OPTIONS = AnswerOptions(
    kind="pairs",
    mask="completion",
    seq_len=40,
    max_length=40,
    share_prompts=True,
    on_long_row="error",
    cut="answers",
    system_prompt=None,
    on_tie="keep",
    grades=(),
    pairs_of_rankings="all",
    good_score=None,
    objectives=(),
    step_separator="\n",
    step_mark="separator",
    step_labels="as_given",
    after_error="as_given",
)


def dataset_of(shapes, kind="pairs", shares=None, sources=1):
    """Groups of (prompt length, answer lengths): token t of answer a of group g is 10000 (g + 1) + 100 (a + 1) + t."""
    options = dataclasses.replace(OPTIONS, kind=kind)
    groups = []
    for g, (prompt, answers) in enumerate(shapes):
        base = 10000 * (g + 1)
        made = []
        for a, length in enumerate(answers):
            tokens = (base + 100 * (a + 1) + np.arange(length)).astype(np.int32)
            marks = np.zeros(length, np.float32)
            marks[::2] = 1.0
            given = (marks, marks * (a + 1)) if kind in ("scores", "steps") else (None, None)
            made.append(Answer(tokens, (np.arange(length) % 3 < 2).astype(np.float32), a, *given))
        groups.append(Group((base + np.arange(prompt)).astype(np.int32), tuple(made), 1.0 + g))
    cuts = np.linspace(0, len(groups), sources + 1).astype(int)
    parts = [options.arrays(groups[a:b]) for a, b in pairwise(cuts)]
    labelled = kind in ("scores", "steps")
    return AnswerDataset(
        **{name: [part[name] for part in parts] for name in ("tokens", "weights", "offsets", "first", "ranks")},
        marks=[part["marks"] for part in parts] if labelled else None,
        labels=[part["labels"] for part in parts] if labelled else None,
        strengths=np.concatenate([part["strengths"] for part in parts]),
        subsets=np.concatenate([part["subsets"] for part in parts]),
        options=options,
        shares=shares,
        stats=[SourceStats(name="s", examples=len(groups))] * sources,
        fingerprint="f",
    )


def source_of(dataset, **options):
    return make_answer_source(dataset, **{"seq_len": 40, "batch_size": 2, "pad_id": 9, "prefetch": 0, **options})


def read_back(batch):
    """Every answer of a batch as a model reads it: {group: {answer: fields}} by token numbers and attention rules.

    Written against the contract of `AnswerBatch` alone.
    """
    out = {}
    for r in range(len(batch.tokens)):
        ids = batch.segment_ids[r]
        padding = ids == 0
        assert padding.tolist() == sorted(padding.tolist())  # at the end only
        assert not batch.weights[r][padding].any()
        counted = sorted(set(batch.groups[r][batch.groups[r] > 0].tolist()))
        assert counted == list(range(1, len(counted) + 1))
        for s in range(1, ids.max(initial=0) + 1):
            here = np.flatnonzero(ids == s)
            assert here.tolist() == list(range(here[0], here[-1] + 1))
            if batch.groups[r, s - 1] == 0:
                assert not batch.weights[r][here].any()
                continue
            seen = here
            if batch.prefix_ids is not None and batch.prefix_ids[r, here[0]]:
                assert len(set(batch.prefix_ids[r][here].tolist())) == 1
                seen = np.concatenate([np.flatnonzero(ids == batch.prefix_ids[r, here[0]]), here])
            np.testing.assert_array_equal(batch.positions[r][seen], np.arange(len(seen)))
            tokens = batch.tokens[r][seen]
            group, inside = int(tokens[-1]) // 10000 - 1, tokens % 10000
            answer = int(inside[-1]) // 100 - 1
            own = inside >= 100
            assert own.tolist() == sorted(own.tolist())
            fields = {
                "prompt": inside[~own].tolist(),
                "answer": (inside[own] % 100).tolist(),
                "weights": batch.weights[r][seen][own].tolist(),
                "rank": int(batch.ranks[r, s - 1]),
                "strength": float(batch.strengths[r, s - 1]),
                "table": (r, int(batch.groups[r, s - 1])),
            }
            for name in ("marks", "labels", "ref_logprobs"):
                values = getattr(batch, name)
                fields[name] = None if values is None else values[r][seen][own].tolist()
            assert answer not in out.setdefault(group, {})
            out[group][answer] = fields
    for answers in out.values():
        assert len({fields["table"] for fields in answers.values()}) == 1  # one row, one number
    return out


def expected(shapes, index, answer):
    prompt, lengths = shapes[index]
    length = lengths[answer]
    weights = (np.arange(length) % 3 < 2).astype(float)
    return {
        "prompt": list(range(prompt)),
        "answer": list(range(length)),
        "weights": weights.tolist(),
        "rank": answer,
        "strength": 1.0 + index,
    }


SHAPES = st.lists(
    st.tuples(st.integers(0, 12), st.lists(st.integers(1, 6), min_size=1, max_size=3)), min_size=1, max_size=12
)


@settings(max_examples=60, deadline=None)
@given(
    shapes=SHAPES,
    share=st.booleans(),
    packing=st.booleans(),
    endless=st.booleans(),
    batch=st.integers(1, 3),
    seed=st.integers(0, 3),
)
def test_every_answer_comes_once_an_epoch_behind_its_prompt(shapes, share, packing, endless, batch, seed):
    dataset = dataset_of(shapes)
    options = {"share_prompts": share, "packing": packing, "endless": endless, "batch_size": batch, "seed": seed}
    source = source_of(dataset, seq_len=60, **options)
    plan = source.plan
    for epoch in range(2 if endless else 1):
        rows = range(epoch * plan.rows_per_epoch, (epoch + 1) * plan.rows_per_epoch)
        seen = {}
        for k in sorted({n // batch for n in rows}):
            mine = [n - k * batch for n in range(k * batch, (k + 1) * batch) if n in rows]
            batch_k = dataclasses.replace(source, rows=mine).batch(k)
            assert batch_k.groups.shape == (len(mine), source.columns)
            found = read_back(batch_k)
            assert not found.keys() & seen.keys()
            seen |= found
        assert seen.keys() == set(range(len(shapes)))
        for index, answers in seen.items():
            assert answers.keys() == set(range(len(shapes[index][1])))
            for answer, fields in answers.items():
                wanted = expected(shapes, index, answer)
                assert {key: fields[key] for key in wanted} == wanted


PAIRS = [(5, [3, 4]), (1, [2, 6]), (7, [5, 1]), (0, [3, 3]), (4, [2, 2]), (9, [4, 3]), (6, [1, 2])]


def test_the_first_row_token_by_token():
    batch = source_of(dataset_of([(3, [2, 1])]), seq_len=10, batch_size=1, endless=False, scored=True).batch(0)
    assert batch.tokens.tolist() == [[10000, 10001, 10002, 10100, 10101, 10002, 10200, 9, 9, 9]]
    assert batch.segment_ids.tolist() == [[1, 1, 2, 2, 2, 3, 3, 0, 0, 0]]
    assert batch.prefix_ids.tolist() == [[0, 0, 1, 1, 1, 1, 1, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 2, 3, 0, 0, 0]]
    assert batch.groups.tolist() == [[0, 1, 1]]
    assert batch.ranks.tolist() == [[0, 0, 1]]
    assert batch.strengths.tolist() == [[0, 1, 1]]
    assert batch.marks.tolist() == [[0, 0, 0, 0, 1, 0, 1, 0, 0, 0]]
    assert batch.labels is None
    assert {array.dtype for array in batch[:3]} == {np.dtype(np.int32)}
    alone = source_of(dataset_of([(3, [2, 1])]), seq_len=10, batch_size=1, share_prompts=False).batch(0)
    assert alone.segment_ids.tolist() == [[1, 1, 1, 1, 1, 2, 2, 2, 2, 0]]
    assert alone.prefix_ids is None
    assert alone.groups.tolist() == [[1, 1]]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("kind", ["pairs", "scores"])
def test_packed_contents_equal_padded_ones(share, kind):
    dataset = dataset_of(PAIRS, kind=kind)
    found = []
    for packing in (True, False):
        source = source_of(dataset, share_prompts=share, packing=packing, endless=False)
        seen = {}
        for k in range(source.num_batches_per_epoch):
            seen |= read_back(source.batch(k))
        found.append({g: {a: f | {"table": None} for a, f in answers.items()} for g, answers in seen.items()})
    assert found[0] == found[1]
    assert found[0].keys() == set(range(len(PAIRS)))
    if kind == "scores":
        assert found[0][0][1]["labels"] == [2.0, 0.0, 2.0, 0.0]


@pytest.mark.parametrize("rows", [([0, 1], [2, 3]), ([0, 2], [1, 3]), ([0], [1], [2], [3])])
@pytest.mark.parametrize("endless", [True, False])
def test_the_rows_of_processes_make_up_the_global_batch(rows, endless):
    dataset = dataset_of(PAIRS, kind="steps")
    whole = source_of(dataset, batch_size=4, packing=False, endless=endless)
    parts = [source_of(dataset, batch_size=4, packing=False, endless=endless, rows=mine) for mine in rows]
    for k in range(3):
        for field, full, *pieces in zip(
            whole.batch(k)._fields, whole.batch(k), *(part.batch(k) for part in parts), strict=True
        ):
            for mine, piece in zip(rows, pieces, strict=True):
                assert (full is None) == (piece is None), field
                if full is not None:
                    np.testing.assert_array_equal(piece, full[mine], err_msg=field)
    assert len({part.fingerprint for part in parts}) == 1


def test_a_run_goes_on_from_any_step():
    source, again = source_of(dataset_of(PAIRS), seed=3), source_of(dataset_of(PAIRS), seed=3, prefetch=2)
    stream = again.iterate(5)
    for k in (5, 6, 7):
        for a, b in zip(source.batch(k), next(stream), strict=True):
            np.testing.assert_array_equal(a, b)
    other = source_of(dataset_of(PAIRS), seed=4)
    assert other.fingerprint != source.fingerprint
    assert len({source.fingerprint, source_of(dataset_of(PAIRS), share_prompts=False, seed=3).fingerprint}) == 2


def test_places_tell_where_each_answer_stands():
    source = source_of(dataset_of(PAIRS), seed=1)
    for k in range(2):
        batch = source.batch(k)
        for place in source.places(k):
            tokens = batch.tokens[place.row, place.start : place.end]
            assert (tokens % 10000 // 100 == place.answer + 1).all()
            assert (tokens // 10000 == place.group + 1).all()
            assert len(tokens) == PAIRS[place.group][1][place.answer]
            assert batch.segment_ids[place.row, place.start] == place.column + 1


def test_what_is_read_back_can_be_given_as_the_reference():
    dataset = dataset_of(PAIRS)
    passed = source_of(dataset, endless=False)
    logprobs = {}
    for k in range(passed.num_batches_per_epoch):
        logprobs |= passed.read(k, passed.batch(k).tokens.astype(np.float32))
    assert source_of(dataset).batch(0).ref_logprobs is None
    for share in (True, False):
        source = source_of(dataset, share_prompts=share, seed=5).with_reference(
            [logprobs[i] for i in range(len(PAIRS))]
        )
        batch = source.batch(0)
        answers = np.zeros_like(batch.tokens)
        for place in source.places(0):
            answers[place.row, place.start : place.end] = batch.tokens[place.row, place.start : place.end]
        np.testing.assert_array_equal(batch.ref_logprobs, answers.astype(np.float32))
    with pytest.raises(DataError, match="group 2 has 6 answer tokens, but 1"):
        source.with_reference([logprobs[i] if i != 2 else np.zeros(1) for i in range(len(PAIRS))])
    with pytest.raises(DataError, match="log-probabilities of 1 groups for a data set of 7"):
        source.with_reference([np.zeros(7)])


def test_mismatched_answers_are_another_prompts():
    shapes = [(5, [3]), (1, [2]), (7, [5]), (4, [2]), (9, [4]), (6, [1])]
    dataset = dataset_of(shapes, kind="unpaired")
    source = source_of(dataset, mismatched=True, endless=False)
    owners = []
    for k in range(source.num_batches_per_epoch):
        batch = source.batch(k)
        for place in source.places(k):
            tokens = batch.tokens[place.row, place.start : place.end]
            owner = int(tokens[0]) // 10000 - 1
            rank = batch.ranks[place.row, place.column]
            assert (rank == -1) == (place.answer == 1)
            assert (owner == place.group) == (rank >= 0)
            lead = batch.tokens[place.row, place.start - 1]
            assert lead == 10000 * (place.group + 1) + shapes[place.group][0] - 1  # the group's own prompt
            if rank < 0:
                owners.append(owner)
                assert len(tokens) == shapes[owner][1][0]
    assert sorted(owners) == list(range(len(shapes)))  # each is somebody's once
    again = source_of(dataset, mismatched=True, endless=False)
    assert again.fingerprint == source.fingerprint != source_of(dataset, endless=False).fingerprint


def test_mismatched_answers_need_two_prompts_and_are_cut_to_the_row():
    same = dataset_of([(4, [2])], kind="unpaired")
    with pytest.raises(DataError, match="same prompt"):
        source_of(same, mismatched=True)
    tight = dataset_of([(4, [2]), (30, [6])], kind="unpaired")
    source = source_of(tight, mismatched=True, endless=False)
    sizes = {(p.group, p.answer): p.end - p.start for k in range(2) for p in source.places(k)}
    assert sizes == {(0, 0): 2, (0, 1): 6, (1, 0): 6, (1, 1): 2}
    cramped = source_of(dataset_of([(4, [2]), (31, [7])], kind="unpaired"), mismatched=True, endless=False)
    sizes = {(p.group, p.answer): p.end - p.start for k in range(2) for p in cramped.places(k)}
    assert sizes == {(0, 0): 2, (0, 1): 7, (1, 0): 7, (1, 1): 1}


def test_labels_of_unpaired_answers_where_scores_are_read():
    dataset = dataset_of([(2, [3]), (3, [2])], kind="unpaired")
    dataset.ranks[0][3] = 1  # the second group's answer is undesirable
    batch = source_of(dataset, scored=True, endless=False).batch(0)
    marked = batch.marks > 0
    assert batch.labels[marked].tolist() == [1.0, 0.0]


def test_a_group_that_does_not_fit_is_an_error():
    with pytest.raises(DataError, match="a group takes 41 tokens of a row of 40"):
        source_of(dataset_of([(35, [2, 3])]))
    with pytest.raises(DataError, match=r"takes 50 .*share_prompts=False"):
        source_of(dataset_of([(20, [5, 5])]), share_prompts=False)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(2, 12), st.integers(1, 4)), min_size=4, max_size=12),
    shares=st.booleans(),
    packing=st.booleans(),
)
def test_no_row_has_more_segments_than_columns(lengths, shares, packing):
    sizes = np.array([length for length, _ in lengths])
    segments = np.array([count for _, count in lengths])
    plan = make_plan(
        sizes,
        seq_len=24,
        batch_size=2,
        packing=packing,
        starts=[0, 2, len(sizes)],
        shares=(1.0, 3.0) if shares else None,
    )
    most = most_segments(plan, segments)
    found = [int(segments[row].sum()) for k in range(20) for row in plan.batch(k)]
    assert max(found) <= most


def test_mixtures_read_every_source_by_its_share():
    dataset = dataset_of(PAIRS + PAIRS, shares=(1.0, 3.0), sources=2)
    source = source_of(dataset, packing=False)
    seen = [place.group for k in range(28) for place in source.places(k) if place.answer == 0]
    second = sum(group >= 7 for group in seen) / len(seen)
    assert second == pytest.approx(0.75, abs=0.03)
