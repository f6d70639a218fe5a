"""`jaxpost generate`: prompts from arguments or a file, answers to the screen or to a file that resumes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import jax

from jaxpost.assemble.answer_file import (
    Appending,
    Bare,
    Done,
    Prompt,
    digest,
    finished,
    identity,
    parts,
    write_all,
)
from jaxpost.assemble.commands import load_bound
from jaxpost.assemble.matchers import make_matchers, unsatisfiable
from jaxpost.assemble.supervised import chat_prompt, text_sampler
from jaxpost.assemble.wishes import Wishes, read_wishes
from jaxpost.generate.beam import beam_search
from jaxpost.generate.params import SamplingParams
from jaxpost.generate.sampler import Sampler
from jaxpost.generate.samples import Completion
from jaxpost.text.console import as_line
from jaxpost.text.messages import ODD, DataError, as_data_error
from jaxpost.text.tokenizer import Tokenizer
from jaxpost.weights.resolve import cache_folder

Make = Callable[[list[int], Done], tuple[int, Iterable[tuple[Completion, Mapping[str, Any]]]]]
"""make(numbers of the prompts that lack answers, those that are done) -> how many answers come, and the answers, each
with what its row says besides."""


def turns_of(prompt: Bare, system: str | None) -> list[dict[str, Any]]:
    """The messages of a prompt; the system turn before them if they have none of their own."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]
    own = bool(turns) and turns[0].get("role") == "system"
    return [{"role": "system", "content": system}, *turns] if system and not own else turns


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt, *, system: str | None, chat: bool) -> list[int]:
    """Token ids of a prompt: a user turn or a conversation in the chat format, or a bare text to be continued."""
    bare, tools = parts(prompt)
    if tools and isinstance(bare, str):
        if not chat:
            raise DataError("tools need the chat format; leave out --raw or the prompt's tools")
        bare = turns_of(bare, None)
    if not isinstance(bare, str):
        return tokenizer.encode(tokenizer.render(bare, tools, add_generation_prompt=True, system=system))
    if chat:
        return chat_prompt(tokenizer, bare, system)
    return tokenizer.encode(bare, add_bos=tokenizer.adds_bos)


def generate(
    model: str,
    prompts: Sequence[Prompt],
    *,
    sampling: Mapping[str, Any] | None = None,
    seed: int = 0,
    system: str | None = None,
    chat: bool = True,
    rows: int = 32,
    shape: Mapping[str, Any] | None = None,
    own: Sequence[Any] | None = None,
    thinking: Mapping[str, int] | None = None,
    speculate: int = 0,
    out: Path | None = None,
    progress: Any = None,
) -> Iterator[dict[str, Any]]:
    """Answers prompts in order: {"index", "sample", "prompt", "text", "finish", "tokens", ...}.

    Args:
      model: folder (a PEFT adapter folder too), hub id or `smollm2-135m-instruct`.
      sampling: `SamplingParams` under vLLM's, OpenAI's or Hugging Face's names; greedy if nothing is said.
        `num_beams`, with `length_penalty` and `early_stopping`, searches instead of drawing.
      chat: each prompt is a user turn in the model's chat format; otherwise its text is continued.
      rows: most answers that are written together.
      shape: what every answer must match: `grammar.Constraint`'s regex, choice or json.
      own: each prompt's, before `sampling`'s and `shape`; see `wishes.read_wishes`.
      thinking: "min" and "max" tokens between <think> and </think>; "waits": how many early ends "Wait" replaces.
      speculate: tokens that each answer guesses from its own text and verifies in one pass.
      out: a JSONL file; answers that it holds already are kept and not made again.
      progress: a text stream where to say how far it is.

    Raises:
      ValueError: unknown or contradictory sampling parameters, a system turn without chat format, an `out` file with
        answers to other prompts or by other settings. A prompt that cannot be answered as it asks gets an "error".
    """
    check_turns(system, chat=chat)
    rules, asked = _search_rules(sampling or {})
    wishes = read_wishes(asked, own, len(prompts), shape)
    _refuse_for_beams(rules, shape=shape, thinking=thinking, speculate=speculate, own=any(own or ()))

    def make(todo: list[int], done: Done) -> tuple[int, Iterable[tuple[Completion, Mapping[str, Any]]]]:
        keep_programs()
        pretrained, params = load_bound(model)
        encode = partial(encode_prompt, pretrained.tokenizer, system=system, chat=chat)
        faults = {**wishes.faults, **unsatisfiable(pretrained, wishes.own_shapes(), todo)}
        todo, encoded, failed = readable(prompts, wishes, todo, encode, faults)
        wanted = [wishes.sampling[i] for i in todo]
        total = sum(wish.n for wish in wanted)
        if not todo:
            return len(failed), failed
        together = min(rows, len(todo) * rules["beams"] if rules else total)
        sample = text_sampler(pretrained, rows=together, speculate=speculate)
        if rules:
            stream = _searched(sample, params, encoded, wanted[0], todo, rules)
        else:
            each = make_matchers(pretrained, encoded, [wishes.shapes[i] for i in todo], thinking)
            stream = sample.stream(params, encoded, wanted, seed=seed, example_ids=todo, matchers=each, errors="return")
        return len(failed) + total, chain(failed, ((completion, {}) for _, completion in stream))

    by = {"model": identity(model), "seed": seed, "system": system, "chat": chat, "shape": shape}
    yield from answered(prompts, wishes, make, by=by | {"thinking": thinking} | rules, out=out, progress=progress)


