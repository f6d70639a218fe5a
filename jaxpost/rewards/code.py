"""Rewards of programs by their tests, run in the sandbox and judged outside of it."""

from __future__ import annotations

import ast
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxpost.rewards.answers import after_thinking
from jaxpost.rewards.asserts import Test, Unsupported, parse, parse_function
from jaxpost.rewards.contract import Completion, Example, RowReward, field
from jaxpost.rewards.tainted import vouched
from jaxpost.sandbox.limits import Isolation, Limits
from jaxpost.sandbox.run import START_SECONDS, run_python
from jaxpost.sandbox.values import LEAST_SECONDS, Failure, evaluate

MAX_CODE = 2**16
"""Characters of a program."""
LIMITS = Limits(seconds=3.0, cpu_seconds=3)

_FENCE = re.compile(r"\s{0,3}(`{3,}|~{3,})\s*([\w+-]*)")
_ENTRY = re.compile(r"[A-Za-z_]\w*(\(\))?(\.[A-Za-z_]\w*(\(\))?)*")


def last_program(text: str) -> str | None:
    """The last complete fenced block that is marked as Python; the last one without a mark if there is none.

    >>> last_program("First:\\n```python\\nx = 1\\n```\\nor\\n```py\\nx = 2\\n```\\nOutput:\\n```\\n2\\n```")
    'x = 2'
    """
    marked = bare = None
    fence, language, start = "", "", 0
    lines = text.split("\n")
    for number, line in enumerate(lines):
        match = _FENCE.match(line)
        if match is None:
            continue
        if not fence:
            fence, language, start = match[1], match[2].lower(), number + 1
        elif match[1].startswith(fence) and not line.strip().strip(fence[0]):
            block = "\n".join(lines[start:number])
            if language in ("python", "py", "python3"):
                marked = block
            elif not language:
                bare = block
            fence = ""
    return bare if marked is None else marked


