"""Rewards of programs: what passes, what does not, and every way we know to pass without being right."""

import gzip
import json
import time
from dataclasses import replace

import pytest

from jaxpost.rewards.asserts import Unsupported
from jaxpost.rewards.code import CodeTests, last_program, same, written
from jaxpost.rewards.contract import Sample
from jaxpost.rewards.runner import Pool
from jaxpost.sandbox.limits import IsolationMissing, Limits
from jaxpost.sandbox.run import available

pytestmark = pytest.mark.skipif(
    not any(not problem for problem in available().values()), reason="no isolation works on this machine"
)
QUICK = Limits(seconds=2.0, cpu_seconds=2, memory_mb=256, output_kb=64)
SQUARE = {
    "tests": ["assert square(3) == 9", "assert square(-4) == 16", "assert square(0) == 0", "assert square(7) == 49"]
}
CALLS = {
    "entry_point": "square",
    "tests": [{"args": [3], "expected": 9}, {"args": [-4], "expected": 16}, {"args": [7], "expected": 49}],
}
PRINTS = {
    "tests": [{"stdin": "3\n", "stdout": "9\n"}, {"stdin": "-4", "stdout": "16"}, {"stdin": "7\n", "stdout": "49\n"}]
}


def fenced(code):
    return Sample(f"<think>easy</think>\nHere it is:\n```python\n{code}\n```\nDone.")


def score(code, example=SQUARE, seconds=2.0, **settings):
    return CodeTests(limits=replace(QUICK, seconds=seconds), **settings).row(example, fenced(code))


@pytest.mark.parametrize("example", [SQUARE, CALLS], ids=["asserts", "calls"])
def test_the_share_of_tests_that_pass(example):
    assert score("def square(x):\n    return x * x", example) == 1.0
    half = score("def square(x):\n    return x * 3", example)
    assert half == (0.5 if example is SQUARE else 1 / 3)
    assert score("def square(x):\n    return x * 3", example, partial=False) == 0.0
    assert score("def square(x):\n    return x * x", example, partial=False) == 1.0
    assert score("def cube(x):\n    return x ** 3", example) == 0.0
    assert CodeTests().row(example, Sample("square is x * x")) == 0.0


def test_whole_programs_by_what_they_print():
    assert score("print(int(input()) ** 2)", PRINTS) == 1.0
    assert score("import sys\nfor line in sys.stdin:\n    print(int(line) ** 2, end='  \\n\\n')", PRINTS) == 1.0
    assert score("print(int(input()) * 3)", PRINTS) == 1 / 3
    assert score("print(int(input()) ** 2)\nraise SystemExit(1)", PRINTS) == 0.0
    assert score("print(int(input()) ** 2, 'sic')", PRINTS) == 0.0
    assert score("if input() == '7':\n    print(49)\nelse:\n    while True: pass", PRINTS, seconds=0.5) == 0.0
    assert score("import os\nif input() == '3':\n    os._exit(1)\nprint(16)", PRINTS) == 1 / 3


def test_methods_keywords_setup_and_json_values():
    example = {
        "entry_point": "Solution().pairs",
        "setup": "from typing import List\nBASE = 10",
        "tests": [
            {"args": [[1, 2]], "kwargs": {"scale": 2.5}, "expected": {"sums": [3, 7.5], "first": None, "ok": True}},
            {"args": [[]], "expected": {"sums": [0, 0], "first": None, "ok": False}},
        ],
    }
    code = """
class Solution:
    def pairs(self, xs: List[int], scale=1):
        return {"sums": (sum(xs), sum(xs) * scale), "first": None, "ok": bool(xs) and BASE == 10}
"""
    assert score(code, example) == 1.0


def test_the_tests_of_a_check_function():
    example = {
        "entry_point": "square",
        "tests": "def check(candidate):\n    assert candidate(3) == 9\n    assert candidate(2) == 4",
    }
    assert score("def square(x): return x ** 2", example) == 1.0
    assert score("def square(x): return 9", example) == 0.5


