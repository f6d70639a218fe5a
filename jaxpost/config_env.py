"""The `env` section of reinforcement learning: an answer is several turns, with tools between them. Imports no jax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxpost.config import SourceSection


@dataclass(frozen=True, kw_only=True)
class CalculatorTool:
    """Exact + - * / over decimal numbers; nothing is run."""

    kind: Literal["calculator"] = "calculator"
    name: str = "calculator"
    """A call is written <name>input</name>."""
    description: str = "works out an expression of + - * / and parentheses"
    """For the system turn."""


@dataclass(frozen=True, kw_only=True)
class PythonTool:
    """A Python program in the sandbox; its answer is what it prints."""

    kind: Literal["python"] = "python"
    name: str = "python"
    description: str = "runs a Python program and shows what it prints"
    seconds: float = 3.0
    """Most time of a program, by the clock; as much of the processor, rounded up."""
    memory_mb: int = 512
    output_kb: int = 256
    isolation: Literal["auto", "process", "filters", "namespaces"] = "auto"
    """auto: the strongest that works on this machine; a run does not start if the one named does not."""


@dataclass(frozen=True, kw_only=True)
class SearchTool:
    """The best passages of a local corpus for the words of a query (BM25)."""

    source: SourceSection
    """Rows with a `text`; another column with columns: {text: body}."""
    kind: Literal["search"] = "search"
    name: str = "search"
    description: str = "finds passages that hold the words of a query"
    count: int = 3
    """Passages of one answer."""
    max_chars: int = 500
    """Of each passage."""


ToolSection = CalculatorTool | PythonTool | SearchTool


@dataclass(frozen=True, kw_only=True)
class EnvSection:
    """Turns that call tools, and a last one that calls none, which the rewards judge.

    `rollout.max_tokens` is then the limit of one turn.
    """

    tools: tuple[ToolSection, ...] = ()
    max_turns: int = 4
    """Turns of the policy; an answer that still calls a tool in the last one is cut off there."""
    max_tokens: int = 512
    """Of a whole answer: all turns and what tools said between them."""
    max_result: int = 2000
    """Characters of a tool's answer; its middle is left out."""
    system: str | None = None
    """What the system turn says of the tools, {tools} being a line for each; it follows prompts.system_prompt. None:
    how they are called, in the library's words. "": nothing."""
    role: str = "user"
    """Whose turn tells a result; "tool" where the chat template has such turns."""
    stop_at_call: bool = True
    """A complete call ends the turn, so that the policy cannot write the result itself."""
    workers: int = 8
    """Answers whose tools run at the same time."""
