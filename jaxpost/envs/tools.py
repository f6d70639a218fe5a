"""Tools: a calculator, Python in the sandbox, and search over a local corpus. Each answers any text with a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from jaxpost.envs.search import Bm25
from jaxpost.sandbox.limits import Isolation, Limits
from jaxpost.sandbox.run import run_python
from jaxpost.text.arithmetic import BadExpression, evaluate

LIMITS = Limits(seconds=3.0, cpu_seconds=3)


@runtime_checkable
class Described(Protocol):
    """What a system turn says of a tool."""

    @property
    def name(self) -> str: ...
    @property
    def description(self) -> str: ...


@runtime_checkable
class Tool(Described, Protocol):
    """Called by <name>input</name> in a turn of the policy; what fails is an answer too."""

    def __call__(self, text: str) -> str: ...


def failed(result: str) -> bool:
    """Whether a tool's answer ends by telling an error.

    >>> failed("1\\nerror: ZeroDivisionError: division by zero"), failed("no error: 1")
    (True, False)
    """
    return result.rstrip().rpartition("\n")[2].startswith("error: ")


@dataclass(frozen=True)
class Calculator:
    """Exact + - * / over decimal numbers; nothing is run.

    >>> Calculator()("2 * (3 + 4)"), Calculator()("1 / 3"), Calculator()("2 ** 3")
    ('14', '1/3 = 0.333333333333', "error: a number is missing before '*'")
    """

    name: str = "calculator"
    description: str = "works out an expression of + - * / and parentheses"

    def __call__(self, text: str) -> str:
        try:
            value = evaluate(text).value
        except BadExpression as error:
            return f"error: {error}"
        try:
            return str(value) if value.denominator == 1 else f"{value} = {float(value):.12g}"
        except (OverflowError, ValueError):  # no float, or more digits than Python writes
            return "error: the result is too large"


@dataclass(frozen=True)
class Python:
    """A Python program in the sandbox; its answer is what it prints, and the last line of its error.

    Raises:
      IsolationMissing: when it is called, if the isolation does not work on this machine.
    """

    name: str = "python"
    description: str = "runs a Python program and shows what it prints"
    limits: Limits = LIMITS
    isolation: Isolation = "auto"

    def __call__(self, text: str) -> str:
        ran = run_python(_program(text), limits=self.limits, isolation=self.isolation)
        if ran.reason == "ok":
            return ran.stdout.rstrip() or "(no output)"
        last = ran.stderr.rstrip().rpartition("\n")[2]
        why = last if ran.reason == "error" and last else f"the program was stopped: {ran.reason}"
        shown = f"{ran.stdout}\n" if ran.stdout and not ran.stdout.endswith("\n") else ran.stdout
        return f"{shown}error: {why}"


def _program(text: str) -> str:
    """Without a fence around it."""
    lines = text.strip("\n").split("\n")
    if len(lines) > 1 and lines[0].lstrip().startswith("```") and lines[-1].strip() == "```":
        lines = lines[1:-1]
    return "\n".join(lines)


@dataclass(frozen=True)
class Search:
    """The best passages of a corpus for the words of a query."""

    corpus: Sequence[str]
    count: int = 3
    max_chars: int = 500
    """Of each passage."""
    name: str = "search"
    description: str = "finds passages that hold the words of a query"
    index: Bm25 = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "index", Bm25(self.corpus))

    def __call__(self, text: str) -> str:
        found = self.index.search(text, self.count)
        if not found:
            return "nothing found"
        return "\n".join(f"[{rank}] {self.corpus[at][: self.max_chars]}" for rank, (at, _) in enumerate(found, 1))