def readable(
    prompts: Sequence[Prompt],
    wishes: Wishes,
    numbers: Sequence[int],
    encode: Callable[[Prompt], Any],
    faults: Mapping[int, str],
) -> tuple[list[int], list[Any], list[tuple[Completion, dict[str, Any]]]]:
    """Numbers of the prompts that can be read, what `encode` makes of them, and the others' failed answers.

    Args:
      faults: why prompts cannot be asked, by number.
    """
    good, encoded, failed = [], [], []
    for number in numbers:
        bare, _ = parts(prompts[number])
        try:
            if number in faults:
                raise DataError(faults[number])
            if not (bare.strip() if isinstance(bare, str) else bare):
                raise DataError("it is empty")
            encoded.append(encode(prompts[number]))
            good.append(number)
        except ODD as error:
            problem = f"prompt {number}: {as_data_error(error)}"
        if not good or good[-1] != number:
            for k in range(wishes.sampling[number].n):
                failed.append((Completion((), (), "error", example=number, sample=k, error=problem), {}))
    return good, encoded, failed


def answered(
    prompts: Sequence[Prompt],
    wishes: Wishes,
    make: Make,
    *,
    by: Mapping[str, Any],
    out: Path | None,
    progress: Any,
) -> list[dict[str, Any]]:
    """The rows of all answers in order, after making those that `out` does not hold and writing them there.

    Args:
      by: what decides the answers beside prompts and wishes; a row of `out` keeps a digest of it all ("settings").
    """
    settings, own = [], wishes.own_shapes()
    for number, (prompt, wish) in enumerate(zip(prompts, wishes.sampling, strict=True)):
        _, tools = parts(prompt)
        more: dict[str, Any] = {"tools": tools} if tools else {}
        more |= {"shape": own[number]} if number in own else {}
        more |= {"fault": wishes.faults[number]} if number in wishes.faults else {}
        settings.append(digest({**by, "sampling": replace(wish, n=1), **more}))
    done = {} if out is None else finished(out, prompts, settings)
    todo = [i for i in range(len(prompts)) if any((i, k) not in done for k in range(wishes.sampling[i].n))]
    if todo:
        total, stream = make(todo, done)
        rows = stream if out is None else ((c, {**more, "settings": settings[c.example]}) for c, more in stream)
        _kept(rows, prompts, done, out, _Meter(total, progress))
    if out is not None:
        write_all(out, [done[key] for key in sorted(done)])
    # The file may hold more samples than are asked for now.
    return [done[i, k] for i, k in sorted(done) if k < wishes.sampling[i].n]


def _kept(
    stream: Iterable[tuple[Completion, Mapping[str, Any]]],
    prompts: Sequence[Prompt],
    done: Done,
    out: Path | None,
    meter: _Meter,
) -> None:
    """Adds answers to those that are done, and to the file, as they end."""
    with Appending(out) as file:
        for completion, more in stream:
            row = _row(prompts[completion.example], completion) | dict(more)
            if (key := (completion.example, completion.sample)) not in done:
                done[key] = row
                if file is not None:
                    file.write(as_line(row) + "\n")
                    file.flush()
            meter.count(row["tokens"] or 0)