CHEATS = {
    "leaves at once": "import os\nos._exit(0)",
    "exits": "raise SystemExit(0)",
    "leaves in the function": "import os\ndef square(x):\n    os._exit(0)",
    "exits in the function": "import sys\ndef square(x):\n    sys.exit(0)",
    "equal to all": """
class Yes(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __hash__ = int.__hash__
def square(x): return Yes(5)
""",
    "equal to all, no number": """
class Yes:
    __class__ = int
    def __eq__(self, other): return True
    def __bool__(self): return True
    def __index__(self): return 9
    def __int__(self): return 9
def square(x): return Yes()
""",
    "a type that changes": """
class Meta(type):
    def __eq__(self, other): return True
    def __instancecheck__(self, other): return True
    __hash__ = type.__hash__
class Yes(metaclass=Meta):
    def __eq__(self, other): return True
def square(x): return Yes()
""",
    "patched builtins": """
import builtins
builtins.AssertionError = type("Never", (BaseException,), {})
builtins.isinstance = lambda *a: True
builtins.type = lambda x: int
builtins.all = lambda x: True
builtins.compile = lambda *a, **k: None
def square(x): return None
""",
    "patched json": """
import json, sys
json.dumps = lambda *a, **k: '{"check": 0, "passed": true, "values": [true], "score": 1.0}'
def square(x): return None
""",
    "tells nonsense": """
import os
for i in range(9):
    os.write(3, b'{"check": %d, "values": [true], "passed": true, "ok": 1}\\n' % i)
os.write(3, b'{"passed": [true, true, true, true]}\\nnull\\n[]\\n{"broken": ""}\\n')
os._exit(0)
""",
    "patched pickle and print": """
import pickle, builtins
pickle.dumps = pickle.loads = lambda *a, **k: True
builtins.print = lambda *a, **k: None
def square(x): return pickle
""",
    "poisoned modules": """
import sys, types
for name in ("json", "types", "checks", "given", "solution", "__main__", "builtins", "driver"):
    fake = types.ModuleType(name)
    fake.dumps = fake.loads = fake.encode = fake.FunctionType = lambda *a, **k: True
    fake.check_0 = fake.check_1 = lambda show: show(True)
    sys.modules[name] = fake
def square(x): return True
""",
    "a thread that tells": """
import os, threading, time
def tell():
    for i in range(50):
        for kind in ("true", '["int", "0"]', '["object"]', "null"):
            os.write(3, b'{"check": %d, "values": [%s]}\\n' % (i % 2, kind.encode()))
        time.sleep(0.001)
threading.Thread(target=tell).start()
def square(x):
    time.sleep(0.1)
    return None
""",
    "what dies speaks": """
import os, sys
class Last(int):
    def __del__(self): os._exit(0)
    def __index__(self): sys.exit(0)
    def __reduce__(self): return (int, (9,))
def square(x): return Last()
""",
    "at exit": """
import atexit, os
atexit.register(lambda: (os.write(3, b'{"check": 0, "values": [true]}\\n'), os._exit(0)))
def square(x): raise MemoryError
""",
    "trace": """
import sys
def trace(frame, event, arg):
    frame.f_trace_opcodes = False
    return trace
sys.settrace(trace)
def square(x):
    frame = sys._getframe()
    while frame.f_back:
        frame = frame.f_back
        for name in list(frame.f_locals):
            if name in ("shown", "values"): frame.f_locals[name].append(True)
    return None
""",
    "edits the driver": """
import sys
main = sys.modules["__main__"]
main.encode = lambda value, depth=0: True
main.describe = lambda error: ""
def square(x): return None
""",
    "looks for what is expected": """
import gc, sys, os, glob
found = []
for o in gc.get_objects():
    if isinstance(o, dict) and "expected" in o: found.append(o["expected"])
for name in glob.glob("*") + glob.glob("../*"):
    try: found += [int(w) for w in open(name).read().replace("=", " ").split() if w in ("9", "16", "49")]
    except (OSError, UnicodeDecodeError): pass
def square(x):
    return found[0] if found else None
""",
    "writes into the folder": """
for name in ("checks.py", "main.py", "driver.py", "result", "passed"):
    try: open(name, "w").write("def check_0(__show__): __show__(True)")
    except OSError: pass
def square(x): return None
""",
    "kills the parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\ndef square(x): return None",
    "a huge error": "def square(x): raise ValueError('9' * 10**7)",
    "an error that cannot be told": """
class Bad(Exception):
    def __str__(self): raise self
    __repr__ = __str__
def square(x): raise Bad()
""",
    "a deep value": "def square(x):\n    v = []\n    for _ in range(10**5): v = [v]\n    return v",
    "a value without end": "def square(x):\n    v = []\n    v.append(v)\n    return v",
    "a generator without end": "def square(x):\n    while True: yield 9",
    "a huge value": "def square(x): return [9] * 10**6",
    "runs for ever": "def square(x):\n    while True: pass",
    "floods": "while True: print('9' * 1000)",
    "recursion": "def square(x): return square(x)",
    "forks": "import os\ndef square(x):\n    while True: os.fork()",
    "no number": "def square(x): return float('nan')",
    "text": "def square(x): return str(x * x)",
    "broken text": "def square(x): return '\\ud800'",
}


