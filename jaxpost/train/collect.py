"""One step's samples with their rewards, in groups: which of them count, and when to sample again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from jaxpost.rewards.runner import Scored
from jaxpost.rl.episodes import Episode, Problem
from jaxpost.train.online_job import Draw, OnlineJob, Wish
from jaxpost.types import Params

Round = tuple[list[Problem], list[Episode]]
_SEEDS = 2**32 - 1
GREEDY = -1
"""Sample number of a problem's greedy answer, which is a baseline and not trained on."""


class Group(NamedTuple):
    """A problem's samples and their rewards."""

    problem: Problem
    episodes: tuple[Episode, ...]
    columns: dict[str, np.ndarray]
    """[G] each."""
    reward: np.ndarray
    """[G]; NaN is unscored."""
    greedy: float
    """Reward of the greedy answer; NaN if none was drawn."""
    compared: tuple[np.ndarray, ...] = ()
    """[G] each: the rewards that an advantage compares one by one; (): `reward`."""

    @property
    def informative(self) -> bool:
        """Its scored rewards differ."""
        return any(map(_spread, self.compared or (self.reward,)))


def _spread(column: np.ndarray) -> bool:
    scored = column[~np.isnan(column)]
    return bool(scored.size) and bool(scored.max() > scored.min())


@dataclass
class Step:
    """What a step learns from, and what it saw."""

    groups: list[Group]
    """As many as the step asks for, or fewer where refills ran out."""
    seen: list[Group]
    """All that were sampled."""
    refills: int = 0
    faults: list[str] = field(default_factory=list)
    """Sentences about rewards that failed."""


def draw_round(job: OnlineJob, params: Params, problems: Sequence[Problem], step: int, version: int) -> list[Episode]:
    """G samples of every problem, and its greedy answer where the advantage asks for it."""
    rollout = job.rollout
    draw = Draw(step, version, job.run.seed)
    theirs = 0 if rollout.opponent is None else rollout.opponent.samples
    wish = Wish(rollout.samples - theirs, rollout.temperature, rollout.max_tokens)
    episodes = job.generate(params, job.frozen, problems, wish, draw)
    if job.oppose is not None:
        # Noise of its own: with the policy's an opponent that equals it would say the very same.
        other = job.oppose(
            params, job.frozen, problems, wish._replace(samples=theirs), draw._replace(seed=~draw.seed & _SEEDS)
        )
        episodes += [e._replace(sample=wish.samples + e.sample, opponent=True) for e in other]
        episodes.sort(key=lambda e: (e.problem, e.sample))
    if job.greedy:
        best = job.generate(params, job.frozen, problems, Wish(1, 0.0, rollout.max_tokens), draw)
        episodes = [*episodes, *(e._replace(sample=GREEDY) for e in best)]
    return episodes


def _column(columns: Mapping[str, np.ndarray], name: str, key: str) -> np.ndarray:
    """A column of rewards by name, NaN throughout where no sample is scored: a part that failed names no columns.

    Raises:
      ValueError: there is none of this name.
    """
    if name in columns:
        return columns[name]
    score = next(iter(columns.values()))
    if np.isfinite(score).any():
        raise ValueError(f"{key} {name!r} is none of the reward's columns: {', '.join(columns)}")
    return np.full_like(score, np.nan)


def grouped(job: OnlineJob, round_: Round, scored: Scored) -> list[Group]:
    """A round's samples by problem. Truncated ones lose their reward where the loss says so, and so do those that lack
    one of the rewards that are compared one by one."""
    problems, episodes = round_
    columns = scored.rewards
    reward = next(iter(columns.values())).copy()
    for i, episode in enumerate(episodes):
        if episode.reward is not None:
            reward[i] = episode.reward
        if job.unscore_truncated and episode.truncated:
            reward[i] = np.nan
    compared = [_column(columns, name, "advantage.columns") for name in job.compared]
    for column in compared:
        reward[np.isnan(column)] = np.nan
    compared = [np.where(np.isnan(reward), np.nan, column) for column in compared]
    groups = []
    for number, problem in enumerate(problems):
        at = [i for i, e in enumerate(episodes) if e.problem == number and e.sample != GREEDY]
        greedy = [reward[i] for i, e in enumerate(episodes) if e.problem == number and e.sample == GREEDY]
        groups.append(
            Group(
                problem,
                tuple(episodes[i] for i in at),
                {name: column[at] for name, column in columns.items()},
                reward[at],
                float(greedy[0]) if greedy else np.nan,
                tuple(column[at] for column in compared),
            )
        )
    return groups


def collect(job: OnlineJob, first: Round, scored: Scored, refill: Callable[[int], tuple[Round, Scored]]) -> Step:
    """The groups of a step: the first round's, or with dynamic sampling the first informative ones of several rounds.

    DAPO's dynamic sampling (2503.14476): groups whose rewards are all equal are replaced by groups of further problems,
    at most `rollout.max_refills` times; what is still missing then is left out.

    Args:
      refill: (number of the round, from 1) -> a further round with its rewards.
    """
    by = job.rollout.refill_by
    step = Step([], grouped(job, first, scored), faults=[str(problem) for problem in scored.problems])
    wanted = job.rollout.prompts
    if by is not None:
        _column(scored.rewards, by, "rollout.refill_by")

    def kept(group: Group) -> bool:
        # A group is kept by one column, but it can teach only what its rewards say.
        return group.informative and (by is None or _spread(group.columns[by]))

    if job.rollout.max_refills:
        while sum(map(kept, step.seen)) < wanted and step.refills < job.rollout.max_refills:
            step.refills += 1
            more, columns = refill(step.refills)
            step.seen += grouped(job, more, columns)
            step.faults += [str(problem) for problem in columns.problems]
        step.groups = [g for g in step.seen if kept(g)][:wanted]
    else:
        step.groups = list(step.seen)
    return step
