"""Shapes of answers that a server is asked for: the words of each, and answers that do not keep to them."""

import json
import re

import pytest
from toy_server import Fake

from jaxpost.assemble import ask_server
from jaxpost.generate.external_shape import fault, in_words_of
from jaxpost.generate.grammar import Constraint

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "ages": {"type": "array", "items": {"type": "integer"}}},
    "required": ["name"],
    "additionalProperties": False,
}
JSON = {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}}
CHOICE = ["a (b)", 'say "no"\n']
REGEX = r"\d+ cats?"


@pytest.fixture
def fake():
    server = Fake()
    yield server
    server.close()


def asked(fake, owner, shape, *, text, prompt="Hi", chat=True, **more):
    """The body of the request besides what any request has, and the row of the answer."""
    fake.models = {"data": [{"id": "tiny"} | ({"owned_by": owner} if owner else {})]}
    choice = {"message": {"content": text}, "text": text, "finish_reason": "stop", **more}
    fake.answer = lambda body, tried: (200, {"choices": [choice]})
    fake.bodies.clear()
    [row] = ask_server(fake.url, [prompt], shape=shape, chat=chat)
    usual = {"model", "seed", "max_tokens", "temperature", "top_p", "messages", "prompt"}
    return {name: value for name, value in fake.bodies[0].items() if name not in usual}, row


def test_each_server_is_asked_in_its_own_words(fake):
    good = '{"name": "Ann", "ages": [3, 4]}'
    for owner in (None, "vllm", "sglang", "llamacpp"):
        assert asked(fake, owner, {"json": SCHEMA}, text=good)[0] == JSON
    for owner, words in (
        ("vllm", JSON),
        ("sglang", {"json_schema": json.dumps(SCHEMA)}),
        ("llamacpp", {"json_schema": SCHEMA}),
    ):
        body, row = asked(fake, owner, {"json": SCHEMA}, text=good, chat=False)
        assert (body, row["text"], "error" in row) == (words, good, False)
    for owner, words in (
        (None, {"structured_outputs": {"choice": CHOICE}}),
        ("sglang", {"regex": '(a \\(b\\)|say "no"\n)'}),
        ("llamacpp", {"grammar": r'root ::= "a (b)" | "say \x22no\x22\x0a"'}),
    ):
        assert asked(fake, owner, {"choice": CHOICE}, text=CHOICE[0])[0] == words
    pattern = in_words_of("sglang", Constraint(choice=CHOICE), chat=True)["regex"]
    assert all(re.fullmatch(pattern, text) for text in CHOICE)
    assert asked(fake, "vllm", {"regex": REGEX}, text="3 cats")[0] == {"structured_outputs": {"regex": REGEX}}
    with pytest.raises(ValueError, match=r"llama\.cpp's server knows choices and JSON schemas"):
        asked(fake, "llamacpp", {"regex": REGEX}, text="3 cats")
    assert not fake.bodies


def test_an_answer_of_another_shape_is_a_failure_and_one_cut_off_is_not(fake):
    _, row = asked(fake, "other", {"regex": REGEX}, text="many cats")
    assert row["finish"] == "error"
    assert "the server's answer does not keep to the regex" in row["error"]
    assert "'many cats'" in row["error"]
    _, row = asked(fake, "other", {"regex": REGEX}, text="3 ca", finish_reason="length")
    assert (row["finish"], row["text"]) == ("length", "3 ca")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"ages": [1.0], "name": "x"}', None),
        ("```json", "it is not JSON"),
        ("[" * 100_000, "it is not JSON"),
        ("[]", "the answer is not of type object"),
        ('{"ages": []}', "lacks 'name'"),
        ('{"name": "x", "age": 1}', "has 'age'"),
        ('{"name": "x", "ages": [1, 2.5]}', r"ages\[1\] is not of type integer"),
        ('{"name": true}', "name is not of type string"),
    ],
)
def test_json_is_held_against_its_schema(text, told):
    found = fault(Constraint(json=SCHEMA), text)
    assert found is None if told is None else re.search(told, found)


def test_values_of_a_schema_are_compared_too():
    schema = Constraint(json={"properties": {"a": {"enum": [1, "b"]}, "c": {"const": None}, "d": False}})
    assert fault(schema, '{"a": "b", "c": null}') is None
    for text in ('{"a": 2}', '{"c": 0}', '{"d": 1}'):
        assert "JSON schema" in fault(schema, text)


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        ({"regex": "("}, "the regex '\\('.*unterminated"),
        ({"regex": r"\p{L}+"}, "the regex.*bad escape"),
        ({"json": {"enum": 5}}, '"enum" is 5'),
        ({"json": {"type": 5}}, '"type" is 5'),
        ({"json": {"required": "name"}}, '"required" is "name"'),
        ({"json": {"properties": []}}, r'"properties" is \[\]'),
        ({"json": {"items": {"type": [1]}}}, r'"type" is \[1\]'),
        ({"json": {"properties": {"a": 5}}}, "5 is no schema"),
    ],
    ids=str,
)
def test_a_shape_that_answers_cannot_be_held_against_is_refused_before_any_request(fake, shape, told):
    with pytest.raises(ValueError, match=told):
        asked(fake, "vllm", shape, text="Hi")
    assert not fake.bodies


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"enum": [1]}, "true"),
        ({"const": False}, "0"),
        ({"const": [{"a": 1}]}, '[{"a": true}]'),
        ({"enum": [1, 2], "const": 2}, "1"),
        ({"type": "number"}, "NaN"),
        ({}, '{"a": Infinity}'),
    ],
)
def test_values_are_those_of_json_not_of_python(schema, text):
    assert fault(Constraint(json=schema), text) is not None


def test_an_empty_text_is_asked_for_as_a_regex():
    assert in_words_of("vllm", Constraint(regex=""), chat=True) == {"structured_outputs": {"regex": ""}}
    assert fault(Constraint(json={"const": [1, {"a": None}]}), '[1.0, {"a": null}]') is None
