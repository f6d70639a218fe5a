"""Converters: other shapes give the same rows that one would write by hand."""

from collections import Counter

import pytest

from jaxpost.data.convert import convert, detect_converter, is_linked, link_messages
from jaxpost.data.formats import detect_format, parse_example
from jaxpost.text.messages import DataError


def read(row, name="auto", ignored=None):
    ignored = Counter() if ignored is None else ignored
    rows = convert(row, name, ignored)
    return [parse_example(item, detect_format(list(item)), ignored) for item in rows]


def turns(messages):
    return [(m.role, m.content) for m in messages]


def test_sharegpt_with_system_tools_calls_and_results():
    row = {
        "system": "Be kind.",
        "conversations": [
            {"from": "human", "value": "Time?"},
            {"from": "function_call", "value": '{"name": "now", "arguments": {"zone": "UTC"}}'},
            {"from": "observation", "value": "12:00"},
            {"from": "gpt", "value": "Noon.", "weight": 0},
        ],
        "tools": '[{"name": "now", "parameters": {}}]',
        "id": "x",
    }
    ignored = Counter()
    (example,) = read(row, ignored=ignored)
    expected = [("system", "Be kind."), ("user", "Time?"), ("assistant", ""), ("tool", "12:00"), ("assistant", "Noon.")]
    assert turns(example.content) == expected
    assert example.content[2].tool_calls[0].arguments == {"zone": "UTC"}
    assert example.content[-1].weight == 0
    assert example.tools == ({"name": "now", "parameters": {}},)
    assert ignored == {"id": 1}


def test_sharegpt_preference():
    row = {
        "conversations": [{"from": "human", "value": "2+2?"}],
        "chosen": {"from": "gpt", "value": "4"},
        "rejected": {"from": "gpt", "value": "5"},
    }
    (example,) = read(row)
    assert turns(example.prompt + example.chosen + example.rejected) == [
        ("user", "2+2?"),
        ("assistant", "4"),
        ("assistant", "5"),
    ]


def test_openai_messages_under_either_name_and_a_judged_answer():
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "5"}]
    (example,) = read({"conversations": messages})
    assert turns(example.content) == [("user", "2+2?"), ("assistant", "5")]
    (example,) = read({"messages": messages, "label": False})
    assert (turns(example.prompt), turns(example.completion), example.label) == (
        [("user", "2+2?")],
        [("assistant", "5")],
        False,
    )


def test_alpaca_with_input_history_and_system():
    row = {
        "instruction": "Add.",
        "input": "2 and 2",
        "output": "4",
        "system": "Be exact.",
        "history": [["Hi", "Hello"]],
    }
    (example,) = read(row)
    assert turns(example.prompt) == [
        ("system", "Be exact."),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Add.\n\n2 and 2"),
    ]
    assert turns(example.completion) == [("assistant", "4")]


def test_alpaca_without_input_and_with_response_or_instances():
    (example,) = read({"instruction": "Say hi", "input": "", "response": "Hi"})
    assert turns(example.prompt + example.completion) == [("user", "Say hi"), ("assistant", "Hi")]
    both = [{"input": "1", "output": "one"}, {"input": "2", "output": "two"}]
    examples = read({"instruction": "Spell", "instances": both})
    assert [turns(e.prompt + e.completion) for e in examples] == [
        [("user", "Spell\n\n1"), ("assistant", "one")],
        [("user", "Spell\n\n2"), ("assistant", "two")],
    ]


def node(role, text, *replies, **extra):
    return {"role": role, "text": text, "replies": list(replies), **extra}


def test_a_tree_trains_each_best_reply_once():
    tree = node(
        "prompter",
        "Q",
        node("assistant", "bad", rank=1),
        node(
            "assistant",
            "good",
            node("prompter", "more?", node("assistant", "more")),
            node("prompter", "why?", node("assistant", "because"), node("assistant", "gone", deleted=True)),
            node("prompter", "unanswered"),
            rank=0,
        ),
    )
    ignored = Counter()
    examples = read({"prompt": tree, "message_tree_id": 1}, ignored=ignored)
    got = [[(m.content, m.weight) for m in e.content] for e in examples]
    assert got == [
        [("Q", None), ("good", 1.0), ("more?", None), ("more", 1.0)],
        [("Q", None), ("good", 0.0), ("why?", None), ("because", 1.0)],
    ]
    assert ignored["oasst: replies ranked lower"] == 1
    assert ignored["oasst: deleted messages"] == 1
    assert ignored["oasst: unanswered user turns"] == 1


def test_linked_rows_make_trees():
    rows = [
        {"message_id": "a", "parent_id": None, "role": "prompter", "text": "Q"},
        {"message_id": "c", "parent_id": "b", "role": "prompter", "text": "Q2"},
        {"message_id": "b", "parent_id": "a", "role": "assistant", "text": "A"},
        {"message_id": "d", "parent_id": "c", "role": "assistant", "text": "A2"},
    ]
    assert all(is_linked(row) for row in rows)
    (tree,) = link_messages(rows)
    (example,) = read(tree)
    assert [m.content for m in example.content] == ["Q", "A", "Q2", "A2"]
    with pytest.raises(DataError, match="names a parent 'b' that no row has"):
        link_messages(rows[:2])
    with pytest.raises(DataError, match="message_id 'a' stands in 2 rows"):
        link_messages([rows[0], rows[0]])


