"""A `prompts` section -> problems by index, without end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from jaxpost.config_rl import (
    ArithmeticPrompts,
    CountdownPrompts,
    FilePrompts,
    Game24Prompts,
    GymPrompts,
    PromptsSection,
)
from jaxpost.data.sources import Row, open_source
from jaxpost.rewards.answers import THINK
from jaxpost.rewards.gym import GymProblems
from jaxpost.rewards.puzzles import Arithmetic, Countdown, Game24
from jaxpost.rl.episodes import Problem
from jaxpost.text.messages import DataError, parse_conversation, to_template
from jaxpost.text.tokenizer import Tokenizer

PROBED = 1000
"""Problems of an endless source that are looked at for the length of the longest."""
SPARE = 8
"""Tokens that a longer one may have beyond it."""


class Placed(NamedTuple):
    """A problem and where it stands: file and line, or its number."""

    where: str
    problem: Problem


@dataclass(frozen=True)
class Problems:
    """Where problems come from."""

    at: Callable[[int], Problem]
    """Problem by index, without end: files are read in another order in each epoch."""
    longest: int
    """Most tokens of a prompt."""
    fingerprint: str
    """Changes whenever any problem would."""
    count: int | None = None
    """Different problems; None: endless."""
    dropped: int = 0
    """Rows that were too long."""
    rows: tuple[Placed, ...] = ()
    """A file's problems in its order, or the first of an endless source."""

    @property
    def longest_row(self) -> Placed:
        """The longest prompt of those that were looked at."""
        return max(self.rows, key=lambda row: len(row.problem.tokens))


def make_problems(section: PromptsSection, tokenizer: Tokenizer, *, key: str = "prompts", tools: str = "") -> Problems:
    """Problems of a source, asked as the section says.

    Args:
      tools: what every system turn ends with.

    Raises:
      ValueError: there are none, or a row cannot be used; names it by file and line.
      FileNotFoundError: a source that is not there.
    """
    if "{prompt}" not in section.template:
        raise ValueError(f"{key}.template {section.template!r} has no {{prompt}} where the problem would stand")
    if isinstance(section, FilePrompts):
        return _from_files(section, tokenizer, key, tools)
    try:
        source = puzzles_of(section)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None

    def at(index: int) -> Problem:
        example = source.example(index)
        return _problem(index, example, example["prompt"], section, tokenizer, tools)

    rows = tuple(Placed(f"{section.kind} problem {index}", at(index)) for index in range(PROBED))
    longest = max(len(row.problem.tokens) for row in rows) + SPARE
    more = filter(None, [tools, getattr(source, "version", "")])
    digest = _digest([repr(source), section.template, section.system_prompt, section.chat, *more])
    return Problems(at, longest, digest, rows=rows)


def puzzles_of(section: PromptsSection) -> Any:
    """The endless source that a section names."""
    if isinstance(section, ArithmeticPrompts):
        return Arithmetic(
            seed=section.seed, low=section.low, high=section.high, operations=section.operations, split=section.split,
            held_out=section.held_out, negative=section.negative,
        )  # fmt: skip
    if isinstance(section, Game24Prompts):
        return Game24(seed=section.seed, high=section.high)
    if isinstance(section, CountdownPrompts):
        return Countdown(
            seed=section.seed, count=section.count, largest=section.largest, low=section.low, high=section.high
        )
    if isinstance(section, GymPrompts):
        return GymProblems(task=section.task, seed=section.seed)
    raise TypeError(f"{type(section).__name__} is no source of puzzles")


