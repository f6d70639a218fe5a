"""Many episodes at once: all that wait for the policy are sampled together, all that wait for tools run together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from jaxpost.envs.contract import Env, Step

Finish = Literal["done", "turns", "length", "error"]


@runtime_checkable
class Turn(Protocol):
    """What is read of a sample; `generate.batching.Completion` has it."""

    @property
    def tokens(self) -> Sequence[int]: ...
    @property
    def logprobs(self) -> Sequence[float]: ...
    @property
    def finish(self) -> str: ...


Sample = Callable[..., Sequence[Turn]]
"""sample(prompts, sampling, seed=, draw=, example_ids=) -> one turn for each prompt, in order: a `generate.Sampler`
with its parameters bound (`functools.partial(sampler, params)`)."""


class Episode(NamedTuple):
    """One finished episode. `mask`, `logprobs` and `tokens` have one entry for each token after the first prompt."""

    example: int
    """Its id, which is its identity in the noise."""
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    mask: tuple[int, ...]
    """1: the policy's own token, an action. 0: the environment's."""
    logprobs: tuple[float, ...]
    """Of the policy's tokens, as the sampler drew them; 0 where the mask is 0."""
    reward: float
    """The sum over turns; NaN if one of them is unscored or failed."""
    rewards: tuple[float, ...]
    """Of each turn."""
    turns: int
    finish: Finish
    """done: the environment ended it. turns, length: it was cut off. error: `error` says why."""
    error: str | None = None
    policy_version: int = 0


@dataclass
class _Running:
    """An episode under way."""

    env: Env
    example: int
    context: int
    prompt: tuple[int, ...] = ()
    tokens: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    finish: Finish | None = None
    error: str | None = None
    version: int = 0
    last: int = 0
    """Where the policy's last turn begins."""

    def fail(self, error: str) -> None:
        self.finish, self.error = "error", error
        self.rewards.append(math.nan)

    def episode(self) -> Episode:
        turns = len(self.rewards)
        return Episode(
            self.example, self.prompt, tuple(self.tokens), tuple(self.mask), tuple(self.logprobs),
            math.fsum(self.rewards), tuple(self.rewards), turns, self.finish or "done", self.error, self.version,
        )  # fmt: skip


def rollout(
    envs: Sequence[Env],
    examples: Sequence[Mapping[str, Any]],
    sample: Sample,
    *,
    sampling: Any,
    context: int,
    max_answer: int | None = None,
    max_turns: int = 8,
    seed: int = 0,
    draw: int = 0,
    example_ids: Sequence[int] | None = None,
    workers: int = 8,
) -> list[Episode]:
    """Plays one episode in each environment; the order of the result is theirs.

    What the policy reads is its own tokens as they were drawn and the environment's as it gave them: prompt, turn,
    reply, turn ... So the learner's log-probabilities are those of the same tokens, and masking the replies is exact.
    A turn that the sampler cut off ends its episode, unanswered; an environment that raises ends its own episode, told
    by `error`, and the others go on.

    Args:
      envs: one an episode, which may be used again later; examples: one for each.
      sampling: a frozen dataclass with `max_tokens` of one turn and `n` = 1 (`generate.SamplingParams`).
      context: tokens that an episode may have in all; max_answer: those after its first prompt (None: any number).
      seed, draw, example_ids: of the noise. The ids of the samples of one example must differ too, or they would all be
        the same; numbers from 0 if not given.
      workers: environments that answer at the same time.

    Raises:
      ValueError: environments, examples and ids that do not fit, or an n that is not 1.
    """
    ids = list(range(len(envs))) if example_ids is None else list(example_ids)
    if not len(envs) == len(examples) == len(ids):
        raise ValueError(f"{len(envs)} environments, {len(examples)} examples and {len(ids)} ids must be as many")
    if len(set(ids)) < len(ids):
        raise ValueError("two episodes have the same id, so they would draw the same noise; give each its own")
    if getattr(sampling, "n", 1) != 1:
        raise ValueError(f"sampling.n = {sampling.n}: an environment plays one episode; give more environments")
    running = [_Running(env, i, context) for env, i in zip(envs, ids, strict=True)]
    with ThreadPoolExecutor(max(1, workers)) as pool:
        starts = pool.map(_guarded, [env.reset for env in envs], examples)
        for one, (prompt, error) in zip(running, starts, strict=True):
            one.prompt = () if error else tuple(int(token) for token in prompt)
            if max_answer is not None:
                one.context = min(context, len(one.prompt) + max_answer)
            if error:
                one.fail(error)
        for _ in range(max_turns):
            waiting = [one for one in running if one.finish is None and _room(one)]
            if not waiting:
                break
            _turn(waiting, sample, sampling, seed, draw)
            asked = [one for one in waiting if one.finish is None]
            answers = pool.map(_guarded, [one.env.step for one in asked], [one.tokens[one.last :] for one in asked])
            for one, (step, error) in zip(asked, answers, strict=True):
                _answer(one, step, error)
    for one in running:
        one.finish = one.finish or "turns"
    return [_trimmed(one).episode() for one in running]


def _room(one: _Running) -> bool:
    """Whether at least one token can be written."""
    if len(one.prompt) + len(one.tokens) >= one.context:
        one.finish = "length"
    return one.finish is None


def _turn(waiting: list[_Running], sample: Sample, sampling: Any, seed: int, draw: int) -> None:
    """Samples one turn of every episode that waits for one."""
    prompts = [[*one.prompt, *one.tokens] for one in waiting]
    rooms = [one.context - len(prompt) for one, prompt in zip(waiting, prompts, strict=True)]
    wishes = [_within(sampling, room) for room in rooms]
    found = sample(prompts, wishes, seed=seed, draw=draw, example_ids=[one.example for one in waiting])
    for one, turn in zip(waiting, found, strict=True):
        one.last = len(one.tokens)
        one.tokens += [int(token) for token in turn.tokens]
        one.logprobs += [float(value) for value in turn.logprobs]
        one.mask += [1] * len(turn.tokens)
        one.version = int(getattr(turn, "policy_version", 0))
        if turn.finish == "error":
            one.fail(f"the sampler: {getattr(turn, 'error', None)}")
        elif turn.finish != "stop":
            one.finish = "length"
            one.rewards.append(0.0)


def _within(sampling: Any, room: int) -> Any:
    """The wish, with room for so many tokens."""
    least = {"min_tokens": min(sampling.min_tokens, room)} if hasattr(sampling, "min_tokens") else {}
    return replace(sampling, max_tokens=min(sampling.max_tokens, room), **least)


def _answer(one: _Running, step: Step | None, error: str | None) -> None:
    if step is None:
        one.fail(f"the environment: {error}")
        return
    one.rewards.append(float(step.reward))
    if step.done:
        one.finish = "done"
        return
    one.tokens += [int(token) for token in step.tokens]
    one.mask += [0] * len(step.tokens)
    one.logprobs += [0.0] * len(step.tokens)


def _trimmed(one: _Running) -> _Running:
    """Without replies that the policy never read."""
    while one.mask and not one.mask[-1]:
        one.tokens.pop(), one.mask.pop(), one.logprobs.pop()
    return one


def _guarded(do: Callable[..., Any], argument: Any) -> tuple[Any, str | None]:
    """The result and no error, or no result and an error."""
    try:
        return do(argument), None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
