"""Real files of judged answers: every row is read, and what comes out is counted from the files themselves."""

import gzip
import json
from itertools import combinations

import numpy as np
import pytest

from jaxpost.config import AnswerDataSection, SourceSection
from jaxpost.data.answers import prepare_answers
from jaxpost.data.inspect_answers import inspect_answers
from jaxpost.text.messages import DataError

LIMIT = 20
READ = {
    # file and kind: groups, answers and labels that its first rows must give, counted from the raw rows
    ("preference/hh_harmless_base_test", "pairs"): lambda rows: (len(rows), 2 * len(rows), None),
    ("preference/dpo_en_demo", "pairs"): lambda rows: (len(rows), 2 * len(rows), None),
    ("preference/kto_en_demo", "unpaired"): lambda rows: (len(rows), len(rows), None),
    ("preference/llmbar_adversarial", "pairs"): lambda rows: (len(rows), 2 * len(rows), None),
    ("preference/stack_exchange_tiny", "pairs"): lambda rows: (len(rows), 2 * len(rows), None),
    ("preference/hhh_alignment", "pairs"): lambda rows: (len(rows), 2 * len(rows), None),
    ("preference/alpaca_eval_gpt4_pairs", "pairs"): lambda rows: _times_two(
        sum(c["preference"] != 1.5 for row in rows for c in row["candidates"])
    ),
    ("preference/qa_feedback_fine_grained", "pairs"): lambda rows: _times_two(
        sum(label != 0 for row in rows for label in row["preference"])
    ),
    ("sft/chat_oasst_trees_100", "rankings"): lambda rows: _ranked(rows),
    ("sft/chat_mathdial_test", "pairs"): lambda rows: (len(rows), 2 * len(rows), None),
    ("gsm8k/model_solutions_first_half", "pairs"): lambda rows: _times_two(sum(map(_right_and_wrong, rows))),
    ("gsm8k/model_solutions_first_half", "scores"): lambda rows: (
        len(rows),
        sum(len(_solutions(row)) for row in rows),
        [float(right) for row in rows for right in _solutions(row).values()],
    ),
    ("reward/rubric_scores_mtbench_vicuna", "scores"): lambda rows: (
        len(rows),
        len(rows),
        [np.mean(row["gpt4_score"]) for row in rows],
    ),
    ("reward/math_best_of_8_scored", "scores"): lambda rows: (
        len(rows),
        sum(len(set(row["response"])) for row in rows),
        None,
    ),
    ("reward/truthful_statements", "unpaired"): lambda rows: (len(rows), len(rows), None),
    ("prm/verify_cot_human", "scores"): lambda rows: (len(rows), len(rows), [float(row["flag"]) for row in rows]),
    ("prm/prmbench_train", "steps"): lambda rows: (
        2 * len(rows),
        2 * len(rows),
        [
            label
            for row in rows
            for label in [float(n + 1 not in row["error_steps"]) for n in range(len(row["modified_process"]))]
            + [1.0] * len(row["original_process"])
        ],
    ),
    ("prm/big_bench_mistake", "steps"): lambda rows: (
        len(rows),
        len(rows),
        [
            label
            for row in rows
            for label in (
                [1.0] * len(row["steps"]) if row["mistake_index"] is None else [1.0] * row["mistake_index"] + [0.0]
            )
        ],
    ),
    ("prm/format_sample_math_shepherd", "steps"): lambda rows: (
        len(rows),
        len(rows),
        [1.0 if line.rstrip().endswith("+") else 0.0 for row in rows for line in row["label"].split("\n")],
    ),
    ("prm/format_sample_math_aps_tree", "steps"): lambda rows: (
        sum(_leaves(row["reasoning_steps"]) for row in rows),
        sum(_leaves(row["reasoning_steps"]) for row in rows),
        None,
    ),
}


def _times_two(groups):
    return groups, 2 * groups, None


def _solutions(row):
    return {value["solution"]: value["is_correct"] for value in row.values() if isinstance(value, dict)}


def _right_and_wrong(row):
    return sum(a != b for a, b in combinations(_solutions(row).values(), 2))


def _ranked(rows):
    groups = answers = 0
    waiting = [row["prompt"] for row in rows]
    while waiting:
        replies = [reply for reply in waiting.pop().get("replies", []) if not reply.get("deleted")]
        ranked = [reply for reply in replies if reply["role"] == "assistant" and reply.get("rank") is not None]
        groups += len(ranked) > 1
        answers += len(ranked) if len(ranked) > 1 else 0
        waiting += replies
    return groups, answers, None


def _leaves(node):
    return sum(_leaves(child) for child in node["children"]) if node["children"] else 1


def raw(path):
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for _, line in zip(range(LIMIT), stream, strict=False)]


@pytest.mark.parametrize(("name", "kind"), READ)
def test_first_rows(name, kind, shared_data, tokenizer, tmp_path):
    path = shared_data / f"{name}.jsonl.gz"
    data = AnswerDataSection(train=(SourceSection(path=str(path), limit=LIMIT),), seq_len=60_000)
    dataset = prepare_answers(data, data.train, tokenizer, kind=kind, cache_dir=tmp_path)
    groups, answers, labels = READ[name, kind](raw(path))
    assert (len(dataset), int(dataset.sizes_of_groups.sum())) == (groups, answers)
    assert not dataset.stats[0].bad
    assert not dataset.stats[0].truncated
    if labels is not None:
        found = np.concatenate([a.labels[a.marks > 0] for n in range(groups) for a in dataset.group(n).answers])
        np.testing.assert_allclose(found, labels, rtol=1e-6)
    for n in range(0, groups, 7):
        group = dataset.group(n)
        assert all(tokenizer.decode(a.tokens, skip_special_tokens=False).endswith("<|im_end|>") for a in group.answers)
        assert tokenizer.decode(group.prompt, skip_special_tokens=False).endswith("<|im_start|>assistant\n")


def test_human_judgements_hold_bad_rows_that_are_named(shared_data, tokenizer, tmp_path):
    path = shared_data / "preference/human_pairs_mtbench_faireval_llmeval2.jsonl.gz"
    data = AnswerDataSection(train=(SourceSection(path=str(path), skip=320, limit=5),))
    with pytest.raises(DataError, match=r"jsonl\.gz:\d+: .*(identical|empty)"):
        prepare_answers(data, data.train, tokenizer, kind="pairs", cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("preference/hh_harmless_base_test", "pairs", ["[chosen, ", "[rejected, ", "{+", "[-", "longer in"]),
        ("prm/prmbench_train", "steps", ["  [wrong] ", "judged steps: ", "first wrong step", "circular ("]),
        ("prm/format_sample_math_aps_tree", "steps", ["  [right] ", "judged steps: "]),
    ],
)
def test_reports(name, kind, words, shared_data, tokenizer, tmp_path):
    source = SourceSection(path=str(shared_data / f"{name}.jsonl.gz"), limit=10)
    data = AnswerDataSection(train=(source,), seq_len=4096)
    text = inspect_answers(data, tokenizer, kind=kind, cache_dir=tmp_path)
    for word in words:
        assert word in text