def linked(own, parent, role="prompter", **extra):
    return {"message_id": own, "parent_id": parent, "role": role, "text": "x", **extra}


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (linked("b", "b"), "f:2: the parents of the message 'b' go round in a circle"),
        (linked(None, "a"), "f:2: message_id must be a text or a number, not None"),
        (linked(["b"], "a"), "f:2: message_id must be a text or a number, not ['b']"),
        (linked("b", {}), "f:2: parent_id must be a text, a number, or null where a tree begins, not {}"),
        ({"message_id": "b", "role": "prompter", "text": "x"}, "begins, but the row has none"),
    ],
)
def test_linked_rows_that_make_no_tree_are_named(bad, words):
    with pytest.raises(DataError) as caught:
        link_messages([linked("a", None), bad], ["f:1", "f:2"])
    assert words in str(caught.value)


ASK, TOLD = {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}


def test_the_same_said_twice_is_read_once():
    system = {"from": "system", "value": "Be kind."}
    same = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    (example,) = read({"system": "Be kind.", "conversations": [system, ASK, TOLD]})
    assert turns(example.content) == [("system", "Be kind."), ("user", "Q"), ("assistant", "A")]
    (example,) = read({"messages": list(same), "conversations": [ASK, {**TOLD, "role": "assistant", "content": "A"}]})
    assert turns(example.content) == [("user", "Q"), ("assistant", "A")]
    (example,) = read({"messages": None, "conversations": list(same)})
    assert turns(example.content) == [("user", "Q"), ("assistant", "A")]
    (example,) = read({"conversations": None, "conversation": [ASK, TOLD]}, "sharegpt")
    assert turns(example.content) == [("user", "Q"), ("assistant", "A")]
    (example,) = read({"instruction": "Q", "output": "A", "response": "A"})
    assert turns(example.completion) == [("assistant", "A")]
    (example,) = read({"instruction": "Q", "output": None, "response": "A"})
    assert turns(example.completion) == [("assistant", "A")]


@pytest.mark.parametrize(
    ("row", "counted"),
    [
        ({"instruction": "Q", "output": "A", "prompt": "P", "text": "T"}, ["prompt", "text"]),
        ({"instruction": "Q", "chosen": "A", "rejected": "B", "output": "C"}, ["output"]),
        (
            {"instruction": "Q", "instances": [{"output": "A", "constraints": "short"}], "output": "B"},
            ["instances[].constraints", "output"],
        ),
        (
            {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], "label": True}
            | {"completion": "B"},
            ["completion"],
        ),
    ],
)
def test_what_gives_way_to_another_key_is_counted(row, counted):
    ignored = Counter()
    read(row, ignored=ignored)
    assert sorted(ignored) == counted


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"conversations": [{"from": "human", "value": "x"}]}, "sharegpt"),
        ({"conversation": [{"role": "user", "content": "x"}]}, "openai"),
        ({"conversation": "turns in one text"}, "none"),
        ({"messages": []}, "openai"),
        ({"instruction": "x", "output": "y"}, "alpaca"),
        ({"instruction": "x", "dataset": "y"}, "none"),
        ({"prompt": {"text": "x", "replies": []}}, "oasst"),
        ({"prompt": "x", "completion": "y"}, "none"),
    ],
)
def test_shapes_are_recognised(row, name):
    assert detect_converter(row) == name


@pytest.mark.parametrize(
    ("row", "name", "words"),
    [
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "auto", "unknown speaker 'narrator'; known: human"),
        ({"conversations": [{"from": "human"}]}, "auto", "conversations[0] must have from and value"),
        ({"conversations": [{"from": "human", "value": None}]}, "auto", "role user has no content"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, "auto", "unknown speaker ['human']"),
        ({"conversations": [ASK, {**TOLD, "content": "B"}]}, "auto", "conversations[1] says content beside from and"),
        (
            {"system": "Be kind.", "conversations": [{"from": "system", "value": "Be rude."}, ASK, TOLD]},
            "auto",
            "system is not what its system turn says",
        ),
        (
            {"messages": [{"role": "user", "content": "else"}], "conversations": [ASK, TOLD]},
            "auto",
            "conversations and messages, which differ",
        ),
        ({"instruction": "x", "output": "y", "response": "z"}, "auto", "output and response, which differ"),
        ({"prompt": {"text": "x", "role": "prompter", "replies": 5}}, "auto", "replies must be a list of messages"),
        ({"prompt": {"text": "x", "role": "prompter", "replies": [5]}}, "auto", "replies must be a list of messages"),
        (
            {"prompt": node("prompter", "Q", node("assistant", "A", rank="1"), node("assistant", "B", rank=0))},
            "auto",
            "the rank of a reply is '1'; it must be a number",
        ),
        ({"text": "x"}, "sharegpt", "needs conversations"),
        ({"instruction": "x", "output": None}, "auto", "needs output (or response) as text"),
        ({"instruction": "x", "input": 5, "output": "y"}, "auto", "input must be text, not 5"),
        ({"instruction": "x", "instances": []}, "auto", "instances must be a list"),
        ({"instruction": "x", "output": "y", "history": ["Hi"]}, "auto", "history must be a list of"),
        ({"prompt": {"text": "x", "role": "prompter", "replies": []}}, "auto", "no assistant reply"),
    ],
)
def test_errors(row, name, words):
    with pytest.raises(DataError) as caught:
        read(row, name)
    assert words in str(caught.value)