@dataclass(frozen=True)
class CodeTests(RowReward):
    """The share of its tests that the last Python block of an answer passes.

    example[key] holds the tests, in one of these forms:

    - "assert f(2) == 4" ...: a list of texts. See `asserts.parse` for what can be judged.
    - {"args": [2], "expected": 4} ..., also "kwargs": calls of example["entry_point"], which may be a method
      ("Solution().double"); values as in JSON, so a tuple equals a list, and true is not 1.
    - {"stdin": "2\\n", "stdout": "4\\n"} ...: whole programs; space at the ends of lines and of the text is no matter.
    - a text that defines check(candidate) (2107.03374), with example["entry_point"].

    example["setup"], if there, is a module's text that the program and its tests can use. What a test expects is never
    in the sandbox: values come out as plain data and are compared here, so leaving early, exit codes, patched asserts
    or overwritten operators pass no test. An answer without a program scores 0. A function of the setup cannot judge:
    `assert is_sorted(f(2))` is refused, for the program could replace it.

    Raises (a row, when it is scored):
      ValueError: tests that are missing, empty or of another form.
      Unsupported: a test that cannot be judged outside of the sandbox, with the test.
      IsolationMissing: the isolation does not work on this machine.
    """

    key: str = "tests"
    partial: bool = True
    """False: 1 if all tests pass, else 0."""
    isolation: Isolation = "auto"
    limits: Limits = LIMITS
    """All tests of one program share the seconds. In a `runner.Pool`, leave a row two seconds more than these."""
    tolerance: float = 0.0
    """Relative, between numbers with a point that calls return."""
    name: str = "code"

    def prepare(self) -> None:
        """Sees that the isolation works."""
        run_python("", limits=replace(self.limits, seconds=START_SECONDS), isolation=self.isolation)

    def row(self, example: Example, completion: Completion) -> float:
        tests = field(example, self.key, self.name)
        code = last_program(after_thinking(completion.text))  # a draft in the thoughts is no program
        if code is not None and len(code) > MAX_CODE:
            code = None
        passed = self._passed(example, tests, code)
        return sum(passed) / len(passed) if self.partial else float(all(passed))

    def _passed(self, example: Example, tests: Any, code: str | None) -> list[bool]:
        """Which tests hold; their form is checked even where there is no program."""
        if isinstance(tests, str):
            return self._asserts(example, parse_function(tests, self._entry(example)), code)
        if not isinstance(tests, Sequence) or not tests:
            raise ValueError(
                f"reward {self.name!r}: example[{self.key!r}] is no list of tests, but {str(tests)[:80]!r}"
            )
        if all(isinstance(test, str) for test in tests):
            return self._asserts(example, tuple(parse(test) for test in tests), code)
        if all(isinstance(test, Mapping) for test in tests):
            keys = {frozenset(test) for test in tests}
            if keys == {frozenset({"stdin", "stdout"})}:
                return self._programs(tests, code)
            if all({"args", "expected"} <= found <= {"args", "kwargs", "expected"} for found in keys):
                return self._calls(example, tests, code)
        raise ValueError(
            f"reward {self.name!r}: example[{self.key!r}] must hold assert statements, or objects with stdin and "
            f"stdout, or objects with args, kwargs and expected, of one kind; it begins with {str(tests[0])[:80]!r}"
        )

    def _entry(self, example: Example) -> str:
        entry = field(example, "entry_point", self.name)
        if not isinstance(entry, str) or not _ENTRY.fullmatch(entry):
            raise ValueError(f"reward {self.name!r}: the entry point {entry!r} does not name a function or method")
        return entry

    def _asserts(self, example: Example, tests: Sequence[Test], code: str | None) -> list[bool]:
        if not tests:
            raise ValueError(f"reward {self.name!r}: example[{self.key!r}] holds no test")
        for test in tests:
            if told := vouched(test.text, str(example.get("setup") or "")):
                raise Unsupported(
                    f"the test {test.text[:200]!r} cannot be judged outside of the sandbox because a function of the "
                    f"setup tells {ast.unparse(told)[:80]!r}; write it as assert f(arguments) == literal"
                )
        found = self._evaluate(example, [test.statements for test in tests], code)
        return [shown is not None and test.holds(shown) for test, shown in zip(tests, found, strict=True)]

    def _calls(self, example: Example, tests: Sequence[Mapping[str, Any]], code: str | None) -> list[bool]:
        entry = self._entry(example)
        checks = []
        for test in tests:
            if not isinstance(test["args"], list | tuple) or not isinstance(test.get("kwargs", {}), Mapping):
                raise ValueError(
                    f"reward {self.name!r}: args must be a list and kwargs an object, not {str(test)[:80]!r}"
                )
            arguments = [written(value) for value in test["args"]]
            arguments += [f"**{{{key!r}: {written(value)}}}" for key, value in test.get("kwargs", {}).items()]
            checks.append(f"__show__({entry}({', '.join(arguments)}))")
        found = self._evaluate(example, checks, code)
        return [
            shown is not None and len(shown) == 1 and same(shown[0], test["expected"], self.tolerance)
            for test, shown in zip(tests, found, strict=True)
        ]

    def _evaluate(self, example: Example, checks: Sequence[str], code: str | None) -> list[tuple[Any, ...] | None]:
        """The values of each check, or None."""
        if code is None:
            return [None] * len(checks)
        given = str(example.get("setup") or "")
        found = evaluate(
            code, checks, given=given, limits=self.limits, isolation=self.isolation, stop_early=not self.partial
        )
        return [None if isinstance(one, Failure) else one.shown for one in found]

    def _programs(self, tests: Sequence[Mapping[str, Any]], code: str | None) -> list[bool]:
        """Runs the program once for each input."""
        texts = [text for test in tests for text in (test["stdin"], test["stdout"])]
        if not all(isinstance(text, str | int | float) for text in texts):
            raise ValueError(f"reward {self.name!r}: stdin and stdout must be texts, not {str(tests[0])[:80]!r}")
        wanted = [str(test["stdout"]) for test in tests]
        longest = max(len(text.encode("utf-8", "surrogatepass")) for text in wanted)
        if longest >= self.limits.output_kb << 10:
            raise ValueError(
                f"reward {self.name!r}: a test expects {longest} bytes of output; the limit output_kb = "
                f"{self.limits.output_kb} cuts it off"
            )
        passed: list[bool] = []
        deadline = time.monotonic() + self.limits.seconds
        for test, text in zip(tests, wanted, strict=True):
            left = deadline - time.monotonic()
            if code is None or left < LEAST_SECONDS or (passed and not passed[-1] and not self.partial):
                passed.append(False)
                continue
            limits = replace(self.limits, seconds=left)
            ran = run_python(code, stdin=str(test["stdin"]), limits=limits, isolation=self.isolation)
            passed.append(ran.reason == "ok" and _lines(ran.stdout) == _lines(text))
        return passed


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def written(value: Any) -> str:
    """Python text of a JSON value.

    >>> written({"a": [1, None, float("inf")]})
    "{'a': [1, None, float('inf')]}"

    Raises:
      ValueError: it is none.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(written, value))}]"
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return f"{{{', '.join(f'{key!r}: {written(item)}' for key, item in value.items())}}}"
    raise ValueError(f"{str(value)[:80]!r} in a test is no JSON value")


def same(found: Any, wanted: Any, tolerance: float = 0.0) -> bool:
    """Whether plain data is a JSON value: truth values, numbers, texts and nothing are of different kinds.

    >>> same((1, 2.0), [1, 2]), same(True, 1), same("1", 1)
    (True, False, False)
    """
    if isinstance(wanted, bool) or isinstance(found, bool) or wanted is None:
        return type(found) is type(wanted) and found == wanted
    if isinstance(wanted, int | float):
        if not isinstance(found, int | float):
            return False
        if isinstance(found, float) or isinstance(wanted, float):
            try:
                return found == wanted or math.isclose(found, wanted, rel_tol=tolerance)
            except OverflowError:
                return False
        return found == wanted
    if isinstance(wanted, str):
        return isinstance(found, str) and found == wanted
    if isinstance(wanted, list | tuple):
        if not isinstance(found, list | tuple) or len(found) != len(wanted):
            return False
        return all(same(a, b, tolerance) for a, b in zip(found, wanted, strict=True))
    if isinstance(wanted, Mapping):
        if not isinstance(found, dict) or found.keys() != wanted.keys():
            return False
        return all(same(found[key], item, tolerance) for key, item in wanted.items())
    return False
