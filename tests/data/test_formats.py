"""Row formats: found from the columns, checked by value, with errors that name the key."""

from collections import Counter

import pytest

from jaxpost.data.formats import (
    FORMATS,
    LanguageModeling,
    Preference,
    PromptCompletion,
    PromptOnly,
    Ranking,
    Scored,
    Stepwise,
    UnpairedPreference,
    detect_format,
    parse_example,
    texts_of,
)
from jaxpost.text.messages import DataError, Message

USER, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
U, A = Message(role="user", content="2+2?"), Message(role="assistant", content="4")
BAD = {"role": "assistant", "content": "5"}
B = Message(role="assistant", content="5")
OTHER = {"role": "assistant", "content": "four"}
FOUR = Message(role="assistant", content="four")

ROWS = {
    "language_modeling": ({"text": "Hi"}, LanguageModeling(content="Hi")),
    "prompt_only": ({"prompt": "Hi"}, PromptOnly(prompt="Hi")),
    "prompt_completion": ({"prompt": "Hi", "completion": "Ho"}, PromptCompletion(prompt="Hi", completion="Ho")),
    "preference": (
        {"prompt": "2+2=", "chosen": "4", "rejected": "5"},
        Preference(prompt="2+2=", chosen="4", rejected="5"),
    ),
    "ranking": (
        {"prompt": "2+2=", "completions": ["5", "4", "6"], "ranks": [2, 1, 2]},
        Ranking(prompt="2+2=", completions=("5", "4", "6"), ranks=(1, 0, 1)),
    ),
    "scored": ({"prompt": "2+2=", "completion": "4", "score": 5}, Scored(prompt="2+2=", completion="4", score=5.0)),
    "unpaired_preference": (
        {"prompt": "2+2=", "completion": "4", "label": True},
        UnpairedPreference(prompt="2+2=", completion="4", label=True),
    ),
    "stepwise": (
        {"prompt": "2+2+2?", "completions": ["4", "7"], "labels": [True, False]},
        Stepwise(prompt="2+2+2?", completions=("4", "7"), labels=(1.0, 0.0)),
    ),
}
CONVERSATIONS = {
    "language_modeling": ({"messages": [USER, ANSWER]}, LanguageModeling(content=(U, A))),
    "prompt_only": ({"prompt": [USER]}, PromptOnly(prompt=(U,))),
    "prompt_completion": ({"prompt": [USER], "completion": [ANSWER]}, PromptCompletion(prompt=(U,), completion=(A,))),
    "preference": (
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [BAD]},
        Preference(prompt=(U,), chosen=(A,), rejected=(B,)),
    ),
    "ranking": (
        {"prompt": [USER], "edited": [ANSWER], "chosen": [OTHER], "rejected": [BAD]},
        Ranking(prompt=(U,), completions=((A,), (FOUR,), (B,)), ranks=(0, 1, 2)),
    ),
    "scored": (
        {"prompt": "2+2?", "completion": [ANSWER], "score": 4.5},
        Scored(prompt=(U,), completion=(A,), score=4.5),
    ),
    "unpaired_preference": (
        {"prompt": [USER], "completion": [BAD], "label": 0},
        UnpairedPreference(prompt=(U,), completion=(B,), label=False),
    ),
    "stepwise": (
        {"prompt": [USER], "completions": ["4"], "labels": [1]},
        Stepwise(prompt=(U,), completions=("4",), labels=(1.0,)),
    ),
}


def test_every_format_has_a_case():
    assert set(ROWS) == set(CONVERSATIONS) == set(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("cases", [ROWS, CONVERSATIONS])
def test_detection_and_reading(name, cases):
    row, expected = cases[name]
    assert detect_format(list(row)) == name
    assert parse_example(row, name) == expected


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        (["prompt", "prompt_id", "messages"], "language_modeling"),  # a conversation with its first turn repeated
        (["prompt", "chosen", "rejected", "messages", "score_chosen"], "preference"),
        (["chosen", "rejected"], "preference"),
        (["text", "label"], "language_modeling"),
    ],
)
def test_the_most_specific_format_wins(columns, name):
    assert detect_format(columns) == name


