"""A report of what a reinforcement-learning preset asks, and of what its rewards say of the reference answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from jaxpost.assemble.check_rl import check_problems
from jaxpost.assemble.envs import system_of
from jaxpost.assemble.prompts import Placed, Problems, make_problems
from jaxpost.assemble.references import SCORED, Verdict, judge
from jaxpost.assemble.rewards import make_reward_at
from jaxpost.config_rewards import RewardSection
from jaxpost.config_rl import PromptsSection, RLConfig
from jaxpost.data.inspect import heading
from jaxpost.text.tokenizer import Tokenizer

WIDTH = 200
"""Characters of a field that are shown."""
NAMED = 3
"""Rows that a warning names."""


def inspect_rl(config: RLConfig, tokenizer: Tokenizer, *, room: int, rows: int = 3, color: bool = False) -> str:
    """Problems as the model sees them, their lengths and counts, and every reward's word on the reference answers.

    Args:
      room: the model's longest context, in tokens.
      rows: problems of each source that are shown.

    Raises:
      ValueError, FileNotFoundError: sources or rewards that cannot be used (what would only stop a run is a warning).
    """
    tools = system_of(config.env)
    problems = make_problems(config.prompts, tokenizer, tools=tools)
    out = list(_part("prompts", config.prompts, problems, config.reward, "reward", config.answer_tokens,
                     tokenizer, room, rows, color))  # fmt: skip
    evals = {}
    for i, section in enumerate(config.evals):
        key = f"evals.{i}.prompts"
        evals[section.name] = found = make_problems(section.prompts, tokenizer, key=key, tools=tools)
        reward_key = f"evals.{i}.reward" if section.reward else "reward"
        limit = config.answer_tokens if config.env else section.max_tokens or config.answer_tokens
        out += _part(f"evaluation {section.name}", section.prompts, found, section.reward or config.reward, reward_key,
                     limit, tokenizer, room, min(rows, 1), color)  # fmt: skip
    try:
        check_problems(config, room, problems, evals)
    except ValueError as error:
        out.append(f"WARNING: training would stop: {error}")
    return "\n".join(out)


def _part(
    name: str,
    section: PromptsSection,
    problems: Problems,
    reward: RewardSection,
    key: str,
    limit: int,
    tokenizer: Tokenizer,
    room: int,
    rows: int,
    color: bool,
) -> Iterator[str]:
    yield heading(f"{name}: {section.kind}", color)
    judged = list(judge(make_reward_at(reward, key=key), problems.rows[: max(SCORED, rows)], functions=True))
    reads = {k: verdict.name for verdict in judged for k in verdict.keys}
    for placed in problems.rows[:rows]:
        yield from _shown(placed, reads, tokenizer)
    yield heading(f"{name}: counts", color)
    yield from _counts(problems, limit, room)
    yield heading(f"{name}: rewards of the reference answers", color)
    yield from _verdicts(judged)
    yield ""


def _shown(placed: Placed, reads: dict[str, str], tokenizer: Tokenizer) -> Iterator[str]:
    problem = placed.problem
    yield f"--- {placed.where} ({len(problem.tokens)} tokens)"
    yield tokenizer.decode(problem.tokens, skip_special_tokens=False)
    for key, value in problem.example.items():
        if key != "prompt":
            text = str(value)
            cut = text if len(text) <= WIDTH else f"{text[:WIDTH]} ... ({len(text)} characters)"
            yield f"  {key}: {cut}" + (f"   <- read by {reads[key]}" if key in reads else "")


def _counts(problems: Problems, limit: int, room: int) -> Iterator[str]:
    lengths = np.asarray([len(row.problem.tokens) for row in problems.rows])
    if problems.count is None:
        yield f"endless; lengths of the first {len(lengths)}"
    else:
        dropped = f"; {problems.dropped} left out, longer than max_tokens" if problems.dropped else ""
        yield f"{problems.count} problems{dropped}"
    yield (
        f"tokens of a prompt: shortest {lengths.min()}, median {np.median(lengths):.0f}, longest {lengths.max()}; "
        f"answers of up to {limit}; the model's context is {room}"
    )


def _verdicts(judged: Sequence[Verdict]) -> Iterator[str]:
    for verdict in judged:
        count, scored = len(verdict.scores), verdict.scores[~np.isnan(verdict.scores)]
        reads = f" (reads {', '.join(verdict.keys)})" if verdict.keys else ""
        mean = f"mean {scored.mean():.3f}" if scored.size else "no score"
        full = "" if verdict.full is None else f", {count - len(verdict.short)} of {count} full"
        yield f"{verdict.name}{reads}: {mean}{full}"
        if verdict.short:
            named = ", ".join(verdict.short[:NAMED]) + (" ..." if len(verdict.short) > NAMED else "")
            yield (
                f"WARNING: {verdict.name} does not give {len(verdict.short)} reference answers full marks: {named}. "
                "A wrong column or key, or an answer in a form that it cannot read?"
            )
        if verdict.fault:
            yield f"WARNING: {verdict.name} raised for {count - scored.size} of {count} rows; {verdict.fault}"
    if not judged:
        yield "no reward reads a reference"
