"""What the values of a search's configuration must satisfy together. Imports no jax."""

from __future__ import annotations

import dataclasses
import re
import string
from collections.abc import Iterator
from typing import Any

from jaxpost.config_check import above, at_least, fraction
from jaxpost.config_io import ConfigError
from jaxpost.config_rl import ArithmeticPrompts, FilePrompts
from jaxpost.config_search import FewShotThoughts, PlainPrompts, SearchConfig
from jaxpost.config_verify import (
    FactVerifier,
    JudgeVerifier,
    ModelVerifier,
    RuleVerifier,
    SafetyVerifier,
    VerifierPart,
)


def check_search(config: SearchConfig) -> SearchConfig:
    """The configuration itself, if a search could follow it.

    Raises:
      ConfigError: all that cannot be, a line each, with the key and what to do.
    """
    problems = [
        *_prompts(config), *_sampling(config), *_method("search", config.search), *_verifier(config), *_engine(config),
        *_run(config),
    ]  # fmt: skip
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def _prompts(config: SearchConfig) -> Iterator[str]:
    section = config.prompts
    yield from at_least("count", config.count, 1)
    yield from at_least("prompts.seed", section.seed, 0)
    if isinstance(section, PlainPrompts) and not section.path:
        yield "prompts names no file; say --prompts FILE"
    if isinstance(section, FilePrompts):
        if not section.sources:
            yield "prompts.sources names no file; say --prompts FILE, or --prompts.sources.0.path problems.jsonl"
        yield from at_least("prompts.max_tokens", section.max_tokens, 1)
    if not isinstance(section, PlainPrompts | FilePrompts) and config.count is None:
        yield f"prompts.kind {section.kind} has no end; say how many prompts with --count 100"
    if isinstance(section, ArithmeticPrompts):
        yield from fraction("prompts.held_out", section.held_out)
    if "{prompt}" not in section.template:
        yield f"prompts.template is {section.template!r}; it must hold {{prompt}}, where the problem stands"
    if isinstance(config.thoughts, FewShotThoughts) and not config.thoughts.examples:
        yield "thoughts.examples is empty; a few-shot template needs worked examples (question, answer)"
    if section.system_prompt is not None and not section.chat:
        yield "prompts.system_prompt needs the chat format; set prompts.chat true or leave it out"


def _sampling(config: SearchConfig) -> Iterator[str]:
    sampling = config.sampling
    yield from at_least("sampling.temperature", sampling.temperature, 0)
    yield from at_least("sampling.top_k", sampling.top_k, -1)
    yield from above("sampling.top_p", sampling.top_p, 0)
    if sampling.top_p > 1:
        yield f"sampling.top_p is {sampling.top_p:g}; it is a share of probability, at most 1"
    yield from fraction("sampling.min_p", sampling.min_p)
    yield from above("sampling.repetition_penalty", sampling.repetition_penalty, 0)
    yield from at_least("sampling.no_repeat_ngram_size", sampling.no_repeat_ngram_size, 0)
    yield from at_least("budget", config.budget, 1)
    many = max(getattr(config.search, name, 1) for name in ("n", "width", "samples"))
    if many > 1 and sampling.temperature == 0:
        yield f"search.{config.search.kind} draws {many} texts, but at sampling.temperature 0 all are alike; raise it"


_MAY_BE_0 = frozenset({"lookahead", "waits", "rounds", "checks", "seed", "probes", "moves"})
"""Numbers of things of which there may be none; of all others there is at least 1."""
_NOT_BELOW_0 = frozenset({"exploration", "rollout_temperature", "gumbel_scale", "value_scale", "maxvisit_init", "snr"})
_ABOVE_0 = frozenset({"temperature", "dirichlet_alpha", "pb_c_base", "surprising"})
_SHARES = frozenset({"keep", "given", "alpha", "dirichlet_fraction"})


