"""Messages: every shape that a source writes becomes the same form, and what has no meaning is an error."""

from collections import Counter

import pytest

from jaxpost.text.messages import (
    DataError,
    Message,
    ToolCall,
    parse_conversation,
    parse_message,
    parse_tools,
    to_template,
)


def test_typed_parts_under_either_key_give_text_reasoning_and_calls():
    parts = [
        {"type": "reasoning", "value": "Look it up."},
        {"type": "text", "text": "One "},
        {"type": "text", "value": "moment."},
        {"type": "tool_call", "value": '{"name": "find", "arguments": {"q": "x"}}'},
        {"type": "tool_call", "value": {"name": "find", "arguments": '{"q": "y"}'}},
    ]
    message = parse_message({"role": "assistant", "content": parts})
    assert message.content == "One moment."
    assert message.reasoning == "Look it up."
    assert [call.arguments for call in message.tool_calls] == [{"q": "x"}, {"q": "y"}]


@pytest.mark.parametrize("arguments", [{"a": [1, None]}, '{"a": [1, null]}'])
def test_openai_tool_calls_with_arguments_as_object_or_json(arguments):
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": arguments}}
    message = parse_message({"role": "assistant", "content": None, "tool_calls": [call]})
    assert message == Message(role="assistant", tool_calls=(ToolCall(name="add", arguments={"a": [1, None]}, id="c1"),))
    assert to_template([message])[0]["tool_calls"][0]["function"]["arguments"] == {"a": [1, None]}


def test_arguments_that_are_no_json_stay_text():
    message = parse_message(
        {"role": "assistant", "content": None, "function_call": {"name": "sh", "arguments": "ls -l"}}
    )
    assert message.tool_calls[0].arguments == "ls -l"


@pytest.mark.parametrize(
    ("key", "value", "weight"),
    [
        ("loss_weight", 0.25, 0.25),
        ("weight", 1, 1.0),
        ("train", False, 0.0),
        ("train", True, 1.0),
        ("train", None, None),
    ],
)
def test_weights(key, value, weight):
    assert parse_message({"role": "assistant", "content": "x", key: value}).weight == weight


@pytest.mark.parametrize(
    ("keys", "weight"),
    [
        ({"loss_weight": 1.0, "train": False}, 0.0),
        ({"weight": 0.5, "train": False}, 0.0),
        ({"loss_weight": 0, "train": True}, 0.0),
        ({"loss_weight": 0.5, "weight": 0.5, "train": True}, 0.5),
        ({"loss_weight": None, "weight": 2, "train": None}, 2.0),
        ({"loss_weight": 3.4e38}, 3.4e38),
    ],
)
def test_a_turn_that_any_key_takes_out_is_out(keys, weight):
    assert parse_message({"role": "assistant", "content": "x", **keys}).weight == weight


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "narrator", "content": "x"}, "unknown role 'narrator'; known roles: system, user"),
        ({"role": 3, "content": "x"}, "role is 3, not text"),
        ({"content": "x"}, "no role; its keys are content"),
        ({"role": "user", "content": None}, "role user has no content"),
        ({"role": "assistant", "content": None}, "role assistant has no content"),
        ({"role": "user", "content": 7}, "content that is not text: 7"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "u"}]}, "type 'image_url' cannot be read"),
        ({"role": "user", "content": [{"type": "text", "text": 5}]}, "type text has no text"),
        ({"role": "user", "content": "x", "tool_calls": [{"name": "f"}]}, "only assistant may"),
        ({"role": "assistant", "content": "x", "refusal": "I cannot"}, "'refusal'"),
        ({"role": "assistant", "content": "x", "loss_weight": -1}, "number >= 0, not -1"),
        ({"role": "assistant", "content": "x", "loss_weight": float("nan")}, "number >= 0, not nan"),
        ({"role": "assistant", "content": "x", "loss_weight": 1e39}, "3.4e+38 (32-bit numbers), not 1e+39"),
        ({"role": "assistant", "content": "x", "weight": 1e-60}, "weight of a message must be 0 or lie between"),
        ({"role": "assistant", "content": "x", "weight": 10**5000}, "not a whole number of many digits"),
        ({"role": "assistant", "content": "x", "loss_weight": 1, "train": "no"}, "train of a message must be true"),
        ({"role": "assistant", "content": "x", "loss_weight": 1, "weight": 0.5}, "loss_weight 1 and weight 0.5, which"),
        ({"role": "assistant", "content": "", "tool_calls": "{"}, "not valid JSON"),
        ({"role": "assistant", "content": "", "tool_calls": '{"name": "f", "name": "g"}'}, "'name' stands twice"),
        ({"role": "assistant", "content": "", "tool_calls": "[" * 100_000}, "not valid JSON"),
        ({"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": "9" * 5000}]}, "a call of f"),
        (
            {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": "[" * 100_000}]},
            "a call of f",
        ),
        (
            {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": '{"a":1,"a":2}'}]},
            "'a' stands",
        ),
        ({"role": "user", "content": [{"type": ["text"], "text": "x"}]}, "type is ['text'], not text"),
        (
            {"role": "assistant", "content": "x", "reasoning_content": "a", "reasoning": "b"},
            "reasoning of a message is not the reasoning that it has besides",
        ),
        (
            {"role": "assistant", "content": [{"type": "thinking", "text": "a"}], "thinking": "b"},
            "thinking of a message is not the reasoning",
        ),
        ({"role": "assistant", "content": "", "tool_calls": [{"arguments": {}}]}, "has no name"),
        ("hello", "must be an object"),
    ],
)
def test_errors_name_what_is_wrong(message, words):
    with pytest.raises(DataError) as caught:
        parse_message(message)
    assert words in str(caught.value)


def test_the_turn_stands_in_the_error():
    with pytest.raises(DataError, match=r"^message 1: unknown role 'bot'"):
        parse_conversation([{"role": "user", "content": "x"}, {"role": "bot", "content": "y"}])


@pytest.mark.parametrize("value", [[], "text", {"role": "user", "content": "x"}])
def test_a_conversation_is_a_list_that_is_not_empty(value):
    with pytest.raises(DataError, match="messages"):
        parse_conversation(value)


def test_keys_without_meaning_are_counted_and_null_ones_are_not():
    ignored = Counter()
    parse_message({"role": "developer", "content": "x", "id": 5, "tool_calls": None, "refusal": None}, ignored)
    assert ignored == {"messages[].id": 1}


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (None, None),
        ("[]", None),
        ("", None),
        ([{"type": "function", "function": {"name": "a"}}, {"name": "b"}], ["a", "b"]),
        ('[{"name": "a"}]', ["a"]),
        (['{"name": "a"}'], ["a"]),
    ],
)
def test_tools_as_json_text_or_lists(value, names):
    tools = parse_tools(value)
    assert (tools and [tool.get("function", tool)["name"] for tool in tools]) == names


def test_reasoning_that_stands_twice_in_the_same_words_is_read_once():
    message = {"role": "assistant", "content": "x", "reasoning_content": "", "reasoning": "a", "thinking": "a"}
    assert parse_message(message).reasoning == "a"


@pytest.mark.parametrize(
    "value",
    [
        *("[", "3", [4], [{"description": "no name"}], [{"function": "f", "name": "f"}], "[" * 100_000),
        '[{"name": "a", "name": "b"}]',
    ],
)
def test_tools_that_are_none(value):
    with pytest.raises(DataError, match="tool"):
        parse_tools(value)
