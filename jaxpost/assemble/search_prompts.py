"""The `prompts` and `answers` sections of a search -> what is asked, how it is written, and what of a text is its
answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpost.assemble.prompts import puzzles_of
from jaxpost.config_rl import FilePrompts
from jaxpost.config_search import (
    AnswersSection,
    ChoiceAnswers,
    ExpressionAnswers,
    FewShotThoughts,
    MathAnswers,
    PlainPrompts,
    SearchConfig,
    SearchPromptsSection,
    ZeroShotThoughts,
)
from jaxpost.data.sources import open_source
from jaxpost.generate.params import said
from jaxpost.rewards.canonical import choice_answer, expression_answer, math_answer, text_answer
from jaxpost.search.chain_of_thought import few_shot, step_format, zero_shot
from jaxpost.text import strict_json
from jaxpost.text.messages import DataError, parse_conversation, to_template
from jaxpost.text.tokenizer import Tokenizer

DECIDED = ("n", "max_tokens", "min_tokens", "stop", "seed")
"""Sampling parameters that are not a row's to set: budgets and trees depend on them."""

Read = Callable[[Any], list[int]]
"""Token ids of a prompt, a text or messages."""


class Question(NamedTuple):
    """One prompt of a search."""

    number: int
    """Its identity in the noise: its place in the whole source."""
    where: str
    prompt: Any = None
    """A text or messages, as the policy is asked."""
    example: Mapping[str, Any] = {}
    """The row that it stands in, with what says whether an answer is right."""
    sampling: Mapping[str, Any] = {}
    error: str | None = None
    """Why it cannot be asked."""


def make_questions(config: SearchConfig) -> list[Question]:
    """What a search is asked. A row that cannot be read is a question with an error, and the others go on.

    Raises:
      ValueError: no prompts. FileNotFoundError: no such file.
    """
    section = config.prompts
    if isinstance(section, PlainPrompts):
        found = _plain(Path(section.path).expanduser())
    elif isinstance(section, FilePrompts):
        found = _rows(section)
    else:
        source = puzzles_of(section)
        examples = [source.example(index) for index in range(config.count or 0)]
        found = [Question(n, f"{section.kind} problem {n}", e["prompt"], e) for n, e in enumerate(examples)]
    if not found:
        raise ValueError(f"prompts: {getattr(section, 'path', '') or section.kind} holds no prompt")
    if config.count is not None and config.count < len(found):
        chosen = np.random.default_rng(section.seed).permutation(len(found))[: config.count]
        found = [found[int(n)] for n in sorted(chosen)]
    return [_thoughtful(_worded(question, section), config) for question in found]


def _thoughtful(question: Question, config: SearchConfig) -> Question:
    """Its prompt in the chain-of-thought template."""
    section, prompt = config.thoughts, question.prompt
    if section is None or question.error is not None:
        return question
    try:
        if isinstance(section, FewShotThoughts):
            turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) and config.prompts.chat else prompt
            examples = [(example.question, example.answer) for example in section.examples]
            worded = few_shot(turns, examples=examples, question=section.question, answer=section.answer)
        elif isinstance(section, ZeroShotThoughts):
            worded = zero_shot(prompt, instruction=section.instruction)
        else:
            worded = (
                step_format(prompt)
                if section.instruction is None
                else step_format(prompt, instruction=section.instruction)
            )
    except ValueError as error:
        return question._replace(error=f"{question.where}: {error}")
    return question._replace(prompt=worded)


def _worded(question: Question, section: SearchPromptsSection) -> Question:
    """Its prompt as the template says it."""
    if question.error is not None:
        return question
    prompt = question.prompt
    if isinstance(prompt, str):
        return question._replace(prompt=section.template.replace("{prompt}", prompt))
    try:
        turns = to_template(parse_conversation(prompt))
    except DataError as error:
        return question._replace(error=f"{question.where}: {error}")
    if section.template != "{prompt}":
        return question._replace(
            error=f"{question.where}: a template is for prompts of text, and this one is of messages: set "
            "prompts.template to {prompt}, which adds nothing"
        )
    if not section.chat:
        return question._replace(
            error=f"{question.where}: a prompt of messages needs the chat format: set prompts.chat true"
        )
    return question._replace(prompt=turns)


def _plain(path: Path) -> list[Question]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: --prompts names a file of prompts")
    try:
        whole = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 (byte {error.start}); convert it") from None
    lines = whole.split("\n")  # not splitlines: a text may hold other separators of lines
    kept = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if path.suffix != ".jsonl":
        return [Question(n, f"{path}:{number}", line) for n, (number, line) in enumerate(kept)]
    return [_json_row(n, f"{path}:{number}", line) for n, (number, line) in enumerate(kept)]


def _json_row(number: int, where: str, line: str) -> Question:
    try:
        row = strict_json.loads(line)
    except (ValueError, RecursionError) as error:
        why = error.msg if isinstance(error, json.JSONDecodeError) else error
        return Question(number, where, error=f"{where}: not JSON ({why})")
    prompt = row.get("messages", row.get("prompt")) if isinstance(row, dict) else None
    if not prompt or not isinstance(prompt, str | list):
        fault = f'{where}: a row needs "prompt" (a text or messages) or "messages"'
        return Question(number, where, error=fault)
    sampling = row.get("sampling", {})
    try:
        if not isinstance(sampling, dict):
            raise ValueError(f"it is {sampling!r}; write names and values in braces")
        own = said(sampling)
        if taken := [name for name in own if name in DECIDED]:
            raise ValueError(f"{' and '.join(taken)}: the search decides that; leave it out")
    except ValueError as error:
        return Question(number, where, error=f'{where}: "sampling": {error}')
    return Question(number, where, prompt, row, own)


def _rows(section: FilePrompts) -> list[Question]:
    found: list[Question] = []
    for row in (row for source in section.sources for row in open_source(source).rows()):
        number = len(found)
        if row.value is None:
            found.append(Question(number, row.where, error=f"{row.where}: {row.error}"))
        elif not row.value.get("prompt"):
            keys = ", ".join(row.value)
            fault = f"{row.where}: there is no prompt among {keys}; map one with columns: {{prompt: question}}"
            found.append(Question(number, row.where, error=fault))
        else:
            found.append(Question(number, row.where, row.value["prompt"], row.value))
    return found


def make_read(section: SearchPromptsSection, tokenizer: Tokenizer) -> Read:
    """How prompts are written for the model: in its chat format, or as they stand; what a search asks besides, too."""

    def read(prompt: Any) -> list[int]:
        if isinstance(prompt, str) and not section.chat:
            return tokenizer.encode(prompt, add_bos=tokenizer.adds_bos)
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]
        try:
            text = tokenizer.render(turns, add_generation_prompt=True, system=section.system_prompt)
        except DataError:
            if not isinstance(prompt, str) or section.system_prompt:
                raise
            text = None  # a model without a chat format continues the text
        tokens = tokenizer.encode(prompt, add_bos=tokenizer.adds_bos) if text is None else tokenizer.encode(text)
        most = section.max_tokens if isinstance(section, FilePrompts) else None
        if most is not None and len(tokens) > most:
            raise DataError(f"the prompt has {len(tokens)} tokens, more than prompts.max_tokens {most}")
        return tokens

    return read


def make_canonical(section: AnswersSection) -> Callable[[str], str | None]:
    """The answer that a text gives, as votes compare it."""
    if isinstance(section, MathAnswers):
        return partial(math_answer, sources=section.sources)
    if isinstance(section, ChoiceAnswers):
        return partial(choice_answer, letters=section.letters)
    return expression_answer if isinstance(section, ExpressionAnswers) else text_answer
