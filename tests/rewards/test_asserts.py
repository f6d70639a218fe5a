"""Assert statements split into calls for the sandbox and comparisons for the judge."""

import pytest

from jaxpost.rewards.asserts import Unsupported, parse, parse_function


@pytest.mark.parametrize(
    ("text", "calls", "right", "wrong"),
    [
        ("assert f(2, [3]) == 4", ["f(2, [3])"], [4], ["4"]),
        ("assert 4 == f(2)", ["f(2)"], [4.0], [5]),
        ("assert (f(2)) == {'a': (1, -2)}, 'message'", ["f(2)"], [{"a": (1, -2)}], [{"a": [1, -2]}]),
        ("assert f(1)", ["f(1)"], [True], [0]),
        ("assert not f(1)", ["f(1)"], [[]], [[0]]),
        ("assert f(1) is None", ["f(1)"], [None], [False]),
        ("assert f(1) is True", ["f(1)"], [True], [1]),
        ("assert f(1) != 3", ["f(1)"], [4], [3]),
        ("assert 1 < f(1) <= 3", ["f(1)"], [3], [3.1]),
        ("assert f(1) in (3, 4)", ["f(1)"], [4], [5]),
        ("assert abs(f(1) - 1.5) < 0.1", ["f(1)"], [1.45], [1.2]),
        ("assert math.isclose(f(1), 2.5, rel_tol=0.01)", ["f(1)"], [2.501], [2.6]),
        ("assert round(f(1), 2) == 0.33", ["f(1)"], [0.3333], [0.34]),
        ("assert len(f(1)) == 2", ["f(1)"], [[0, 0]], [[0]]),
        ("assert sorted(f(1)) == [1, 2]", ["sorted(f(1))"], [[1, 2]], [[2, 1]]),
        ("assert set(f(1)) == {1, 2}", ["set(f(1))"], [{2, 1}], [{1}]),
        ("assert list(f(1)) == ['x'] * 3", ["list(f(1))"], [["x"] * 3], [["x"] * 2]),
        ("assert f(1) == float('inf')", ["f(1)"], [float("inf")], [1e308]),
        ("assert f(1) == 2 ** 10 - 1", ["f(1)"], [1023], [1024]),
        ("assert f(1)[0].x == 3", ["f(1)[0].x"], [3], [4]),
        ("assert f(g(2)) == 3", ["f(g(2))"], [3], [4]),
        ("assert f(1).startswith('ab')", ["f(1)"], ["abc"], ["xab"]),
        ("assert isinstance(f(1), list) and f(1) == []", ["f(1)", "f(1)"], [[], []], [(), ()]),
        ("assert type(f(1)) == int", ["f(1)"], [1], [True]),
        ("assert all([f(1) == 1, f(2) == 2])", ["f(1)", "f(2)"], [1, 2], [1, 1]),
        ("assert Stack([1]).push(2).top() == 2", ["Stack([1]).push(2).top()"], [2], [1]),
        ("assert limit == 3", ["limit"], [3], [4]),
        ("assert sum(10, 15) == 6", ["sum(10, 15)"], [6], [25]),
        ("assert f(1) == 1\nassert f(2) == 2", ["f(1)", "f(2)"], [1, 2], [1, 3]),
        ("assert f([1, 2])[1:] == [2]", ["f([1, 2])[1:]"], [[2]], [[1]]),
    ],
)
def test_a_test_is_split(text, calls, right, wrong):
    test = parse(text)
    assert test.statements == "\n".join(f"__show__({call})" for call in calls)
    assert test.holds(right) is True
    assert test.holds(wrong) is False


def test_statements_between_asserts_go_to_the_sandbox():
    test = parse(
        "import math\ns = Stack()\ns.push(math.floor(1.5))\nassert s.pop() == 1\ns.push(2)\nassert s.size() == 1"
    )
    assert test.statements.split("\n") == [
        "import math", "s = Stack()", "s.push(math.floor(1.5))", "__show__(s.pop())", "s.push(2)", "__show__(s.size())",
    ]  # fmt: skip
    assert test.holds([1, 1])
    assert not test.holds([1, 2])


