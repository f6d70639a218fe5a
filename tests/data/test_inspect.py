"""The report: trained tokens marked, counts that add up, formats that are not trained, colours only when asked."""

import numpy as np
import pytest

from jaxpost.data.inspect import histogram, inspect, show_tokens
from jaxpost.text.messages import DataError

CHAT = {"messages": [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two\nlines"}], "id": 4}


@pytest.fixture
def report(section, tokenizer, tmp_path):
    def run(*files, rows=1, color=False, **options):
        data = section(*files, **options)
        return inspect(data, tokenizer, cache_dir=tmp_path / "cache", rows=rows, color=color)

    return run


def test_trained_tokens_are_marked(report):
    text = report([CHAT])
    assert "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n[[Two\nlines<|im_end|>]]\n" in text
    assert "rows0.jsonl:1" in text
    assert "\x1b" not in text


def test_colours_are_given_line_by_line(report):
    text = report([CHAT], color=True)
    assert "\x1b[32mTwo\x1b[0m\n\x1b[32mlines<|im_end|>\x1b[0m" in text
    assert "\x1b[2mOne?<|im_end|>\x1b[0m" in text
    assert "[[" not in text


def test_weights_stand_before_their_part(tokenizer):
    ids = tokenizer.encode("one two three")
    weights = np.zeros(len(ids), np.float32)
    weights[1:] = 0.5
    text = show_tokens(np.array(ids), weights, tokenizer, False)
    assert text.endswith("]]")
    assert "[[(x0.5)" in text
    assert text.replace("[[(x0.5)", "").replace("]]", "") == "one two three"


def test_counts(report):
    long = {"messages": [CHAT["messages"][0], {"role": "assistant", "content": "z" * 400}]}
    text = report([CHAT, CHAT, long, {"question": "?"}], [CHAT], on_bad_row="skip", weights=[1.0, 3.0])
    first, second = [line.split() for line in text.splitlines() if line.strip().endswith("%") and "rows" in line]
    assert first[1:3] == ["4", "3"]
    assert first[5:] == ["1", "0", "1", "25.0%"]
    assert second[1:3] == ["1", "1"]
    assert second[5:] == ["0", "0", "0", "75.0%"]
    assert "bad rows: format (1)" in text
    assert "not read: id (2)" in text
    assert "% filled; " in text
    assert "longest 256, window 256" in text


def test_formats_that_are_not_trained_are_checked_and_shown(report):
    pair = {"prompt": "2+2=", "chosen": "4", "rejected": "5"}
    text = report([pair, pair])
    assert "(Preference)\nprompt: 2+2=\nchosen: 4\nrejected: 5" in text
    assert "2 rows: 2 preference; no rows for supervised training" in text
    steps = {"prompt": [CHAT["messages"][0]], "completions": ["4", "7"], "labels": [True, False]}
    text = report([steps])
    assert "prompt: \n  user: One?\n  [right] 4\n  [wrong] 7" in text
    with pytest.raises(DataError, match=r"rows0\.jsonl:2: .*neither is better"):
        report([pair, {"chosen": "a", "rejected": "a"}])


def test_a_row_that_cannot_be_trained_says_so(report):
    user_only = {"messages": [CHAT["messages"][0]]}
    text = report([user_only, CHAT], rows=2, on_bad_row="skip")
    assert "(cannot be trained on: the conversation has no assistant turn" in text


def test_no_sources(report):
    with pytest.raises(DataError, match="no data"):
        report()


def test_histogram_counts_every_example():
    lengths = np.array([1, 2, 3, 10, 10, 100])
    lines = list(histogram(lengths, 128))
    assert sum(int(line.split()[3]) for line in lines[:-1]) == 6
    assert lines[-1] == "median 6, 95% 78, longest 100, window 128"
