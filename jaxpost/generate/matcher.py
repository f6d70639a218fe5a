"""The face of an automaton that says, on the host, which tokens a row may write next; and masks, one bit a token.

Grammars (`generate.grammar`) and thinking budgets (`generate.thinking`) have it, so that one hands over to the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt32

Bits = UInt32[np.ndarray, " W"]
"""A mask of the vocabulary: bit t % 32 of word t // 32 is token t's."""


@runtime_checkable
class Matcher(Protocol):
    """The automaton of one row, on the host. Where it stands is a pure function of the tokens that it took."""

    vocab_size: int

    @property
    def finished(self) -> bool:
        """Nothing but an end token may follow, or one came."""
        ...

    @property
    def problem(self) -> str | None:
        """Why the row cannot go on as it should; its mask then holds end tokens only. None while all is well."""
        ...

    def mask(self) -> Bits:
        """Tokens allowed next: bit t % 32 of word t // 32. Not to be written to; never empty."""
        ...

    def advance(self, token: int) -> bool:
        """Takes the row's next token. False where it is refused, and then it must not become the row's next token."""
        ...

    def forced(self) -> list[int]:
        """The tokens that must come next, while there is only one that may; a long run comes in parts."""
        ...

    def fork(self) -> Matcher:
        """A copy that goes its own way."""
        ...

    def leaf(self) -> Matcher:
        """The matcher whose mask counts now: itself, or one that it handed over to."""
        ...

    @staticmethod
    def fill(matchers: Sequence[Any]) -> None:
        """Makes ready the masks of many matchers of this class, where that is quicker than one by one."""
        ...


def words(vocab_size: int) -> int:
    """32-bit words of a mask: ceil(V / 32)."""
    return -(-vocab_size // 32)


def all_but(vocab_size: int, banned: Sequence[int] = ()) -> Bits:
    """The mask of every token but some; bits past the vocabulary are 0."""
    bits = np.full(words(vocab_size), 0xFFFFFFFF, np.uint32)
    if vocab_size % 32:
        bits[-1] = (1 << vocab_size % 32) - 1
    return bits & ~only(vocab_size, banned)


def only(vocab_size: int, tokens: Sequence[int]) -> Bits:
    """The mask of some tokens.

    Example:
      >>> only(40, [0, 33]).tolist()
      [1, 2]
    """
    bits = np.zeros(words(vocab_size), np.uint32)
    for token in tokens:
        bits[token // 32] |= np.uint32(1 << token % 32)
    return bits


def has(bits: Bits, token: int) -> bool:
    """Whether a mask allows a token; never one outside it."""
    return 0 <= token < 32 * len(bits) and bool(bits[token // 32] >> np.uint32(token % 32) & np.uint32(1))


def tokens_of(bits: Bits) -> list[int]:
    """The token ids that a mask allows, ascending."""
    little = np.ascontiguousarray(bits, "<u4").view(np.uint8)
    return np.flatnonzero(np.unpackbits(little, bitorder="little")).tolist()


def masks(matchers: Sequence[Matcher | None], vocab_size: int) -> UInt32[np.ndarray, "B W"]:
    """The masks of a batch; None is a row that may write anything.

    Returns:
      [B, ceil(V / 32)] uint32: bit t % 32 of word t // 32 says whether token t may come next.

    Example:
      >>> masks([None], 33).tolist()
      [[4294967295, 1]]
    """
    out = np.tile(all_but(vocab_size), (len(matchers), 1))
    leaves = [matcher.leaf() for matcher in matchers if matcher is not None]
    for kind in {type(leaf) for leaf in leaves}:
        kind.fill([leaf for leaf in leaves if type(leaf) is kind])
    for row, matcher in enumerate(matchers):
        if matcher is not None:
            out[row] = matcher.mask()
    return out
