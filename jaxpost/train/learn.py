"""From a step's samples to updates: what networks say of them, their credit, their rows, and the train step."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpost.losses.rescore import rescore
from jaxpost.rl.rows import Answer, Packed, RowPlan, pack
from jaxpost.train.collect import Group, Step
from jaxpost.train.compiled import CompiledStep, host_scalars
from jaxpost.train.online_job import Credit, Known, OnlineJob
from jaxpost.types import TrainState


@dataclass(frozen=True)
class Numbers:
    """The loop's own numbers from step to step."""

    updates: int = 0
    kl_coef: float = 0.0
    baseline: float = 0.0
    """Running mean of the rewards of earlier steps, later ones weighing more; 0 before the first."""
    measured: int = 0
    """Steps in it."""

    @classmethod
    def of(cls, saved: Mapping[str, Any], job: OnlineJob) -> Numbers:
        """From a checkpoint, or as a run starts."""
        return cls(**saved) if saved else cls(kl_coef=float(job.hyper.get("kl_coef", 0.0)))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def after(self, job: OnlineJob, found: Step, metrics: Mapping[str, float]) -> Numbers:
        """For the next step."""
        numbers = self
        if job.adapt_kl is not None and "kl" in metrics:
            samples = sum(len(g.episodes) for g in found.groups)
            numbers = replace(numbers, kl_coef=job.adapt_kl(numbers.kl_coef, metrics["kl"], samples))
        if job.running_baseline is not None and np.isfinite(metrics.get("reward", np.nan)):
            decay, measured = job.running_baseline, numbers.measured + 1
            # Weights decay^k that sum to 1, from the first step on; with decay 1 all alike.
            share = (1 - decay) / (1 - decay**measured) if decay < 1 else 1 / measured
            mean = numbers.baseline + share * (metrics["reward"] - numbers.baseline)
            numbers = replace(numbers, baseline=mean, measured=measured)
        return numbers

    def logged(self, job: OnlineJob) -> dict[str, int | float]:
        """What a record of the run tells of them."""
        told: dict[str, int | float] = {"updates": self.updates}
        told |= {} if job.adapt_kl is None else {"kl_coef": self.kl_coef}
        return told if job.running_baseline is None else told | {"baseline": self.baseline}


class Outcome(NamedTuple):
    """What learning from a step gave."""

    state: TrainState
    numbers: Numbers
    updates: list[dict[str, float]]
    """Metrics of each update."""
    credit: Credit | None
    times: dict[str, float]
    halt: bool


class Samples(NamedTuple):
    """A step's samples as arrays, [N] and [N, T], groups in order."""

    groups: np.ndarray
    rewards: np.ndarray
    mask: np.ndarray
    truncated: np.ndarray
    greedy: np.ndarray
    logprobs: np.ndarray
    opponent: np.ndarray
    columns: np.ndarray | None
    """[N, K] the rewards that are compared one by one."""

    @classmethod
    def of(cls, groups: Sequence[Group], *, count: int, samples: int, tokens: int, compared: int = 0) -> Samples:
        """`count` groups' room; rows without a sample are unscored."""
        size = count * samples
        zeros = lambda: np.zeros((size, tokens), np.float32)  # noqa: E731
        nothing = lambda: np.full(size, np.nan, np.float32)  # noqa: E731
        out = cls(np.repeat(np.arange(count, dtype=np.int32), samples), nothing(), zeros(), np.zeros(size, bool),
                  nothing(), zeros(), np.zeros(size, bool),
                  np.full((size, compared), np.nan, np.float32) if compared else None)  # fmt: skip
        for g, group in enumerate(groups):
            for s, (episode, reward) in enumerate(zip(group.episodes, group.reward, strict=True)):
                row, length = g * samples + s, len(episode.tokens)
                out.rewards[row], out.greedy[row], out.truncated[row] = reward, group.greedy, episode.truncated
                out.opponent[row] = episode.opponent
                if out.columns is not None:
                    out.columns[row] = [column[s] for column in group.compared]
                out.mask[row, :length], out.logprobs[row, :length] = episode.mask, episode.logprobs
        return out


