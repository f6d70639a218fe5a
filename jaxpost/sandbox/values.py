"""Values that untrusted code computes, as plain data for a judge outside: `evaluate`."""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from jaxpost.sandbox.driver import MAX_DEPTH
from jaxpost.sandbox.limits import Isolation, Limits
from jaxpost.sandbox.run import launch

LEAST_SECONDS = 0.1
"""With less time left, no further process is started."""


class Values(NamedTuple):
    """What a check showed, in order: plain data of Python's own types."""

    shown: tuple[Any, ...]


class Failure(NamedTuple):
    """Why a check showed nothing."""

    reason: str


class BadValue(ValueError):
    """Not the encoding of plain data."""


def evaluate(
    code: str,
    checks: Sequence[str],
    *,
    given: str = "",
    limits: Limits | None = None,
    isolation: Isolation = "auto",
    stop_early: bool = False,
) -> list[Values | Failure]:
    """Does checks on a program in the sandbox and brings the values that they show.

    Only data comes back (None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict, decoded here
    to exactly these types), so nothing that the program overwrites (`__eq__`, builtins, modules, exit codes) can make a
    comparison out here succeed. Values are what the program says: they prove that it knows them, no more.

    >>> evaluate("def double(x): return 2 * x", ["__show__(double(4))", "__show__(double(None))"])
    [Values(shown=(8,)), Failure(reason="it raised TypeError: unsupported operand type(s) for *: 'int' and 'NoneType'")]

    Args:
      code: a module's text; where `__name__` is compared with "__main__" it is not the main module.
      checks: statements, which see the module's names; `__show__(value)` shows a value. They are trusted.
      given: a module's text whose names the code and the checks can use; it may itself use names of the code.
      limits: the seconds are those of all checks together. After a check that ends the process the rest goes on in a
        new one.
      stop_early: the first check that fails is the last; the others have failed too.

    Raises:
      IsolationMissing: as `run_python`.
    """
    limits = limits or Limits()
    found: list[Values | Failure] = []
    deadline = time.monotonic() + limits.seconds
    while len(found) < len(checks):
        left = deadline - time.monotonic()
        if left < LEAST_SECONDS or (stop_early and any(isinstance(one, Failure) for one in found)):
            break
        files = {
            "main.py": _driver(),
            "solution.py": code,
            "given.py": given,
            "checks.py": _functions(checks, len(found)),
        }
        done = launch(files, "main.py", stdin="", limits=replace(limits, seconds=left), isolation=isolation)
        told, broken = _read(done.told, len(found))
        if broken is not None:
            return [Failure(f"the code cannot be loaded: {broken}")] * len(checks)
        found += told[: len(checks) - len(found)]
        if len(found) < len(checks):
            how = f"with exit code {done.ran.exit}" if done.ran.reason in ("ok", "error") else f"by {done.ran.reason}"
            found.append(Failure(f"the process ended {how}"))
    return found + [Failure("it was not tried: an earlier check failed or took all the time")] * (
        len(checks) - len(found)
    )


@lru_cache(maxsize=1)
def _driver() -> str:
    return Path(__file__).with_name("driver.py").read_text(encoding="utf-8")


def _functions(checks: Sequence[str], first: int) -> str:
    """A module with a function for each check from `first` on."""
    bodies = [f"def check_{number}(__show__):\n{textwrap.indent(check, ' ')}\n" for number, check in enumerate(checks)]
    return "\n".join(bodies[first:])


def _read(told: bytes, number: int) -> tuple[list[Values | Failure], str | None]:
    """Results in order from check `number` on, and why the code could not be loaded; nonsense ends them."""
    found: list[Values | Failure] = []
    for line in told.split(b"\n")[:-1]:
        try:
            said = json.loads(line)
            if "broken" in said:
                return found, str(said["broken"])
            if said["check"] != number + len(found):
                break
            if "raised" in said:
                found.append(Failure(f"it raised {said['raised']}"))
            else:
                found.append(Values(tuple(decode(value) for value in said["values"])))
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
            found.append(Failure(f"it told no values: {type(error).__name__}"))
    return found, None


_SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


def decode(data: Any, depth: int = 0) -> Any:
    """Plain data from `driver.encode`'s JSON.

    >>> decode(["tuple", [["int", "-1f"], "a", None]])
    (-31, 'a', None)

    Raises:
      BadValue: anything else.
    """
    if depth > MAX_DEPTH:
        raise BadValue(f"more than {MAX_DEPTH} levels")
    if data is None or isinstance(data, bool | str):
        return data
    if not isinstance(data, list) or len(data) < 2 or not isinstance(data[0], str):
        raise BadValue(f"{str(data)[:40]!r} is no value")
    kind, content = data[0], data[1]
    if kind in _SEQUENCES and isinstance(content, list):
        return _SEQUENCES[kind](decode(item, depth + 1) for item in content)
    if kind == "dict" and isinstance(content, list):
        return {decode(key, depth + 1): decode(item, depth + 1) for key, item in content}
    if not all(isinstance(part, str) for part in data):
        raise BadValue(f"{kind[:40]!r} holds no text")
    if kind == "int":
        return int(content, 16)
    if kind == "float":
        return float.fromhex(content)
    if kind == "complex" and len(data) == 3:
        return complex(float.fromhex(content), float.fromhex(data[2]))
    if kind == "bytes":
        return bytes.fromhex(content)
    raise BadValue(f"{kind[:40]!r} is no type of plain data")
