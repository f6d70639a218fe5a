"""Guesses of a row's next tokens from its own text, for decoding several tokens a pass without changing any.

A token is a function of logits, parameters, history and the number of its position, so a guess is right exactly where
that function, computed for all guesses in one pass, gives the guess: the text is the one that single steps write.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Lookup(NamedTuple):
    """Prompt lookup: the tokens that followed the last tokens where they stood before (arXiv:2304.04487).

    Attributes:
        tokens: guesses a pass.
        shortest, longest: how many last tokens must have stood before, and how many are compared.
    """

    tokens: int
    shortest: int = 2
    longest: int = 4

    def check(self) -> Lookup:
        """Itself.

        Raises:
            ValueError: numbers that make no sense, named.
        """
        if self.tokens < 1:
            raise ValueError(f"a lookup of {self.tokens} tokens guesses nothing: tokens must be at least 1")
        if not 1 <= self.shortest <= self.longest:
            raise ValueError(
                f"a lookup compares between shortest={self.shortest} and longest={self.longest} last tokens; these "
                "must be 1 <= shortest <= longest"
            )
        return self


def look_up(
    tokens: Int[Array, "B S"], lengths: Int[Array, " B"], lookup: Lookup
) -> tuple[Int[Array, "B K"], Bool[Array, " B"]]:
    """What followed the longest run of last tokens that stood before, of equally long ones the latest.

    With e the place after that earlier run and n = length, the guess of place n + i is tokens[e + i mod (n - e)]: where
    the earlier text ends it is taken to repeat.

    Returns:
        K guesses a row, and the rows in which `shortest` last tokens stood before; the others' guesses mean nothing.

    Example:
        >>> text = jnp.asarray([[5, 1, 2, 3, 4, 1, 2, 0, 0]])
        >>> guesses, found = look_up(text, jnp.asarray([7]), Lookup(tokens=3))
        >>> guesses.tolist(), found.tolist()
        ([[3, 4, 1]], [True])
    """
    width = tokens.shape[1]
    place = jnp.arange(width, dtype=jnp.int32)
    run = (place >= 1) & (place < lengths[:, None])
    same = jnp.zeros(tokens.shape, jnp.int32)
    for j in range(1, min(lookup.longest, width) + 1):
        recent = jnp.take_along_axis(tokens, jnp.maximum(lengths - j, 0)[:, None], axis=1)
        run = run & (place >= j) & (jnp.roll(tokens, j, axis=1) == recent)
        same = same + run.astype(jnp.int32)
    best = jnp.max(jnp.where(same >= lookup.shortest, same * width + place, -1), axis=1)
    start = jnp.maximum(best, 0) % width
    ahead = jnp.arange(lookup.tokens, dtype=jnp.int32) % jnp.maximum(lengths - start, 1)[:, None]
    return jnp.take_along_axis(tokens, start[:, None] + ahead, axis=1, mode="clip"), best >= 0