@pytest.mark.parametrize(
    "text",
    [
        "r = f(1)\nassert r == 2",
        "x = [i * 2 for i in range(3) if i != 1]\nassert f(x) == 2",
        "out = [f(i) for i in range(3)]\nassert out == [1, 2, 3]",
        "seen = []\nseen.append(f(1))\nassert seen == [2]",
        "import copy\nc = copy.deepcopy(f(1))\nassert c == 2",
        "n = len(f(1))\nassert n == 2",
        "a = Account()\na.balance += 5\nassert a.balance == 5",
        "assert keep(lambda x: x > 1, [1, 2]) == [2]",
        "assert same_tree(Node(1), Node(1)) == True",
        "g = Graph()\ng.add(Node(1))\nassert g.holds(Node(1), 1)",
        "assert is_prime(next_prime(10))",
        "assert f(g(1), 2) == 3",
        "assert f(1) + f(2) == 3",
    ],
)
def test_values_may_be_kept_and_handed_on(text):
    assert parse(text).claims


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("assert f(1) == g(1)", "cannot be judged"),
        ("assert f(1) == expected", "cannot be judged"),
        ("assert 0 == f(1) == f(1)", "cannot be judged"),
        ("for i in range(3):\n    assert f(i) == i", "cannot be judged"),
        ("assert all(f(i) == i for i in range(3))", "cannot be judged"),
        ("assert (lambda: True)()", "cannot be judged"),
        ("assert [x for x in f(3)] == [1]", "cannot be judged"),
        ("try:\n    f(1)\nexcept ValueError:\n    pass", "cannot be judged"),
        ("with open('x'): assert f(1) == 1", "cannot be judged"),
        ("assert f(1) is 5", "cannot be judged"),
        ("assert math.pow(f(1), 2) == 4", "cannot be judged"),
        ("assert f(1) if g(1) else True", "cannot be judged"),
        ("assert f'{f(1)}' == '1'", "cannot be judged"),
        ("ok = f(1) == 2\nassert ok", "cannot be judged"),
        ("r = f(1)\nok = r == 2\nassert ok", "cannot be judged"),
        ("d = abs(f(1) - 2)\nassert d < 1e-6", "cannot be judged"),
        ("x = {True: 1, False: 0}[f(1) == 2]\nassert x == 1", "cannot be judged"),
        ("n = [2].count(f(1))\nassert n == 1", "cannot be judged"),
        ("x = [2]\nn = x.count(f(1))\nassert n == 1", "cannot be judged"),
        ("x = [3, 1]\nsort(x)\nok = x == [1, 3]\nassert ok", "cannot be judged"),
        ("import operator\nok = operator.eq(f(1), 2)\nassert ok", "cannot be judged"),
        ("same = lambda a: a == 2\nok = same(f(1))\nassert ok", "cannot be judged"),
        ("wrong = [x for x in f(3) if x != 1]\nassert wrong == []", "cannot be judged"),
        ("if_not = f(1) or 2\nassert if_not == 2", "cannot be judged"),
        ("r = f(1)\nr -= 2\nassert r == 0", "cannot be judged"),
        ("from solution import f\nok = f(1) == 2\nassert ok", "cannot be judged"),
        ("import numpy as np\nassert np.allclose(f(1), [2])", "cannot be judged"),
        ("r = f(1)\nassert not differ(r, 2)", "cannot be judged"),
        ("assert check(f(1), 2) == True", "cannot be judged"),
        ("assert f(1).__eq__(2)", "cannot be judged"),
        ("assert abs(f(1) - g(1)) < 1e-6", "cannot be judged"),
        ("assert f(1) % g(1) == 0", "cannot be judged"),
        ("assert math.isclose(f(1), g(1))", "cannot be judged"),
        ("assert len({f(1), g(1)}) == 1", "cannot be judged"),
        ("assert len(set([f(1), g(1)])) == 1", "cannot be judged"),
        ("assert f(1).startswith(g(1))", "cannot be judged"),
        ("assert True", "calls nothing"),
        ("assert 1 + 1 == 2", "calls nothing"),
        ("f(1)", "has no assert"),
        ("", "has no assert"),
        ("assert f(1) ==", "is not Python"),
    ],
)
@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_what_cannot_be_judged_outside_is_refused_with_the_test(text, words):
    with pytest.raises(Unsupported, match=words) as caught:
        parse(text)
    assert repr(text[:20])[1:-1] in str(caught.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("assert f(1) * 10 ** 6 == 1", ["x" * 100]),
        ("assert [0] * f(1) == [0]", [10**12]),
        ("assert f(1) ** 1000 == 1", [2**5000]),
        ("assert 10 ** f(1) == 1", [10**9]),
        ("assert list(range(2)) == f(1)", [{}]),
        ("assert round(2, f(1)) == 2", [-(10**9)]),
        ("assert f(1) % 3 == 1", ["%1000000000d"]),
        ("assert f(1) / 2 == 1", [10**5000]),
        ("assert f(1) < 3", ["a"]),
        ("assert str(f(1)) == '1'", [10**5000]),
        ("assert len(f(1)) == 3", [3]),
        ("assert f(1).startswith('a')", [5]),
        ("assert f(1) in 'abc'", [5]),
        ("assert f(1) == 1 and f(2) == 2", [1]),
    ],
)
def test_values_that_fit_nothing_fail_at_once(text, shown):
    assert parse(text).holds(shown) is False


def test_a_check_function_gives_a_test_for_each_assert():
    text = """
METADATA = {'author': 'x'}

def check(candidate):
    "Tests."
    import math
    assert candidate(2) == 4, "This prints"
    assert abs(candidate(0.5) - math.sqrt(0.0625)) < 1e-6
    assert True, "nothing"
    pass
"""
    first, second = parse_function(text, "Solution().double")
    assert first.statements == "import math\n__show__(Solution().double(2))"
    assert first.holds([4])
    assert second.holds([0.25])
    assert not second.holds([0.26])
    with pytest.raises(Unsupported, match=r"define no check\(candidate\)"):
        parse_function("def other(candidate): pass", "f")
    with pytest.raises(Unsupported, match="cannot be judged"):
        parse_function("def check(c):\n    assert c(1) == 1\n    for i in range(2):\n        assert c(i) == i", "f")
