"""What an environment is: it speaks tokens, so what the policy wrote is never decoded and encoded again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable


class Step(NamedTuple):
    """What an environment answers to one turn of the policy."""

    tokens: tuple[int, ...]
    """What the policy reads before it writes again; they are no actions. Empty when the episode is over."""
    reward: float
    """Of this turn; NaN is unscored."""
    done: bool


@runtime_checkable
class Env(Protocol):
    """One episode at a time; `reset` begins another."""

    def reset(self, example: Mapping[str, Any]) -> Sequence[int]:
        """The first prompt of an episode, as tokens."""
        ...

    def step(self, tokens: Sequence[int]) -> Step:
        """The answer to the tokens that the policy has just written, its end token included if it wrote one."""
        ...


@runtime_checkable
class Codec(Protocol):
    """What chat environments need of `text.tokenizer.Tokenizer`."""

    @property
    def end_of_turn_id(self) -> int | None: ...
    def encode(self, text: str, *, add_bos: bool = False) -> list[int]: ...
    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...
    def holds_special(self, text: str) -> bool: ...
    def render_spans(
        self, messages: Sequence[Any], tools: Sequence[Mapping] | None = None, *, add_generation_prompt: bool = False
    ) -> Any: ...