def test_unknown_columns_list_the_formats():
    with pytest.raises(DataError, match=r"no row format has the keys question, answer; rename .*prompt_completion: "):
        detect_format(["question", "answer"])


def test_the_common_beginning_is_the_prompt():
    plain = {"chosen": "Human: Hi\n\nBot: Hello there.", "rejected": "Human: Hi\n\nBot: Help!"}
    example = parse_example(plain, "preference")
    assert (example.prompt, example.chosen, example.rejected) == ("Human: Hi\n\nBot:", " Hello there.", " Help!")
    turns = {"chosen": [USER, ANSWER], "rejected": [USER, BAD]}
    assert parse_example(turns, "preference") == CONVERSATIONS["preference"][1]
    repeated = {"prompt": "2+2?", "chosen": [USER, ANSWER], "rejected": [USER, BAD]}
    assert parse_example(repeated, "preference") == CONVERSATIONS["preference"][1]


def test_a_plain_part_beside_a_conversation_becomes_a_turn():
    row = {"prompt": "2+2?", "completion": [ANSWER]}
    assert parse_example(row, "prompt_completion") == CONVERSATIONS["prompt_completion"][1]
    row = {"prompt": [USER], "completion": "4"}
    assert parse_example(row, "prompt_completion") == CONVERSATIONS["prompt_completion"][1]


def test_tools_stand_beside_any_format():
    example = parse_example({"prompt": [USER], "tools": '[{"name": "add"}]'}, "prompt_only")
    assert example.tools == ({"name": "add"},)


def test_columns_that_nothing_reads_are_counted():
    ignored = Counter()
    parse_example({"text": "Hi", "url": "u", "score": None}, "language_modeling", ignored)
    assert ignored == {"url": 1}


def test_null_is_absent_and_a_text_beside_messages_is_counted():
    ignored = Counter()
    row = {"text": "Hi", "messages": None}
    assert parse_example(row, "language_modeling", ignored) == LanguageModeling(content="Hi")
    row = {"text": None, "messages": [USER, ANSWER]}
    assert parse_example(row, "language_modeling", ignored) == LanguageModeling(content=(U, A))
    assert not ignored
    row = {"text": "<user> 2+2?", "messages": [USER, ANSWER]}
    assert parse_example(row, "language_modeling", ignored) == LanguageModeling(content=(U, A))
    assert ignored == {"text": 1}


@pytest.mark.parametrize(
    ("row", "name", "words"),
    [
        ({"text": None}, "language_modeling", "text must be text or a list of messages, not null"),
        ({"text": 5}, "language_modeling", "text must be text or a list of messages, not 5"),
        ({"messages": "Hi"}, "language_modeling", "messages must be a list"),
        ({"messages": []}, "language_modeling", "empty list"),
        ({"prompt": "a"}, "prompt_completion", "a prompt_completion row needs completion, prompt; this row has prompt"),
        ({"prompt": "a", "completion": None}, "prompt_completion", "completion must be text"),
        ({"prompt": "a", "completion": "b", "label": "good"}, "unpaired_preference", "label must be true or false"),
        ({"chosen": "a", "rejected": [ANSWER]}, "preference", "must both be"),
        ({"chosen": "same", "rejected": "same"}, "preference", "identical, so neither is better"),
        ({"prompt": "a", "completions": "b", "labels": []}, "stepwise", "completions must be a list"),
        ({"prompt": "a", "completions": ["b"], "labels": []}, "stepwise", "one entry for each of the 1"),
        ({"prompt": "a", "completions": ["b"], "labels": [1.5]}, "stepwise", "labels[0] must be true or false"),
        ({"prompt": "a", "completions": [1], "labels": [True]}, "stepwise", "completions[0] must be text"),
        ({"messages": [USER, {"role": "x"}]}, "language_modeling", "messages: message 1: unknown role 'x'"),
    ],
)
def test_errors_name_the_key(row, name, words):
    with pytest.raises(DataError) as caught:
        parse_example(row, name)
    assert words in str(caught.value)


def test_texts_of_an_example():
    assert texts_of(CONVERSATIONS["preference"][1]) == ["2+2?", "4", "5"]
    assert texts_of(ROWS["stepwise"][1]) == ["2+2+2?", "4", "7"]