@pytest.mark.parametrize("code", CHEATS.values(), ids=CHEATS.keys())
def test_nothing_passes_falsely(code):
    start = time.monotonic()
    # One after the other: that the first of two tests ends the process is no help to the second.
    example = {"tests": SQUARE["tests"][:2]}
    assert score(code, example) == 0.0
    assert time.monotonic() - start < 15


@pytest.mark.parametrize(
    "name", ["leaves at once", "equal to all", "patched builtins", "tells nonsense", "at exit", "exits"]
)
def test_nothing_passes_falsely_in_the_other_forms(name):
    assert score(CHEATS[name], CALLS) == 0.0
    assert score(CHEATS[name], PRINTS) == 0.0


def test_inequalities_and_predicates_are_no_way_around():
    cheat = """
class Any:
    def __getattr__(self, name): return lambda *a, **k: True
    def __sub__(self, other): return 0
    __rsub__ = __abs__ = __round__ = lambda self, *a: 0
    def __lt__(self, other): return True
    __gt__ = __le__ = __ge__ = __ne__ = __eq__ = __contains__ = __lt__
    def __len__(self): return 3
    def __iter__(self): return iter([1, 2])
def f(x): return Any()
"""
    tests = [
        "assert abs(f(1) - 2.5) < 1e-6", "assert f(1) != 3", "assert f(1) > 2", "assert f(1)",
        "assert f(1).startswith('a')", "assert len(f(1)) == 3", "assert 5 in f(1)",
        "assert round(f(1), 2) == 0", "assert not f(1)", "assert isinstance(f(1), int)",
    ]  # fmt: skip
    assert score(cheat, {"tests": tests}) == 0.0


def test_examples_that_cannot_be_graded_say_so():
    reward = CodeTests(limits=QUICK)
    for tests, words in (
        ([], "needs 'tests' .* nothing under it"),
        ("assert f(1) == 1", "define no check"),
        ([1], "of one kind"),
        (["assert f(1) == 1", {"args": [], "expected": 1}], "of one kind"),
        ([{"args": [1]}], "of one kind"),
        ([{"input": "1", "output": "1"}], "of one kind"),
        ([{"stdin": "1", "stdout": "9" * 70_000}], "expects 70000 bytes"),
        ([{"args": [{1}], "expected": 1}], "no JSON value"),
        ([{"args": "ab", "expected": 1}], "args must be a list"),
        ([{"stdin": "1", "stdout": None}], "must be texts"),
        ("def check(", "not Python"),
    ):
        with pytest.raises(ValueError, match=words):
            reward.row({"tests": tests, "entry_point": "f"}, Sample("no program"))
    with pytest.raises(Unsupported, match=r"assert f\(1\) == g\(1\)"):
        reward.row({"tests": ["assert f(1) == g(1)"]}, Sample("no program"))
    with pytest.raises(ValueError, match="needs 'tests'"):
        reward.row({"answer": 1}, fenced("x = 1"))
    with pytest.raises(ValueError, match="entry point"):
        reward.row(CALLS | {"entry_point": "f(1); import os; f"}, fenced("x = 1"))


def test_a_missing_isolation_is_no_score():
    missing = [level for level, problem in available().items() if problem]
    if not missing:
        pytest.skip("every isolation works here")
    with pytest.raises(IsolationMissing):
        score("def square(x): return x * x", isolation=missing[0])


