"""Scores of given sequences by a head on a model: many answers at once, in rows of few lengths.

Sequences are sorted into buckets of equal row length (so few programs are compiled, and a row is at least two thirds
full but for the shortest), run forward once, and read at the places asked for. Nothing is decoded or encoded here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxpost import sharding
from jaxpost.types import Inputs, Model, Params

Head = Callable[[Params, Float[Array, "*B D"]], Float[Array, "*B K"]]
"""(all params, hidden states) -> scores."""
Tokens = Sequence[int] | np.ndarray
_SHORTEST = 16


def bucket(count: int, least: int = 1) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24 ... times `least` that is not below `count`.

    >>> [bucket(n, 16) for n in (1, 17, 33, 49, 65)]
    [16, 32, 48, 64, 96]
    """
    size = least
    while size < count:
        half = size + size // 2
        if size > least and half >= count:
            return half
        size *= 2
    return size


class Scorer:
    """scorer(params, sequences, places) -> for each sequence a float32 array [its places, K].

    Args:
      model: below the head.
      head: reads K scores off hidden states, given all params.
      mesh: rows are dealt over its data and fsdp axes; None: no mesh.
      tokens: most tokens of a batch.
      pad_id: fills rows.

    Example:
      >>> from jaxpost.types import Outputs
      >>> double = lambda params, inputs: Outputs((2 * inputs.tokens[..., None]).astype(jnp.float32))
      >>> doubled = Model(None, (), None, double, None, None)
      >>> scorer = Scorer(doubled, lambda params, hidden: hidden)
      >>> [x.tolist() for x in scorer({"policy": ()}, [[1, 2, 3], [4]], [[0, 2], [0]])]
      [[[2.0], [6.0]], [[8.0]]]
    """

    def __init__(self, model: Model, head: Head, *, mesh: Mesh | None = None, tokens: int = 16_384, pad_id: int = 0):
        self.mesh, self.tokens, self.pad_id = mesh, tokens, pad_id

        def read(params: Params, inputs: Inputs, at: Int[Array, "B M"]) -> Array:
            hidden = model.forward(params["policy"], inputs).hidden
            return head(params, jnp.take_along_axis(hidden, at[:, :, None], axis=1))

        self._read = jax.jit(read, out_shardings=None if mesh is None else sharding.replicated(mesh))

    def __call__(
        self, params: Params, sequences: Sequence[Tokens], places: Sequence[Sequence[int]]
    ) -> list[np.ndarray]:
        """Scores in the order of the sequences."""
        out: list[Any] = [None] * len(sequences)
        for index, scores in self.stream(params, sequences, places):
            out[index] = scores
        return out

    def stream(
        self, params: Params, sequences: Sequence[Tokens], places: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, np.ndarray]]:
        """(number of the sequence, its scores), batch by batch, the longest first: what fits once fits to the end.

        Args:
          params: {"policy": the model's, and what the head reads}.
          sequences: tokens, at least one each.
          places: indices of the tokens after which scores are read, at least one each.
        """
        sizes: dict[int, list[int]] = {}
        for i, sequence in enumerate(sequences):
            if not len(sequence) or not len(places[i]):
                raise ValueError(f"sequence {i} has {len(sequence)} tokens and {len(places[i])} places to score")
            sizes.setdefault(bucket(len(sequence), _SHORTEST), []).append(i)
        for length in sorted(sizes, reverse=True):
            each = max(1, self.tokens // length)
            for start in range(0, len(sizes[length]), each):
                yield from self._batch(params, sizes[length][start : start + each], sequences, places, length)

    def _batch(self, params: Params, numbers: list[int], sequences: Any, places: Any, length: int) -> Iterator[Any]:
        """One forward pass over rows of one length."""
        shards = sharding.row_shards(self.mesh)
        rows = -(-bucket(len(numbers)) // shards) * shards
        wide = bucket(max(len(places[i]) for i in numbers))
        tokens, at = np.full((rows, length), self.pad_id, np.int32), np.zeros((rows, wide), np.int32)
        segments = np.zeros((rows, length), np.int32)
        for row, i in enumerate(numbers):
            tokens[row, : len(sequences[i])], segments[row, : len(sequences[i])] = sequences[i], 1
            at[row, : len(places[i])] = places[i]
        positions = np.where(segments > 0, np.arange(length, dtype=np.int32), 0).astype(np.int32)
        parts: Any = (tokens, positions, segments)
        arrays: Any = (Inputs(*parts), at)
        arrays = jax.device_put(arrays) if self.mesh is None else sharding.spread(arrays, self.mesh)
        found = np.asarray(jax.device_get(self._read(params, *arrays)), np.float32)
        for row, i in enumerate(numbers):
            yield i, found[row, : len(places[i])]