def _search_rules(sampling: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What makes a beam search, in the names of `generate.beam.Rules` (nothing without one), and the rest."""
    names = {"num_beams": "beams", "length_penalty": "length_penalty", "early_stopping": "early_stopping"}
    rules = {ours: sampling[name] for name, ours in names.items() if sampling.get(name) is not None}
    asked = {name: value for name, value in sampling.items() if name not in names}
    beams = rules.get("beams", 1)
    if not isinstance(beams, int) or isinstance(beams, bool) or beams < 1:
        raise ValueError(f"num_beams is {beams!r}; it must be a whole number of at least 1")
    if beams == 1 and len(rules) > ("beams" in rules):
        raise ValueError(f"{' and '.join(sorted(set(rules) - {'beams'}))} belong to beam search: set num_beams too")
    if (when := rules.get("early_stopping", False)) not in (True, False, "never"):
        raise ValueError(f"early_stopping is {when!r}; write true, false or never")
    if not isinstance(rules.get("length_penalty", 1.0), int | float):
        raise ValueError(f"length_penalty is {rules['length_penalty']!r}; it must be a number")
    return (rules, asked) if beams > 1 else ({}, asked)


def _refuse_for_beams(rules: Mapping[str, Any], **asked: Any) -> None:
    if rules and any(asked.values()):
        raise ValueError(
            "beam search (num_beams) keeps to no grammar or thinking budget, guesses no tokens and has one set of "
            "parameters for all prompts: leave those out"
        )


def _searched(
    sample: Sampler,
    params: Any,
    encoded: Sequence[Sequence[int]],
    wish: SamplingParams,
    numbers: Sequence[int],
    rules: Mapping[str, Any],
) -> Iterator[tuple[int, Completion]]:
    """Beams as completions, some prompts at a time, so that what is done can be kept."""
    for start in range(0, len(encoded), sample.rows):
        fits = []
        for i in range(start, min(start + sample.rows, len(encoded))):
            if (problem := sample.problem(numbers[i], encoded[i], wish)) is None:
                fits.append(i)
            else:
                for k in range(wish.n):
                    yield i, Completion((), (), "error", example=numbers[i], sample=k, error=problem)
        found = beam_search(sample, params, [encoded[i] for i in fits], wish, **rules)
        for i, beams in zip(fits, found, strict=True):
            for k, beam in enumerate(beams):
                yield i, Completion(beam.tokens, beam.logprobs, beam.finish, beam.text, numbers[i], k, score=beam.score)
            for k in range(len(beams), wish.n):
                told = f"the search found {len(beams)} of n={wish.n} texts, all other tokens are banned: ask for less"
                yield i, Completion((), (), "error", example=numbers[i], sample=k, error=told)


def check_turns(system: str | None, *, chat: bool) -> None:
    """Raises: ValueError for a system turn without the chat format."""
    if system and not chat:
        raise ValueError("a system turn needs the chat format; leave out --raw or --system")


def keep_programs() -> None:
    """Keeps compiled programs in the user's cache, so that the same command starts at once the next time."""
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        return  # A program of several CPU devices that is loaded from a cache has lost the order of its collectives.
    option = "jax_compilation_cache_dir"
    if getattr(jax.config, option) is None:
        jax.config.update(option, str(cache_folder() / "programs"))


def _row(prompt: Prompt, c: Completion) -> dict[str, Any]:
    bare, tools = parts(prompt)
    row: dict[str, Any] = {"index": c.example, "sample": c.sample, "prompt": bare}
    row |= ({"tools": list(tools)} if tools else {}) | {"text": c.text}
    row |= {"finish": c.finish, "tokens": len(c.tokens)}
    if c.stop is not None:
        row["stop"] = c.stop
    if c.score is not None:
        row["score"] = round(c.score, 6)
    if c.guessed:
        row |= {"guessed": c.guessed, "right": c.right}
    if c.best:
        row["logprobs"] = [round(x, 6) for x in c.logprobs]
        row["top_logprobs"] = [_possible(best) for best in c.best]
    if c.prompt_logprobs:
        row["prompt_logprobs"] = [round(x, 6) for x in c.prompt_logprobs]
    if c.prompt_best:
        row["prompt_top_logprobs"] = [_possible(best) for best in c.prompt_best]
    return row if c.error is None else row | {"error": c.error}


def _possible(best: Iterable[tuple[int, float]]) -> list[list[int | float]]:
    """Tokens with their log-probabilities, but for those that could not be drawn: JSON has no word for -inf."""
    return [[t, round(x, 6)] for t, x in best if x > -math.inf]


class _Meter:
    """Says how many answers are done, how fast, and how long the rest will take."""

    def __init__(self, total: int, stream: Any):
        self._total, self._stream, self._start = total, stream, time.perf_counter()
        self._done = self._tokens = 0

    def count(self, tokens: int) -> None:
        """One more answer."""
        self._done += 1
        self._tokens += tokens
        if self._stream is None or self._total < 2:
            return
        seconds = time.perf_counter() - self._start
        left = seconds / self._done * (self._total - self._done)
        text = f"{self._done}/{self._total} answers  {self._tokens / seconds:.0f} tok/s  eta {left:.0f} s"
        end = "\r" if self._stream.isatty() and self._done < self._total else "\n"
        print(text.ljust(60), end=end, file=self._stream, flush=True)