class Learner:
    """Updates from samples, with programs that are compiled once."""

    def __init__(self, job: OnlineJob, step: CompiledStep):
        self.job, self.step = job, step
        self._rescore: Any = None
        self._credit: Any = None
        if job.learner.minibatches > job.rollout.prompts:
            raise ValueError(
                f"learner.minibatches {job.learner.minibatches} exceeds rollout.prompts {job.rollout.prompts}: "
                "each update needs a group"
            )

    def learn(self, state: TrainState, found: Step, numbers: Numbers, step: int, wish: bool) -> Outcome:
        """All updates of one step.

        Args:
          step: the step's number, which decides how groups are dealt to minibatches.
          wish: this process wants to stop.
        """
        job, times = self.job, {"reference": 0.0, "learner": 0.0}
        live = [g for g, group in enumerate(found.groups) if self._teaches(group)]
        if not live:
            # Without an update no process hears of another's wish: it waits for the next one.
            return Outcome(state, numbers, [], None, times, halt=False)
        samples = Samples.of(
            found.groups, count=job.rollout.prompts, samples=job.rollout.samples, tokens=job.answer_tokens,
            compared=len(job.compared),
        )  # fmt: skip
        start = time.perf_counter()
        hyper = {**job.hyper, "kl_coef": numbers.kl_coef} if "kl_coef" in job.hyper else dict(job.hyper)
        said = self._say(state, found, live, hyper)
        credit = self._assign(found, samples, said, numbers)
        times["reference"] = time.perf_counter() - start
        updates: list[dict[str, float]] = []
        halt = False
        start = time.perf_counter()
        for epoch in range(job.learner.epochs):
            for planned, part in enumerate(self._minibatches(len(found.groups), step, epoch), job.planned(step, epoch)):
                batch = self._batch(found, [g for g in part if g in live], part, samples, said, credit)
                if batch is None:
                    continue
                if not self.step.compiled:
                    self.step.compile(state, batch)
                state, metrics = self.step(_numbered(state, planned), batch, numbers.updates, wish, hyper)
                host = {name: float(value) for name, value in jax.device_get(metrics).items()}
                halt |= host.pop("halt") > 0
                numbers = replace(numbers, updates=numbers.updates + 1)
                updates.append(host)
        times["learner"] = time.perf_counter() - start
        return Outcome(state, numbers, updates, credit, times, halt)

    def _teaches(self, group: Group) -> bool:
        job = self.job
        scored = np.sum(~np.isnan(group.reward))
        if not scored:
            return False
        if not job.group_relative or group.informative or (job.kl_compared and scored > 1):
            return True
        return job.rollout.uninformative == "count" and job.always_trained

    def _say(
        self, state: TrainState, found: Step, live: Sequence[int], hyper: Mapping[str, Any]
    ) -> dict[str, np.ndarray]:
        """What networks say of the samples, [N, T] each; of groups that teach nothing 0, and no entropy (NaN)."""
        job = self.job
        if not job.rescore:
            return {}
        packed = self._pack(found, live, job.whole, None)
        batch = job.place(packed.batch)
        args = (state.params, job.frozen, batch, host_scalars(hyper))
        if self._rescore is None:
            run = lambda params, frozen, batch, hyper: rescore(  # noqa: E731
                job.rescore, params, frozen, batch, hyper, pieces=job.whole.pieces
            )
            self._rescore = jax.jit(run, out_shardings=job.replicated).lower(*args).compile()
        said = jax.device_get(self._rescore(*args))
        rows, out = self._numbers(live), {}
        for name, values in said.items():
            size = (job.rollout.prompts * job.rollout.samples, job.answer_tokens)
            out[name] = np.full(size, np.nan if name == "entropy" else 0.0, np.float32)
            out[name][rows] = packed.gather(np.asarray(values), job.answer_tokens)
        return out

    def _numbers(self, groups: Sequence[int]) -> list[int]:
        each = self.job.rollout.samples
        return [g * each + s for g in groups for s in range(each)]

    def _assign(self, found: Step, samples: Samples, said: Mapping[str, np.ndarray], numbers: Numbers) -> Credit:
        job = self.job
        zeros = np.zeros_like(samples.mask)
        steps: tuple[Any, Any] | None = None
        if job.process is not None:
            rewards, ends, faults = job.process(found.groups, samples)
            steps = rewards, ends
            found.faults += faults
        known = Known(
            samples.rewards, samples.groups, samples.mask, samples.truncated, samples.greedy,
            said.get("logprobs", samples.logprobs), said.get("reference", zeros), said.get("values", zeros),
            steps, samples.opponent, samples.columns, said.get("entropy"),
        )  # fmt: skip
        credit = job.credit(known, {"kl_coef": numbers.kl_coef, "baseline": numbers.baseline})
        return Credit(*(np.asarray(x) for x in credit))

    def _minibatches(self, groups: int, step: int, epoch: int) -> list[list[int]]:
        """Groups dealt to updates: at random, by the run's seed, the step and the epoch alone."""
        count = self.job.learner.minibatches
        order = np.arange(groups)
        if count > 1:
            order = np.random.default_rng((self.job.run.seed, step, epoch)).permutation(groups)
        return [sorted(int(g) for g in part) for part in np.array_split(order, count)]

    def _pack(self, found: Step, groups: Sequence[int], plan: RowPlan, weights: np.ndarray | None) -> Packed:
        each = self.job.rollout.samples
        answers = [
            [
                Answer(
                    group.problem.tokens,
                    episode.tokens,
                    episode.mask if weights is None else weights[g * each + s, : len(episode.tokens)],
                )
                for s, episode in enumerate(group.episodes)
            ]
            for g, group in ((g, found.groups[g]) for g in groups)
        ]
        return pack(answers, plan, pad_id=self.job.pad_id)

    def _batch(
        self,
        found: Step,
        live: Sequence[int],
        part: Sequence[int],
        samples: Samples,
        said: Mapping[str, np.ndarray],
        credit: Credit,
    ) -> Any:
        """One update's rows, or None if they would teach nothing."""
        job = self.job
        rows = self._numbers(live)
        if not rows or not np.any(credit.weights[rows]):
            return None
        packed = self._pack(found, live, job.plan, credit.weights)
        share = 1.0
        if job.group_relative and job.rollout.uninformative == "count" and not job.always_trained:
            # Silent groups are not computed, but the loss is a mean over all: every surrogate scales with A.
            share = job.measure(credit.weights[rows]) / job.measure(credit.weights[self._numbers(part)])
        fields = {
            "advantages": share * credit.advantages,
            "sampler_logprobs": samples.logprobs,
            "old_logprobs": said.get("logprobs", samples.logprobs) if job.keeps_old else None,
            "ref_logprobs": said.get("reference"),
            "old_values": said.get("values"),
            "returns": credit.returns if "values" in said else None,
            "opponent": samples.mask * samples.opponent[:, None] if job.oppose is not None else None,
        }
        spread: dict[str, Any] = {name: packed.spread(x[rows]) for name, x in fields.items() if x is not None}
        return packed.batch._replace(**spread)


def _numbered(state: TrainState, planned: int) -> TrainState:
    """The state before the run's update of this number: learning-rate schedules count those too that were not made."""
    number = np.asarray(planned, np.int32)
    return state._replace(step=jax.make_array_from_callback((), state.step.sharding, lambda _: number))
