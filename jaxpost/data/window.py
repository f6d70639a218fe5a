"""Groups of answers that are longer than a row: how much of the prompt and of each answer is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class Window(Protocol):
    """The options that decide."""

    @property
    def seq_len(self) -> int: ...

    @property
    def max_length(self) -> int: ...

    @property
    def share_prompts(self) -> bool: ...

    @property
    def cut(self) -> str: ...


def group_cost(prompt: int, answers: Sequence[int], share: bool) -> int:
    """Tokens of a row that a group takes: one prompt without its last token, which leads every answer; or one each.

    >>> group_cost(10, [3, 4], True), group_cost(10, [3, 4], False)
    (18, 27)
    """
    if not share or prompt == 0:
        return prompt * len(answers) + sum(answers)
    return prompt - 1 + len(answers) + sum(answers)


def fit(prompt: int, answers: Sequence[int], window: Window) -> tuple[int, int] | None:
    """How a group is shortened: (tokens cut from the beginning of the prompt, most tokens of an answer).

    None: it fits as it is. A second number of 0: the prompt leaves no room. Shorter answers stay whole; the longest
    are cut to one length.
    """
    longest = max(answers)
    fits = group_cost(prompt, answers, window.share_prompts) <= window.seq_len
    if fits and prompt + longest <= window.max_length:
        return None
    kept = prompt
    if window.cut == "prompt":
        room = window.seq_len - group_cost(0, answers, False)
        room = room - len(answers) + 1 if window.share_prompts else room // len(answers)
        kept = max(min(prompt, 1), min(prompt, room, window.max_length - longest))
    return prompt - kept, _level(kept, answers, window)


def _level(prompt: int, answers: Sequence[int], window: Window) -> int:
    """The greatest length that answers may have, found from the shortest to the longest."""
    room = window.seq_len - group_cost(prompt, [0] * len(answers), window.share_prompts)
    level, left = max(answers), len(answers)
    for length in sorted(answers):
        if length * left > room:
            level = room // left
            break
        room, left = room - length, left - 1
    return max(0, min(level, window.max_length - prompt))
