"""Problems and the policy's answers to them, on the host."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


@dataclass(frozen=True)
class Problem:
    """What the policy is asked, as tokens, and what its answers are judged by."""

    number: int
    """Its index in the endless list of problems: its identity in the noise."""
    tokens: tuple[int, ...]
    text: str
    example: Mapping[str, Any]
    opened: str = ""
    """The tag of a thought that the prompt begins, and its answers go on with."""


class Episode(NamedTuple):
    """One answer: the policy's tokens, with an environment's between them where there is one."""

    problem: int
    """Index of its problem in the step."""
    sample: int
    tokens: tuple[int, ...]
    mask: tuple[int, ...]
    """1: chosen by the policy."""
    logprobs: tuple[float, ...]
    """The sampler's, of softmax(logits / temperature); 0 where the mask is 0."""
    finish: str
    text: str
    """What the rewards judge: the answer, or its last turn where there are several."""
    version: int
    """Updates that the policy had seen when it drew this."""
    reward: float | None = None
    """An environment's own; None: the reward functions judge."""
    info: Mapping[str, float] | None = None
    """What an environment counted, by name."""
    transcript: str | None = None
    """All turns as the policy read them; None: the text is all."""
    opponent: bool = False
    """An opponent drew it, not the policy."""
    opened: str = ""
    """Its problem's; rewards read it before the text."""

    @property
    def truncated(self) -> bool:
        return self.finish in ("length", "turns")

    @property
    def own(self) -> tuple[int, ...]:
        """The policy's tokens alone."""
        return tuple(token for token, chosen in zip(self.tokens, self.mask, strict=True) if chosen)


def to_json(problems: Sequence[Problem], episodes: Sequence[Episode]) -> dict[str, Any]:
    """What a checkpoint keeps of samples that wait for their step; log-probabilities keep every bit of float32.

    Of problems the numbers: a row of a table may hold what JSON does not.

    >>> problem = Problem(7, (1, 2), "ask", {"answer": 4})
    >>> episode = Episode(0, 1, (5, 6), (1, 1), (-0.5, -1.25), "stop", "ab", 3)
    >>> from_json(to_json([problem], [episode]), {7: problem}.get) == ([problem], [episode])
    True
    """
    reward = lambda x: None if x is None else repr(float(x))  # noqa: E731  NaN is no JSON
    return {
        "problems": [p.number for p in problems],
        "episodes": [
            [*e[:2], list(e.tokens), list(e.mask), _packed(e.logprobs), *e[5:8], reward(e.reward), *e[9:]]
            for e in episodes
        ],
    }


def from_json(saved: Mapping[str, Any], problem: Callable[[int], Any]) -> tuple[list[Problem], list[Episode]]:
    """The inverse of `to_json`.

    Args:
      problem: a number's problem.
    """
    return [problem(number) for number in saved["problems"]], [_episode(*e) for e in saved["episodes"]]


def _episode(
    problem: int, sample: int, tokens: Any, mask: Any, logprobs: str, finish: str, text: str, version: int,
    reward: str | float | None, *rest: Any,
) -> Episode:  # fmt: skip
    own = None if reward is None else float(reward)
    return Episode(problem, sample, tuple(tokens), tuple(mask), _unpacked(logprobs), finish, text, version, own, *rest)


def _packed(numbers: Sequence[float]) -> str:
    return base64.b64encode(zlib.compress(np.asarray(numbers, np.float32).tobytes())).decode()


def _unpacked(text: str) -> tuple[float, ...]:
    return tuple(np.frombuffer(zlib.decompress(base64.b64decode(text)), np.float32).tolist())


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """The share of n-grams of tokens that occurred before; 0 for fewer than n tokens.

    >>> repetition([1, 2, 1, 2, 1, 2], n=2)
    0.6
    """
    total = len(tokens) - n + 1
    return 0.0 if total < 1 else 1.0 - len({tuple(tokens[i : i + n]) for i in range(total)}) / total
