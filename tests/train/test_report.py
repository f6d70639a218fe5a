"""What the console says of a finished run."""

import json

from jaxpost.train.report import before_and_after


def test_the_first_and_last_evaluation_and_their_answers_are_compared(tmp_path):
    records = [
        {"step": 0, "kind": "eval", "loss": 4.0, "best/loss": 4.0},
        {"step": 1, "kind": "train", "loss": 3.5},
        {"step": 1, "kind": "eval", "loss": 3.0, "best/loss": 3.0},
        {"step": 2, "kind": "eval", "loss": 2.5, "best/loss": 2.5},
    ]
    samples = [{"step": k, "prompt": "Hi\nyou", "text": text} for k, text in ((0, "nan"), (1, "x"), (2, "b\x1b[2J\nc"))]
    for name, rows in (("metrics.jsonl", records), ("samples.jsonl", samples)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert before_and_after(tmp_path) == [
        "held-out loss: 4.0000 before, 2.5000 after",
        "> Hi you",
        "  before: nan",
        "  after:  b?[2J c",
    ]


def test_a_run_without_evaluations_says_nothing(tmp_path):
    assert before_and_after(tmp_path) == []