def _method(key: str, section: Any) -> Iterator[str]:
    """A method's own numbers, and those of the methods within it."""
    for field in dataclasses.fields(section):
        name, value = f"{key}.{field.name}", getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _method(name, value)
        elif field.name == "separator":
            yield from _separator(name, value)
        elif isinstance(value, bool) or not isinstance(value, int | float):
            continue
        elif "float" not in str(field.type):  # `keep` is a number of states in one method, a share in another
            yield from at_least(name, value, 0 if field.name in _MAY_BE_0 else 1)
        elif field.name in _NOT_BELOW_0:
            yield from at_least(name, value, 0)
        elif field.name in _ABOVE_0:
            yield from above(name, value, 0)
        elif field.name in _SHARES and not 0 <= value <= 1:
            yield f"{name} is {value:g}; it is a share, from 0 to 1"


def _separator(name: str, text: str) -> Iterator[str]:
    if not text:
        yield f"{name} is empty; give the text that ends a step"
    elif re.fullmatch(r"(\\[nrt]|\s)+", text) and "\\" in text:
        yield f"{name} is {text}, a backslash and a letter where a line break is meant; in a shell write $'{text}'"


def _verifier(config: SearchConfig) -> Iterator[str]:
    section = config.verifier
    names = [part.name for part in section.parts]
    if len(set(names)) < len(names):
        yield f"verifier.parts are named {', '.join(names)}; each needs a name of its own"
    if section.combine == "gate" and len(section.parts) < 2:
        yield "verifier.combine gate needs a part that is the gate and one behind it"
    for i, part in enumerate(section.parts):
        key = f"verifier.parts.{i}"
        yield from above(f"{key}.weight", part.weight, 0)
        if part.weight != 1 and section.combine != "mean":
            yield f"{key}.weight is {part.weight:g}; weights belong to verifier.combine mean"
        yield from _part(key, part)


def _part(key: str, part: VerifierPart) -> Iterator[str]:
    if isinstance(part, FactVerifier | SafetyVerifier | ModelVerifier) and not part.path:
        what = {"fact": "corpus", "safety": "list of words", "model": "reward model"}[part.kind]
        yield f"{key} names no {what}; give it a path"
    if isinstance(part, RuleVerifier) and not part.reward.parts:
        yield f"{key}.reward.parts is empty; add one, such as {{kind: math}}"
    if isinstance(part, JudgeVerifier):
        if (part.mode == "rubric") != bool(part.criteria):
            yield f"{key} has mode {part.mode} and {len(part.criteria)} criteria; a rubric needs some, and only it"
        yield from at_least(f"{key}.verdicts", part.verdicts, 1)
        yield from at_least(f"{key}.max_tokens", part.max_tokens, 1)
        if part.low >= part.high:
            yield f"{key}.low {part.low} and {key}.high {part.high}: give low < high"
        if part.verdicts > 1 and part.temperature == 0:
            yield f"{key}.verdicts {part.verdicts} are all alike at {key}.temperature 0; raise it"


def _engine(config: SearchConfig) -> Iterator[str]:
    for name in ("together", "rows", "cache_tokens", "prefill_tokens"):
        yield from at_least(f"engine.{name}", getattr(config.engine, name), 1)


def _run(config: SearchConfig) -> Iterator[str]:
    run = config.run
    if not run.name or "/" in run.name or run.name in (".", ".."):
        yield f"run.name is {run.name!r}; it names a folder, so it must be a word without slashes"
    try:
        fields = {name for _, name, _, _ in string.Formatter().parse(run.dir) if name is not None}
    except ValueError:
        fields = {run.dir}
    if fields - {"name"}:
        yield f"run.dir is {run.dir!r}; {{name}} is the only thing in braces that it may hold"
    if run.seed < 0 or run.seed >= 2**32:
        yield f"run.seed is {run.seed}; it must be at least 0 and below 2**32"
    yield from at_least("run.trees", run.trees, 0)
