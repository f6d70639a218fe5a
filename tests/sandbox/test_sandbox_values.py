"""Values that come out of the sandbox: plain data, and nothing else, whatever the code does."""

import json
import math

import pytest

from jaxpost.sandbox import driver
from jaxpost.sandbox.limits import Limits
from jaxpost.sandbox.run import available
from jaxpost.sandbox.values import BadValue, Failure, Values, decode, evaluate

pytestmark = pytest.mark.skipif(
    not any(not problem for problem in available().values()), reason="no isolation works on this machine"
)

PLAIN = [
    None, True, False, 0, -7, 10**5000, 1.5, -0.0, 1e308, math.inf, 2 + 3j, "", "grüß\0\ud800\n", b"\x00\xff",
    [], (), set(), frozenset({1, 2}), {}, [1, (2, [3.0, {"a": {4, 5}}])], {(1, 2): {"x": None}, "k": [True]},
]  # fmt: skip


@pytest.mark.parametrize("value", PLAIN, ids=lambda value: type(value).__name__)
def test_plain_data_comes_through_exactly(value):
    found = decode(json.loads(json.dumps(driver.encode(value))))
    assert found == value
    assert type(found) is type(value)
    if isinstance(value, float):
        assert math.copysign(1, found) == math.copysign(1, value)


def test_subclasses_are_what_they_hold():
    class Liar(int):
        def __eq__(self, other):
            return True

        __hash__ = int.__hash__

        def __index__(self):
            return 99

        def __format__(self, spec):
            return "63"

    class Words(dict):
        def items(self):
            return [("a", 1)]

    class Text(str):
        def __str__(self):
            return "other"

    found = [decode(json.loads(json.dumps(driver.encode(value)))) for value in (Liar(5), Words(b=2), Text("own"))]
    assert found == [5, {"b": 2}, "own"]
    assert [type(value) for value in found] == [int, dict, str]


@pytest.mark.parametrize(
    "data",
    [
        1, 1.5, [], ["int"], ["int", 5], ["list", "abc"], ["object", "x"], {"a": 1}, ["dict", [["a"]]],
        ["set", [["list", []]]], ["float", "x"], ["bytes", "zz"], ["complex", "0x1p+0"], [["int", "1"], "2"],
        ["int", "1__2x"],
    ],
)  # fmt: skip
def test_what_is_no_plain_data_is_refused(data):
    with pytest.raises((ValueError, TypeError)):
        decode(data)


def test_deep_data_is_refused():
    nested: list = []
    for _ in range(60):
        nested = [nested]
    with pytest.raises(ValueError, match="more than 40 levels"):
        driver.encode(nested)
    data: list = ["list", []]
    for _ in range(60):
        data = ["list", [data]]
    with pytest.raises(BadValue, match="more than 40 levels"):
        decode(data)


def test_checks_after_one_that_ends_the_process_go_on():
    code = """
import os
def f(x):
    if x == 1: os._exit(0)
    if x == 2: raise SystemExit
    if x == 3: return object()
    if x == 4: raise ValueError("no " * 1000)
    return x * 10
"""
    found = evaluate(code, [f"__show__(f({x}))" for x in range(6)])
    assert found[0] == Values((0,))
    assert found[5] == Values((50,))
    assert [one.reason[:29] for one in found[1:5]] == [
        "the process ended with exit c", "it raised SystemExit: ", "it raised TypeError: a value ",
        "it raised ValueError: no no n",
    ]  # fmt: skip
    stopped = evaluate(code, [f"__show__(f({x}))" for x in range(3)], stop_early=True)
    assert stopped[:1] == [Values((0,))]
    assert all(isinstance(one, Failure) for one in stopped[1:])


def test_what_is_given_can_be_used_and_can_use():
    assert evaluate("def f(): return K + 1", ["__show__(f())", "__show__(K)"], given="K = 4") == [
        Values((5,)), Values((4,)),
    ]  # fmt: skip
    assert evaluate("class A: x = 7", ["__show__(a.x)"], given="a = A()") == [Values((7,))]
    future = "from __future__ import annotations\ndef f(x: Unknown): return x"
    assert evaluate(future, ["__show__(f(1))"], given="import math") == [Values((1,))]


def test_code_that_cannot_be_loaded_fails_every_check():
    for code, words in (
        ("def f(:", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
        ("raise SystemExit(0)", "SystemExit"),
    ):
        found = evaluate(code, ["__show__(1)", "__show__(2)"])
        assert len(found) == 2
        assert all(isinstance(one, Failure) and words in one.reason for one in found)


def test_a_check_without_end_takes_the_rest_of_the_time():
    found = evaluate(
        "def f():\n    while True: pass", ["__show__(1)", "__show__(f())", "__show__(3)"], limits=Limits(seconds=0.6)
    )
    assert found[0] == Values((1,))
    assert found[1] == Failure("the process ended by timeout")
    assert found[2].reason.startswith("it was not tried")
