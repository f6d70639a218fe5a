"""What an online run is made of: the supervised job's parts, and where samples and their rewards come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from jaxpost.config_rl import EvalSection, LearnerSection, OnlineSection
from jaxpost.config_rollout import RolloutSection
from jaxpost.losses.rescore import RescoreFn
from jaxpost.rewards.contract import Completion, Example
from jaxpost.rewards.runner import Scored
from jaxpost.rl.episodes import Episode, Problem
from jaxpost.rl.rows import RowPlan
from jaxpost.train.job import Job
from jaxpost.types import Params


class Draw(NamedTuple):
    step: int
    version: int
    seed: int


"""Identity of a round of samples: the noise's draw and seed, and the updates that the policy has seen."""


class Wish(NamedTuple):
    """How each problem of one call is answered."""

    samples: int
    temperature: float
    max_tokens: int


@runtime_checkable
class Generate(Protocol):
    """generate(params, frozen, problems, wish, draw) -> episodes, in order of problem and sample."""

    def __call__(
        self, params: Params, frozen: Params, problems: Sequence[Problem], wish: Wish, draw: Draw
    ) -> list[Episode]: ...


ScoreFn = Callable[[Sequence[Example], Sequence[Completion]], Scored]
"""Columns of rewards, the first of which is the score, and the faults met on the way."""


HostArray = Any
"""NumPy's on the host, traced inside a credit function."""


class Known(NamedTuple):
    """What an advantage is computed from: N samples of at most T tokens."""

    rewards: HostArray
    """[N]; NaN is unscored, and so are rows that are there for the shape alone."""
    groups: HostArray
    """[N]"""
    mask: HostArray
    """[N, T], 1 on the policy's own tokens."""
    truncated: HostArray
    """[N]"""
    greedy: HostArray
    """[N] reward of the problem's greedy answer; NaN if none was drawn."""
    logprobs: HostArray
    """[N, T] of the policy before the step: the learner's if it was asked, else the sampler's."""
    reference: HostArray
    """[N, T]; zeros without a reference."""
    values: HostArray
    """[N, T]; zeros without a critic."""
    steps: tuple[HostArray, HostArray] | None
    """[N, S] rewards and last tokens of an answer's steps, where rewards come by step."""
    opponent: HostArray = None
    """[N] whether an opponent drew it; None: the policy drew all."""
    columns: HostArray = None
    """[N, K] the rewards that the advantage compares one by one; None: it compares `rewards`."""
    entropy: HostArray = None
    """[N, T] of the policy before the step, nats; NaN where it was not computed."""


class Credit(NamedTuple):
    """What the learner is told of every token."""

    advantages: HostArray
    """[N, T]"""
    weights: HostArray
    """[N, T] loss weights: the mask, without what is not trained."""
    returns: HostArray
    """[N, T]; zeros without a critic."""


CreditFn = Callable[[Known, Mapping[str, float]], Credit]
"""(what is known, the loop's numbers: "kl_coef", "baseline") -> credit."""


@dataclass(frozen=True)
class Evaluation:
    """Held-out problems and how they are judged."""

    section: EvalSection
    problems: tuple[Problem, ...]
    score: ScoreFn
    wish: Wish


@dataclass(frozen=True, kw_only=True)
class OnlineJob(Job):
    """Everything that `run_online` needs."""

    train: OnlineSection
    rollout: RolloutSection
    learner: LearnerSection
    problem: Callable[[int], Problem]
    """Problem by index, without end."""
    generate: Generate
    score: ScoreFn
    credit: CreditFn
    plan: RowPlan
    """Of one update's batch."""
    whole: RowPlan
    """Of all samples of a step, for `rescore`."""
    rescore: Sequence[RescoreFn] = ()
    """What networks say of the samples before the step: "logprobs", "entropy", "reference", "values"."""
    oppose: Generate | None = None
    """As `generate`, by the opponent of `rollout.opponent`."""
    group_relative: bool = True
    """Groups with equal rewards have no advantage, so they can be left out or sampled anew."""
    equal_alarm: bool = True
    """Many groups with equal rewards are worth an alarm: the advantage is of samples against others of their group."""
    kl_compared: bool = False
    """What samples are compared by has their KL in it, so groups of equal rewards teach too."""
    compared: tuple[str, ...] = ()
    """Columns of the reward that are compared one by one; (): the reward itself."""
    greedy: bool = False
    """Also draw each problem's greedy answer."""
    process: Callable[..., tuple[np.ndarray, np.ndarray, list[str]]] | None = None
    """process(groups, samples) -> rewards by step of the answer, the steps' last tokens, [N, S] each, and faults."""
    always_trained: bool = False
    """The loss has terms that act where the advantage is 0 (KL, entropy, a critic)."""
    running_baseline: float | None = None
    """Decay of the running mean of rewards, where the advantage reads it."""
    adapt_kl: Callable[[float, float, int], float] | None = None
    """(coefficient, measured KL, samples) -> the next coefficient."""
    evals: tuple[Evaluation, ...] = ()
    answer_tokens: int
    """Most tokens of an answer."""
    keeps_old: bool = False
    """The loss reads the log-probabilities from before the step; without them its ratios are 1."""
    unscore_truncated: bool = False
    measure: Callable[[np.ndarray], float] = np.sum
    """Loss weights [N, T] -> what the loss's mean divides by: tokens, or samples."""
    replicated: Any = None
    """Sharding of what all processes read."""
    pad_id: int = 0
    forget: Callable[[], None] = lambda: None
    """Lets go of the sampler's memory that only decoding needs."""
    close: Callable[[], None] = lambda: None
    """Ends the processes that score; a later call starts them anew."""

    def planned(self, step: int, epoch: int = 0) -> int:
        """Updates that are planned before this one of a step's passes; those without anything to learn are not made."""
        return (step * self.learner.epochs + epoch) * self.learner.minibatches

    @property
    def saving(self) -> tuple[int, int]:
        return self.train.save_every, self.train.keep_checkpoints
