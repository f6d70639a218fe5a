"""Who answers a step's problems: the policy, and the opponent that `rollout.opponent` names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from jaxpost.adapters.bind import merge
from jaxpost.assemble import policy
from jaxpost.assemble.model import Pretrained
from jaxpost.assemble.prompts import Problems
from jaxpost.assemble.supervised import text_sampler
from jaxpost.assemble.training import Training
from jaxpost.config_rl import RLConfig
from jaxpost.config_rollout import GivenOpponent, ReferenceOpponent, RolloutSection
from jaxpost.generate.mixture import geometric_mixture, mixed
from jaxpost.generate.params import SamplingParams
from jaxpost.generate.sampler import Sampler
from jaxpost.rl.episodes import Episode, Problem
from jaxpost.text.tokenizer import Tokenizer
from jaxpost.train.online_job import Draw, Generate, Wish
from jaxpost.types import Params


def rollout_sampler(pretrained: Pretrained, rollout: RolloutSection) -> Sampler:
    """The engine as the section sizes it."""
    return text_sampler(
        pretrained, rows=rollout.rows, cache_tokens=rollout.cache_tokens, prefill_tokens=rollout.prefill_tokens
    )


def answers(
    sampler: Sampler, params: Params, rollout: RolloutSection, problems: Sequence[Problem], wish: Wish, draw: Draw
) -> list[Episode]:
    """Answers to problems in one turn, in order of problem and sample."""
    found = sampler(
        params,
        [p.tokens for p in problems],
        SamplingParams(
            n=wish.samples,
            temperature=wish.temperature,
            max_tokens=wish.max_tokens,
            min_tokens=min(rollout.min_tokens, wish.max_tokens),
            stop=rollout.stop,
        ),
        seed=draw.seed,
        draw=draw.step,
        example_ids=[p.number for p in problems],
        policy_version=draw.version,
    )
    return [
        Episode(
            i // wish.samples, c.sample, c.tokens, (1,) * len(c.tokens), c.logprobs, c.finish, c.text, draw.version,
            opened=problems[i // wish.samples].opened,
        )
        for i, c in enumerate(found)
    ]  # fmt: skip


def given_answers(
    section: GivenOpponent, tokenizer: Tokenizer, problems: Problems, *, chat: bool, most: int
) -> Generate:
    """The opponent whose answer stands in each problem's row, with the end that a turn has.

    Args:
      chat: the answer is a turn in the model's chat format.
      most: tokens of an answer.

    Raises:
      ValueError: a row without the answer, or with one that is too long; names it by file and line.
    """
    end = _end_of_turn(tokenizer) if chat else tokenizer.eos_ids[0]

    @cache
    def encoded(text: str) -> tuple[int, ...]:
        return (*tokenizer.encode(text), end)

    for row in problems.rows:
        text = row.problem.example.get(section.key)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"{row.where}: the row's {section.key} (rollout.opponent.key) must be the given answer as text, not "
                f"{text!r:.60}; it has {', '.join(row.problem.example)}"
            )
        if len(encoded(text)) > most:
            raise ValueError(
                f"{row.where}: {section.key} has {len(encoded(text))} tokens with its end, which exceeds "
                f"rollout.max_tokens {most}; raise it, or leave the row out"
            )

    def given(params: Params, frozen: Params, problems: Sequence[Problem], wish: Wish, draw: Draw) -> list[Episode]:
        found = []
        for i, problem in enumerate(problems):
            text = problem.example[section.key]
            tokens = encoded(text)[:most]  # an endless source's further problems were not looked at
            nothing, own = (0.0,) * len(tokens), (1,) * len(tokens)
            found.append(Episode(i, 0, tokens, own, nothing, "stop", text, draw.version))
        return found

    return given


def _end_of_turn(tokenizer: Tokenizer) -> int:
    """The token that ends an assistant's turn."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ends = [i for i in tokenizer.encode(tokenizer.render(turns)) if i in tokenizer.eos_ids]
    return ends[-1] if ends else tokenizer.eos_ids[0]


def make_opponent(
    config: RLConfig, pretrained: Pretrained, training: Training, sampler: Sampler, problems: Problems
) -> Generate | None:
    """Draws the opponent's samples: the first policy with the policy's own sampler, its mixture with the policy, or the
    answers that are given."""
    rollout, section = config.rollout, config.rollout.opponent
    if section is None:
        return None
    if isinstance(section, GivenOpponent):
        chat = config.prompts.chat
        return given_answers(section, pretrained.tokenizer, problems, chat=chat, most=rollout.max_tokens)
    if isinstance(section, ReferenceOpponent):

        def reference(
            params: Params, frozen: Params, problems: Sequence[Problem], wish: Wish, draw: Draw
        ) -> list[Episode]:
            return answers(sampler, policy.reference_of(frozen), rollout, problems, wish, draw)

        return reference
    both = replace(pretrained, model=geometric_mixture(pretrained.model, section.weight))
    of_both = rollout_sampler(both, rollout)

    def mixture(params: Params, frozen: Params, problems: Sequence[Problem], wish: Wish, draw: Draw) -> list[Episode]:
        first = merge(training.policy(params, frozen))
        together = mixed(first, merge(policy.reference_of(frozen)))
        found = answers(of_both, together, rollout, problems, wish, draw)
        of_both.forget_weights()
        return found

    return mixture
