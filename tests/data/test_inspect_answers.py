"""The report of judged rows: both sides and what differs, steps, counts, lengths by side."""

import re

import pytest

from jaxpost.config import AnswerDataSection
from jaxpost.data.inspect_answers import inspect_answers, sides
from jaxpost.text.messages import DataError

PAIRS = [
    {
        "prompt": "2+2?",
        "chosen": "I say it is 4, sure.",
        "rejected": "I say it was 5, sure.",
        "strength": "better",
    },
    {"prompt": "2+3?", "chosen": "It is 5.", "rejected": "It is most surely 6.", "subset": "hard"},
    {"prompt": "2+4?", "chosen": "six", "rejected": "6", "tie": True},
]


@pytest.fixture
def report(judged, tokenizer, tmp_path):
    """report(kind, rows, color=..., **options): the text."""

    def run(kind, rows, *, color=False, **options):
        judged(kind, rows, **options)
        return inspect_answers(judged.section, tokenizer, kind=kind, cache_dir=tmp_path / "cache", color=color)

    return run


def test_both_sides_and_what_differs(report):
    text = report("pairs", PAIRS)
    assert "--- group 0\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n" in text
    assert ", strength 0.666667]\nI say it {+is 4,+} sure.<|im_end|>" in text
    assert "I say it [-was 5,-] sure.<|im_end|>" in text
    assert "--- group 1 (hard)" in text
    assert "It is {+5.<|im_end|>+}" in text


def test_colours_are_closed_on_every_line(report):
    text = report("pairs", [{"prompt": "a", "chosen": "one\ntwo", "rejected": "three"}], color=True)
    assert "\x1b[32mone\x1b[0m\n\x1b[32mtwo<|im_end|>\x1b[0m" in text
    assert "\x1b[31mthree<|im_end|>\x1b[0m" in text
    assert "\x1b[2m<|im_start|>user\x1b[0m" in text


def test_counts_of_pairs(report):
    text = report("pairs", PAIRS)
    assert "dropped: tie (1)" in text
    assert "answers of a group: 2 (2)" in text
    assert "strengths: 0.666667 (1), 1 (1)" in text
    assert "subsets: hard (1)" in text
    assert "the chosen answer is longer in 0.0% of the pairs, as long in" in text
    assert re.search(r"^left out \(tie\), the first: .*rows0\.jsonl:3$", text, re.MULTILINE)
    wrong = {"prompt": "2+2?", "chosen": "4", "rejected": "4"}
    some = report("pairs", [PAIRS[0], wrong, wrong], on_bad_row="skip")
    assert re.search(r"^left out \(identical\), the first: .*rows0\.jsonl:2: chosen and rej", some, re.MULTILINE)
    kept = report("pairs", PAIRS, on_tie="keep")
    assert "groups with ties: 1" in kept
    assert "[tied, " in kept


def test_lengths_by_side(judged):
    dataset = judged("pairs", PAIRS, on_tie="keep")
    found = sides(dataset)
    assert {name: len(lengths) for name, lengths in found.items()} == {"chosen": 2, "rejected": 2}  # no tied ones
    for name, rank in (("chosen", 0), ("rejected", 1)):
        assert found[name].tolist() == [len(dataset.group(n).answers[rank].tokens) for n in range(2)]


def test_the_other_kinds(report):
    rankings = report("rankings", [{"prompt": "a", "completions": ["x y", "x z", "w"], "ranks": [1, 0, 0]}])
    assert "[rank 1, " in rankings
    assert "[rank 0, tied, " in rankings
    unpaired = report("unpaired", [{"prompt": "a", "completion": "b", "label": n < 1} for n in range(4)])
    assert "[desirable, " in unpaired
    assert "desirable: 1 of 4 (25.0%)" in unpaired
    scores = report("scores", [{"prompt": "a", "completion": "b", "score": n} for n in (1, 5, 5)])
    assert "[score 5, " in scores
    assert "scores: 1 (1), 5 (2)" in scores
    rows = [{"prompt": "a", "completion": "b", "score": {"help": n, "fun": None}} for n in (1, 2)]
    aspects = report("scores", rows, objectives=("help", "fun"))
    assert "[help 1, fun unknown, " in aspects
    assert "scores of help: 1 (1), 2 (1)\nscores of fun: none" in aspects
    row = {"prompt": "a", "completions": ["b", "c", "d"], "labels": [1, 0.25, None]}
    steps = report("steps", [row, {**row, "labels": [1, 1, 1]}])
    assert "  [right] b\n  [0.25] c\n  [not judged] d" in steps
    assert "judged steps: 5, 80.0% right; labels: 0.25 (1), 1 (4)" in steps
    assert "first wrong step among the judged: none (1), step 2 (1)" in steps


def test_no_data_is_an_error(tokenizer, tmp_path):
    with pytest.raises(DataError, match="no data"):
        inspect_answers(AnswerDataSection(), tokenizer, kind="pairs", cache_dir=tmp_path)