def _from_files(section: FilePrompts, tokenizer: Tokenizer, key: str, tools: str) -> Problems:
    if not section.sources:
        raise ValueError(f"{key}.sources names no file; say --{key}.sources.0.path problems.jsonl")
    readers = [open_source(source) for source in section.sources]
    found: list[Placed] = []
    for number, reader in enumerate(readers):
        before = len(found)
        found += [Placed(row.where, _read(row, section, tokenizer, tools)) for row in reader.rows()]
        if len(found) == before:
            part = section.sources[number]
            of = f" from row {part.skip} on" if part.skip else ""
            raise ValueError(
                f"{key}.sources.{number}: {reader.name} has no rows{of}; give another file, or take it out"
            )
    kept = tuple(row for row in found if section.max_tokens is None or len(row.problem.tokens) <= section.max_tokens)
    if not kept:
        least = min(len(row.problem.tokens) for row in found)
        raise ValueError(
            f"{key}: none of {len(found)} prompts has at most {key}.max_tokens {section.max_tokens} tokens; the "
            f"shortest has {least}"
        )
    problems = [row.problem for row in kept]

    def at(index: int) -> Problem:
        epoch, place = divmod(index, len(problems))
        order = np.random.default_rng((section.seed, epoch)).permutation(len(problems))
        return replace(problems[int(order[place])], number=index)

    digest = _digest([[reader.digest() for reader in readers], section.seed, section.template, section.system_prompt,
                      section.chat, section.max_tokens, tokenizer.fingerprint, *filter(None, [tools])])  # fmt: skip
    longest = max(len(p.tokens) for p in problems)
    return Problems(at, longest, digest, len(problems), len(found) - len(problems), kept)


def _read(row: Row, section: FilePrompts, tokenizer: Tokenizer, tools: str) -> Problem:
    if row.value is None:
        raise ValueError(f"{row.where}: {row.error}")
    if "prompt" not in row.value:
        raise ValueError(
            f"{row.where}: there is no prompt among {', '.join(row.value)}; map one with columns: {{prompt: question}}"
        )
    prompt = row.value["prompt"]
    if prompt is None or prompt == [] or (isinstance(prompt, str) and not prompt.strip()):
        raise ValueError(f"{row.where}: prompt is empty; fill it in, or take the row out")
    if not isinstance(prompt, str | list):
        kind = f"of type {type(prompt).__name__} ({str(prompt)[:40]})"
        raise ValueError(f"{row.where}: prompt is {kind}; give a text or a list of messages")
    try:
        return _problem(0, row.value, prompt, section, tokenizer, tools)
    except DataError as error:
        raise ValueError(f"{row.where}: {error}") from None
    except TypeError as error:  # of the tokenizer, for half of a surrogate pair
        raise ValueError(f"{row.where}: the prompt is no text that can be encoded: {error}") from error


def _problem(
    number: int, example: Mapping[str, Any], prompt: Any, section: PromptsSection, tokenizer: Tokenizer, tools: str
) -> Problem:
    """A problem as tokens: in the model's chat format, or as it stands."""
    if isinstance(prompt, str):
        prompt = section.template.replace("{prompt}", prompt)
        turns, text = [{"role": "user", "content": prompt}], prompt
    elif section.template != "{prompt}":
        raise DataError("a template is for prompts of text, and this one is of messages: leave the template out")
    else:
        turns = to_template(parse_conversation(prompt))
        text = "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
    if not section.chat:
        if not isinstance(prompt, str):
            raise DataError("a prompt of messages needs the chat format: set chat: true")
        return Problem(
            number, tuple(tokenizer.encode(prompt, add_bos=tokenizer.adds_bos)), text, example, _opened(prompt)
        )
    system = section.system_prompt
    if tools and turns[0]["role"] == "system":
        turns = [{"role": "system", "content": f"{turns[0]['content']}\n\n{tools}"}, *turns[1:]]
    elif tools:
        system = f"{system}\n\n{tools}" if system else tools
    rendered = tokenizer.render(turns, add_generation_prompt=True, system=system)
    return Problem(number, tuple(tokenizer.encode(rendered)), text, example, _opened(rendered))


def _opened(prompt: str) -> str:
    """The tag with which a prompt's end begins a thought, as some chat templates do."""
    return THINK[0] if prompt.rstrip().endswith(THINK[0]) else ""


def _digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:32]
