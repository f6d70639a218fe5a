"""Masks: which tokens of a row are trained, with what weight; windows; rows of which nothing is trained."""

import json

import numpy as np
import pytest
from toy_text import LLAMA3, fast_tokenizer

from jaxpost.data.dataset import prepare
from jaxpost.text.messages import DataError
from jaxpost.text.tokenizer import Tokenizer

U1, A1 = {"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two"}
U2, A2 = {"role": "user", "content": "Three?"}, {"role": "assistant", "content": "Four"}
CHAT = {"messages": [U1, A1, U2, A2]}
PAIR = {"prompt": [U1, A1, U2], "completion": [A2]}
PLAIN = {"prompt": "One, two,", "completion": " three"}
TEXT = {"text": "One two three."}


@pytest.fixture
def trained(section, tokenizer, tmp_path):
    """trained(row, **options): [(text, weight)] of the runs of trained tokens, and the whole text."""

    def run(row, use=None, **options):
        data = section([row], **options)
        used = tokenizer if use is None else use
        dataset = prepare(data, data.train, used, cache_dir=tmp_path / "cache")
        tokens, weights = dataset.example(0)
        edges = np.flatnonzero(np.diff(weights)) + 1
        parts = zip(np.split(tokens, edges), np.split(weights, edges), strict=True)
        runs = [(used.decode(t, skip_special_tokens=False), float(w[0])) for t, w in parts if w[0]]
        return runs, used.decode(tokens, skip_special_tokens=False)

    return run


def test_assistant_turns_with_their_end_token(trained):
    runs, text = trained(CHAT, mask="assistant")
    assert runs == [("Two<|im_end|>", 1.0), ("Four<|im_end|>", 1.0)]
    assert text == (
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\nTwo<|im_end|>\n"
        "<|im_start|>user\nThree?<|im_end|>\n<|im_start|>assistant\nFour<|im_end|>\n"
    )


def test_completion_is_only_the_last_answer(trained):
    assert trained(PAIR, mask="completion")[0] == [("Four<|im_end|>", 1.0)]
    assert trained(PAIR, mask="assistant")[0] == [("Two<|im_end|>", 1.0), ("Four<|im_end|>", 1.0)]


def test_completion_with_a_system_prompt_put_before(trained):
    runs, text = trained(PAIR, mask="completion", system_prompt="Count.")
    assert runs == [("Four<|im_end|>", 1.0)]
    assert text.startswith("<|im_start|>system\nCount.<|im_end|>\n<|im_start|>user\nOne?")
    own = {"messages": [{"role": "system", "content": "Mine."}, U1, A1]}
    assert "Count." not in trained(own, system_prompt="Count.")[1]
    assert trained(PAIR, mask="completion", system_prompt="") == trained(PAIR, mask="completion")  # no empty turn


def test_all_is_everything_but_the_first_token(trained):
    runs, text = trained(CHAT, mask="all")
    assert runs == [(text.removeprefix("<|im_start|>"), 1.0)]


def test_plain_completion_ends_in_the_end_token_and_has_no_template(trained):
    runs, text = trained(PLAIN, mask="completion")
    assert runs == [(" three<|im_end|>", 1.0)]
    assert text == "One, two, three<|im_end|>"


def test_plain_pairs_are_turns_under_the_assistant_mask(trained):
    runs, text = trained(PLAIN, mask="assistant")
    assert runs == [(" three<|im_end|>", 1.0)]
    assert text == "<|im_start|>user\nOne, two,<|im_end|>\n<|im_start|>assistant\n three<|im_end|>\n"


def test_plain_text(trained):
    runs, text = trained(TEXT, mask="all")
    assert text == "One two three.<|im_end|>"
    assert runs[0][0] == text.removeprefix("O")


def test_a_tokenizer_that_begins_texts_with_bos_keeps_doing_so(trained):
    hf = fast_tokenizer("llama3", LLAMA3)
    from tokenizers.processors import TemplateProcessing

    bos = hf.convert_tokens_to_ids("<|begin_of_text|>")
    hf.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)]
    )
    use = Tokenizer(hf)
    assert trained(PLAIN, use, mask="completion")[1] == "<|begin_of_text|>One, two, three<|eot_id|>"
    assert trained(CHAT, use, mask="assistant")[1].count("<|begin_of_text|>") == 1