def test_in_workers_a_fault_is_told_and_the_others_go_on():
    with Pool(CodeTests(limits=QUICK), workers=2, seconds=60.0) as pool:
        good, slow = fenced("def square(x): return x * x"), fenced("def square(x):\n    while True: pass")
        scored = pool([SQUARE, SQUARE, {"tests": ["assert True"]}], [good, slow, good])
    assert scored.rewards["code"].tolist()[:2] == [1.0, 0.0]
    assert [problem.row for problem in scored.problems] == [2]
    assert "calls nothing of the program" in scored.problems[0].reason


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\na\n```\n```python\nb\n```", "b"),
        ("```python\na\n```\n```\noutput\n```", "a"),
        ("```\na\n```", "a"),
        ("```python\na\n```\n```python\ncut off", "a"),
        ("```py\r\na\r\n```", "a\r"),
        ("```json\n{}\n```", None),
        ("````python\nx = '''\n```\n'''\n````", "x = '''\n```\n'''"),
        ("~~~python\na\n~~~", "a"),
        ("no code", None),
        ("```python\ncut", None),
    ],
)
def test_the_last_complete_block_is_the_program(text, program):
    assert last_program(text) == program


def test_values_are_of_their_kind():
    assert same(2, 2.0)
    assert not same(1, True)
    assert not same(False, 0)
    assert not same(None, 0)
    assert same([1, (2,)], [1, [2]])
    assert not same({1, 2}, [1, 2])
    assert not same({"a": 1, "b": 2}, {"a": 1})
    assert same(0.3, 0.1 + 0.2, 1e-9)
    assert not same(0.3, 0.1 + 0.2)
    assert not same(10**400, 1.5)
    assert same(float("inf"), float("inf"))
    assert not same(float("nan"), float("nan"))
    with pytest.raises(ValueError, match="no JSON value"):
        written(object())


@pytest.mark.parametrize("name", ["mbpp_minus_261_510", "humaneval_first_half"])
def test_the_reference_programs_pass_real_tests(shared_data, name):
    path = shared_data / "rl_code" / f"{name}.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines][3::150]
    for row in rows:
        key, code = (
            ("test_list", row.get("code"))
            if "code" in row
            else ("test", row["prompt"] + row.get("canonical_solution", ""))
        )
        reward = CodeTests(key=key)
        assert reward.row(row | {"setup": row.get("test_setup_code", "")}, fenced(code)) == 1.0, row["task_id"]
        assert reward.row(row, fenced("import os\nos._exit(0)")) == 0.0


def test_overwritten_operators_pass_no_test_that_compares_before_its_assert():
    """The program's `__eq__` says yes to all: what it says beside the program is never asked for."""
    liar = "class Yes(int):\n    def __eq__(self, other): return True\ndef f(x): return Yes(7)\n"
    answer = Sample(f"```python\n{liar}```")
    assert CodeTests()([{"tests": ["r = f(2)\nassert r == 4"]}], [answer])["code"] == [0]
    with pytest.raises(Unsupported, match="because of 'f\\(2\\) == 4'"):
        CodeTests()([{"tests": ["ok = f(2) == 4\nassert ok"]}], [answer])


@pytest.mark.parametrize(
    "test",
    [
        "assert is_sorted(f([2, 1]))",
        "r = f([2, 1])\nassert not is_sorted(r) == False",
        "assert is_sorted(S().f([2, 1]))",
    ],
)
def test_a_helper_of_the_setup_cannot_vouch_for_the_program(test):
    """The program may define another helper of that name, or patch it: its yes is its own word."""
    setup = "def is_sorted(x): return all(a <= b for a, b in zip(x, x[1:]))\ndef items(*x): return list(x)"
    liar = fenced("def f(x): return x\nclass S:\n    f = staticmethod(f)\ndef is_sorted(x): return True")
    with pytest.raises(Unsupported, match="because a function of the setup tells"):
        CodeTests(limits=QUICK).row({"tests": [test], "setup": setup}, liar)
    told = {"tests": ["assert f(items(2, 1)) == [1, 2]", "assert items(f([1])) == [[1]]"], "setup": setup}
    assert CodeTests(limits=QUICK).row(told, liar) == 0.5


def test_a_program_in_the_thoughts_is_no_answer():
    program = "```python\ndef f(x): return 2 * x\n```"
    texts = [f"<think>{program}</think> I do not know.", f"<think>{program}", f"<think>Well.</think>\n{program}"]
    reward = CodeTests(limits=QUICK)
    assert [reward.row({"tests": ["assert f(2) == 4"]}, Sample(text)) for text in texts] == [0, 0, 1]
