"""Who answers a step's problems: the policy, and the opponent that `rollout.opponent` names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jaxpost.adapters.bind import merge
from jaxpost.assemble import policy
from jaxpost.assemble.model import Pretrained
from jaxpost.assemble.supervised import text_sampler
from jaxpost.assemble.training import Training
from jaxpost.config_rl import RLConfig
from jaxpost.config_rollout import ReferenceOpponent, RolloutSection
from jaxpost.generate.mixture import geometric_mixture, mixed
from jaxpost.generate.params import SamplingParams
from jaxpost.generate.sampler import Sampler
from jaxpost.rl.episodes import Episode, Problem
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
        Episode(i // wish.samples, c.sample, c.tokens, (1,) * len(c.tokens), c.logprobs, c.finish, c.text, draw.version)
        for i, c in enumerate(found)
    ]


def make_opponent(config: RLConfig, pretrained: Pretrained, training: Training, sampler: Sampler) -> Generate | None:
    """Draws the opponent's samples: the first policy with the policy's own sampler, or its mixture with the policy."""
    rollout, section = config.rollout, config.rollout.opponent
    if section is None:
        return None
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
