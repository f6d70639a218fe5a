"""Budgets of thinking: at least so many tokens before the end marker, at most so many, and "Wait" against haste.

An automaton over token ids on the host, with the face of a grammar's matcher (`generate.matcher.Matcher`): it hands
over to a grammar where the thinking ends. Budget forcing is s1's (arXiv:2501.19393).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from jaxpost.generate.matcher import Bits, Matcher, all_but, has, only


@dataclass(frozen=True)
class ThinkingBudget:
    """How long a row may think. Tokens between the markers count; the markers do not.

    With n thinking tokens so far, the thinking may end where min_tokens <= n, and it is ended, token by token, where
    n = max_tokens. An end before min_tokens is banned; or, with `wait`, refused up to `max_waits` times, the tokens of
    `wait` taking its place, and accepted afterwards (s1: wait "Wait", min_tokens = max_tokens, max_waits = 2).

    Attributes:
      end: token ids of the end marker, as those of "</think>".
      begin: token ids of the begin marker. A row whose prompt does not end within thinking is made to write it
        first. Empty: every prompt ends within thinking.
      min_tokens, max_tokens: fewest and most tokens of thinking; max_tokens None is no limit.
      wait: token ids put in the place of an early end; they count as thinking.
      max_waits: how often.

    Raises: ValueError for a budget that contradicts itself.

    Example:
      >>> thinking = ThinkingBudget(end=(9,), max_tokens=2).start([1, 2], vocab_size=10, end_ids=[0])
      >>> [thinking.advance(token) for token in (3, 4)], thinking.forced()
      ([True, True], [9])
    """

    end: Sequence[int]
    begin: Sequence[int] = ()
    min_tokens: int = 0
    max_tokens: int | None = None
    wait: Sequence[int] = ()
    max_waits: int = 0

    def __post_init__(self) -> None:
        for name in ("end", "begin", "wait"):
            object.__setattr__(self, name, tuple(int(t) for t in getattr(self, name)))
        most = self.max_tokens
        if not self.end:
            raise ValueError("a thinking budget needs the token ids of the marker that ends thinking")
        if any(self.end[:n] == self.end[-n:] for n in range(1, len(self.end))):
            raise ValueError(f"the end marker {self.end} ends as it begins, so that two could overlap; give another")
        if self.min_tokens < 0 or (most is not None and most < self.min_tokens):
            raise ValueError(f"thinking of at least {self.min_tokens} and at most {most} tokens is impossible")
        if bool(self.wait) != (self.max_waits > 0):
            raise ValueError(f"wait tokens and max_waits >= 1 go together; they are {self.wait} and {self.max_waits}")
        if self.wait and len(self.end) > 1:
            raise ValueError(
                f"wait takes the place of an end marker of one token; this one has {len(self.end)}, and its first ones "
                "would stay in the text"
            )
        if self.wait and _find(self.wait, self.end) >= 0:
            raise ValueError("the wait tokens must not hold the end marker")

    def start(
        self, prompt: Sequence[int], *, vocab_size: int, end_ids: Sequence[int], then: Matcher | None = None
    ) -> ThinkingMatcher:
        """The matcher of a row.

        Args:
          prompt: the row's prompt; what stands after its last end token says whether thinking has begun.
          end_ids: tokens that end a row.
          then: what the rest must be once the thinking is over; without it, anything.

        Raises: ValueError for a marker outside the vocabulary, or that holds an end token of the row.
        """
        for name in ("end", "begin", "wait"):
            wrong = [t for t in getattr(self, name) if not 0 <= t < vocab_size or t in end_ids]
            if wrong:
                raise ValueError(
                    f"token {wrong[0]} of {name} is outside the vocabulary of {vocab_size}, or ends the whole row"
                )
        # A marker in a turn that has ended, the user's or one cut short, begins nothing now.
        last = max((at for at, token in enumerate(prompt) if token in end_ids), default=-1)
        turn = prompt[last + 1 :]
        opened = not self.begin or _find_last(turn, self.begin) > _find_last(turn, self.end)
        place = _think(self, _Place("thinking")) if opened else _Place("begin", forced=tuple(self.begin))
        return ThinkingMatcher(self, place, vocab_size, frozenset(end_ids), then)


def _find(tokens: Sequence[int], part: Sequence[int]) -> int:
    hits = (i for i in range(len(tokens) - len(part) + 1) if tuple(tokens[i : i + len(part)]) == tuple(part))
    return next(hits, -1)


def _find_last(tokens: Sequence[int], part: Sequence[int]) -> int:
    back = _find(tuple(reversed(tokens)), tuple(reversed(part)))
    return -1 if back < 0 else len(tokens) - back - len(part)


@dataclass(frozen=True)
class _Place:
    """Where a row stands."""

    part: Literal["begin", "thinking", "wait", "end", "over", "ended"]
    """What is being written: a marker or a wait that is forced, thinking, what follows it, or nothing more."""
    forced: tuple[int, ...] = ()
    """Tokens that must come next."""
    thought: int = 0
    """Tokens of thinking, those of an end marker that is not complete among them."""
    matched: int = 0
    """Tokens of the end marker that the thinking ends with."""
    waits: int = 0


def _matched(end: Sequence[int], before: int, token: int) -> int:
    """The longest start of `end` that the text ends with, after one more token; `before` is that without it."""
    tail = (*end[:before], token)
    return next(n for n in range(len(tail), -1, -1) if tail[len(tail) - n :] == tuple(end[:n]))


def _think(budget: ThinkingBudget, place: _Place) -> _Place:
    """On with thinking; where the most tokens are used up, the end marker must come, or what is left of it."""
    if budget.max_tokens is None or place.thought < budget.max_tokens:
        return replace(place, part="thinking", forced=())
    enough = place.thought - place.matched >= budget.min_tokens
    return replace(place, part="end", forced=tuple(budget.end[place.matched if enough else 0 :]))


class ThinkingMatcher:
    """Where one row stands in its thinking; see `generate.matcher.Matcher`. Made by `ThinkingBudget.start`."""

    def __init__(
        self, budget: ThinkingBudget, place: _Place, vocab_size: int, end_ids: frozenset[int], then: Matcher | None
    ):
        self.vocab_size = vocab_size
        self._budget, self._place, self._end_ids, self._then = budget, place, end_ids, then

    @property
    def finished(self) -> bool:
        """Nothing but an end token may follow, or one came."""
        part, then = self._place.part, self._then
        return part == "ended" or (part == "over" and then is not None and then.finished)

    @property
    def over(self) -> bool:
        """The end marker came: what follows is as free as what was to come then."""
        return self._place.part == "over"

    def endless(self) -> ThinkingMatcher | None:
        """The same of a row whose end tokens are like any others; None where a grammar follows, which must end."""
        if self._then is not None:
            return None
        return ThinkingMatcher(self._budget, self._place, self.vocab_size, frozenset(), None)

    @property
    def problem(self) -> str | None:
        """The problem of the grammar that follows, if it has one."""
        return None if self._then is None else self._then.problem

    def mask(self) -> Bits:
        """Tokens allowed next, as `Matcher.mask`."""
        place = self._place
        if place.forced:
            return only(self.vocab_size, place.forced[:1])
        if place.part == "ended":
            return only(self.vocab_size, tuple(self._end_ids))
        if place.part == "thinking":
            return all_but(self.vocab_size, self._banned())
        return all_but(self.vocab_size) if self._then is None else self._then.mask()

    def _banned(self) -> list[int]:
        budget, place = self._budget, self._place
        if self._may_wait():
            return []  # the wish to end is seen, and a wait takes its place
        banned = []
        if place.matched == len(budget.end) - 1 and self._early() and not budget.wait:
            banned.append(budget.end[-1])
        if self._then is not None or (place.thought < budget.min_tokens and not budget.wait):
            banned += self._end_ids
        return banned

    def _early(self) -> bool:
        return self._place.thought - self._place.matched < self._budget.min_tokens

    def _may_wait(self) -> bool:
        budget, place = self._budget, self._place
        room = budget.max_tokens is None or place.thought + len(budget.wait) < budget.max_tokens
        return self._early() and place.waits < budget.max_waits and room

    def advance(self, token: int) -> bool:
        """Takes a token. False, and no change, where the mask has it not; False too for an early end that a wait
        replaces: then the tokens of `forced()` are the row's next ones.
        """
        place, budget = self._place, self._budget
        if place.part == "over" and self._then is not None:
            return self._then.advance(token)
        if place.part == "ended" or not has(self.mask(), token):
            return False
        if place.forced:
            self._place = self._after_forced(place)
            return True
        ends = token in self._end_ids
        if place.part == "thinking":
            matched = _matched(budget.end, place.matched, token)
            marked = matched == len(budget.end)
            if (marked or ends) and self._may_wait():
                self._place = replace(place, part="wait", forced=tuple(budget.wait), waits=place.waits + 1)
                return False
            if marked:
                place = replace(place, part="over")
            elif not ends:
                place = _think(budget, replace(place, thought=place.thought + 1, matched=matched))
        self._place = replace(place, part="ended") if ends else place
        return True

    def _after_forced(self, place: _Place) -> _Place:
        place = replace(place, forced=place.forced[1:], thought=place.thought + (place.part == "wait"))
        if place.forced:
            return place
        return replace(place, part="over") if place.part == "end" else _think(self._budget, place)

    def forced(self) -> list[int]:
        """The tokens that must come next, as `Matcher.forced`."""
        ahead, out = self.fork(), []
        while ahead._place.forced:
            out.append(ahead._place.forced[0])
            ahead.advance(out[-1])
        return out if ahead.leaf() is ahead else out + ahead.leaf().forced()

    def fork(self) -> ThinkingMatcher:
        """A copy that goes its own way."""
        then = None if self._then is None else self._then.fork()
        return ThinkingMatcher(self._budget, self._place, self.vocab_size, self._end_ids, then)

    def leaf(self) -> Matcher:
        """The grammar that follows, once the thinking is over; itself before."""
        return self._then.leaf() if self._place.part == "over" and self._then is not None else self

    @staticmethod
    def fill(matchers: Sequence[ThinkingMatcher]) -> None:
        """Nothing: these masks take no time."""