def weighted(*weights):
    turns = [dict(turn) for turn in (U1, A1, U2, A2)]
    for turn, weight in zip(turns, weights, strict=True):
        turn["loss_weight"] = weight
    return {"messages": turns}


def test_weights_scale_turns(trained):
    assert trained(weighted(0, 0.25, 0, 2), mask="weights")[0] == [("Two<|im_end|>", 0.25), ("Four<|im_end|>", 2.0)]
    assert trained(weighted(None, None, 0, 0), mask="weights")[0] == [("Two<|im_end|>", 1.0)]


def test_a_turn_that_is_not_to_be_trained_is_read_only_under_every_turn_mask(trained):
    assert trained(weighted(0, 0, 0, 1), mask="assistant")[0] == [("Four<|im_end|>", 1.0)]
    off = {"messages": [U1, {**A1, "train": False}, U2, A2]}
    assert trained(off, mask="assistant")[0] == [("Four<|im_end|>", 1.0)]


def test_fractions_under_another_mask_are_noted(section, tokenizer, tmp_path):
    data = section([weighted(0, 0.5, 0, 1)])
    stats = prepare(data, data.train, tokenizer, cache_dir=tmp_path).stats[0]
    assert stats.notes == {"turns whose loss_weight counts as 1 under mask: assistant": 1}


@pytest.mark.parametrize(
    ("row", "mask", "kind", "words"),
    [
        (TEXT, "assistant", "format", "plain text has no assistant turns"),
        (TEXT, "completion", "format", "use mask: all"),
        (CHAT, "completion", "format", "needs rows of prompt and completion"),
        ({"messages": [U1]}, "assistant", "empty_mask", "no assistant turn, so nothing of it is trained"),
        (weighted(0, 0, 0, 0), "weights", "empty_mask", "nothing of the row is trained"),
        (weighted(1, 1, 0, 1), "weights", "weight", "a user turn has loss_weight 1.0"),
        ({"text": ""}, "all", "empty_mask", "nothing of the row is trained"),
        ({"prompt": "Hi"}, "all", "format", "PromptOnly rows are not for supervised training"),
        ({"chosen": "a b", "rejected": "a c"}, "all", "format", "Preference rows are not for supervised training"),
        ({**PLAIN, "tools": [{"name": "f"}]}, "completion", "tools", "tools stand beside plain text"),
    ],
)
def test_rows_that_cannot_be_trained_on(trained, row, mask, kind, words):
    with pytest.raises(DataError) as caught:
        trained(row, mask=mask)
    assert words in str(caught.value)
    assert "rows0.jsonl:1: " in str(caught.value)
    assert caught.value.kind == kind


def test_long_rows(section, tokenizer, tmp_path):
    late = {"messages": [{"role": "user", "content": "x" * 90}, A1]}
    long = {"messages": [U1, {"role": "assistant", "content": "y" * 90}]}
    short = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}

    def run(policy):
        data = section([late, long, short], seq_len=60, on_long_row=policy)
        left = tmp_path / "rejected.jsonl"
        return prepare(data, data.train, tokenizer, cache_dir=tmp_path / "cache", rejected=left)

    def left_out():
        saved = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]
        return [(row["where"].rsplit("/", 1)[1], row["kind"], row["reason"], json.loads(row["row"])) for row in saved]

    cut = run("truncate")
    assert len(cut) == 2
    assert cut.lengths[0] == 60
    full = tokenizer.encode(tokenizer.render(long["messages"]))
    np.testing.assert_array_equal(cut.example(0)[0], full[:60])
    stats = cut.stats[0]
    assert (stats.truncated, stats.truncated_tokens) == (1, len(full) - 60)
    assert stats.dropped == {"nothing trained within the window": 1}
    assert left_out() == [("rows0.jsonl:1", "dropped", "nothing trained within the window", late)]
    dropped = run("drop")
    assert len(dropped) == 1
    assert dropped.stats[0].dropped == {"too long": 2}
    assert left_out() == [(f"rows0.jsonl:{n}", "dropped", "too long", row) for n, row in ((1, late), (2, long))]
    with pytest.raises(
        DataError, match=r"rows0\.jsonl:1: the row has \d+ tokens and the window 60; raise data\.seq_len"
    ):
        run("error")
