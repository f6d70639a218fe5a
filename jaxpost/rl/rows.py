"""Packs groups of samples into rows for the learner, with one copy of each prompt for all its samples.

A row of one group, prompt p_1 .. p_n and samples a, b:

  tokens    p_1 .. p_{n-1} | p_n a_1 .. a_s | p_n b_1 .. b_t | padding
  segment   1              | 2              | 3              | 0
  prefix    0              | 1              | 1              | 0
  position  0 .. n-2       | n-1 ..         | n-1 ..         | 0

The prompt's last token stands in front of every sample because the first token of a sample is predicted from it. So
G samples of T tokens cost n + G (T + 1) tokens and not G (n + T).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxpost.types import RolloutBatch


class Place(NamedTuple):
    """Where a sample's first token stands."""

    row: int
    start: int


@dataclass(frozen=True)
class RowPlan:
    """Shapes that every batch of a run has, so that one program learns from all of them."""

    tokens: int
    """Length of a row."""
    rows: int
    """Of a batch; a multiple of `pieces`."""
    pieces: int
    """Microbatches; rows are dealt so that as few of them as possible hold anything."""
    share: bool
    """One copy of a prompt for all its samples."""

    @classmethod
    def make(
        cls,
        *,
        groups: int,
        samples: int,
        prompt: int,
        answer: int,
        row_tokens: int | None = None,
        piece_rows: int = 1,
        share: bool = True,
        multiple: int = 8,
    ) -> RowPlan:
        """Rows for any `groups` groups of `samples` samples.

        Args:
          prompt, answer: most tokens of each.
          row_tokens: length of a row; None: what one whole group needs at most, or one sample if not shared.
          piece_rows: rows of a microbatch, over all devices.
          multiple: of what a row's length is a multiple.

        Raises:
          ValueError: a sample does not fit a row.

        Example:
          >>> RowPlan.make(groups=8, samples=8, prompt=40, answer=12, piece_rows=2)
          RowPlan(tokens=144, rows=8, pieces=4, share=True)
        """
        least = prompt + answer
        wanted = row_tokens if row_tokens is not None else (prompt - 1 + samples * (1 + answer) if share else least)
        if wanted < least:
            need = f"a prompt of {prompt} tokens and an answer of {answer} need {least}"
            raise ValueError(f"learner.row_tokens is {wanted}, but {need}")
        tokens = -(-wanted // multiple) * multiple
        each = (tokens - (prompt - 1)) // (1 + answer) if share else 1
        rows = groups * -(-samples // min(each, samples))
        pieces = -(-rows // piece_rows)
        return cls(tokens, pieces * piece_rows, pieces, share)


@dataclass(frozen=True)
class Packed:
    """Rows, and where each sample went."""

    batch: RolloutBatch
    places: tuple[Place, ...]
    plan: RowPlan

    def spread(self, values: np.ndarray) -> np.ndarray:
        """[N, T] per sample and token of its answer -> [B, R]."""
        out = np.zeros((self.plan.rows, self.plan.tokens), np.float32)
        for (row, start), value in zip(self.places, values, strict=True):
            end = min(start + values.shape[1], self.plan.tokens)
            out[row, start:end] = np.where(self.owned(row, start, end), value[: end - start], out[row, start:end])
        return out

    def owned(self, row: int, start: int, end: int) -> np.ndarray:
        """Which places of a row belong to the sample that starts at `start`."""
        segments = np.asarray(self.batch.segment_ids[row])
        return segments[start:end] == segments[start]

    def gather(self, values: np.ndarray, length: int) -> np.ndarray:
        """The inverse of `spread`: [B, R] -> [N, length], 0 behind a sample's end."""
        out = np.zeros((len(self.places), length), np.float32)
        for i, (row, start) in enumerate(self.places):
            end = min(start + length, self.plan.tokens)
            out[i, : end - start] = np.where(self.owned(row, start, end), values[row, start:end], 0.0)
        return out


class Answer(NamedTuple):
    """What packing needs of a sample."""

    prompt: Sequence[int]
    tokens: Sequence[int]
    weights: Sequence[float] | np.ndarray
    """Loss weight of each token."""


def pack(groups: Sequence[Sequence[Answer]], plan: RowPlan, *, pad_id: int = 0) -> Packed:
    """Packs groups first-fit, in their order; places are in order of group and sample.

    Args:
      groups: samples that share a prompt.

    Returns: a batch of NumPy arrays whose advantages are 0.

    Raises:
      ValueError: they need more rows than the plan has, or a sample is longer than a row.
    """
    rows = _Rows(plan, pad_id)
    places = [place for group in groups for place in rows.add(group)]
    return Packed(rows.batch(), tuple(places), plan)


class _Rows:
    """Rows that fill up."""

    def __init__(self, plan: RowPlan, pad_id: int):
        self.plan = plan
        shape = (plan.rows, plan.tokens)
        self.tokens = np.full(shape, pad_id, np.int32)
        self.positions, self.segments, self.prefixes = (np.zeros(shape, np.int32) for _ in range(3))
        self.weights = np.zeros(shape, np.float32)
        self.used = [0] * plan.rows
        self.last = [0] * plan.rows
        # The k-th row to be filled: microbatch j of M holds the rows j, j + M, ...
        each = plan.rows // plan.pieces
        self.order = [slot * plan.pieces + piece for piece in range(plan.pieces) for slot in range(each)]

    def add(self, group: Sequence[Answer]) -> list[Place]:
        """Places one group, in as few parts as its length allows."""
        places: list[Place] = []
        part: list[Answer] = []
        for answer in group:
            if part and (self.cost([*part, answer]) > self.plan.tokens or not self.plan.share):
                places += self.put(part)
                part = []
            part.append(answer)
        return places + (self.put(part) if part else [])

    def cost(self, part: Sequence[Answer]) -> int:
        """Tokens of samples that stand together."""
        if not self.plan.share:
            return sum(len(a.prompt) + len(a.tokens) for a in part)
        return len(part[0].prompt) - 1 + sum(1 + len(a.tokens) for a in part)

    def put(self, part: Sequence[Answer]) -> list[Place]:
        """Places samples of one prompt in the first row with room."""
        cost = self.cost(part)
        if cost > self.plan.tokens:
            prompt, answer = len(part[0].prompt), len(part[0].tokens)
            raise ValueError(
                f"a prompt of {prompt} tokens with an answer of {answer} does not fit a row of {self.plan.tokens}: "
                "raise learner.row_tokens"
            )
        row = next((r for r in self.order if self.used[r] + cost <= self.plan.tokens), None)
        if row is None:
            raise ValueError(f"{self.plan.rows} rows of {self.plan.tokens} tokens do not hold these groups")
        if not self.plan.share:
            return [self._segment(row, [*a.prompt, *a.tokens], 0, np.asarray(a.weights), 0) for a in part]
        head, prefix = part[0].prompt[:-1], 0
        if len(head):
            self._segment(row, head, 0, np.zeros(0), 0)
            prefix = self.last[row]
        first = len(head)
        return [self._segment(row, [*a.prompt[-1:], *a.tokens], first, np.asarray(a.weights), prefix) for a in part]

    def _segment(self, row: int, tokens: Sequence[int], first: int, weights: np.ndarray, prefix: int) -> Place:
        start, end = self.used[row], self.used[row] + len(tokens)
        self.last[row] += 1
        self.tokens[row, start:end] = tokens
        self.positions[row, start:end] = np.arange(first, first + len(tokens))
        self.segments[row, start:end] = self.last[row]
        self.prefixes[row, start:end] = prefix
        self.weights[row, end - len(weights) : end] = weights
        self.used[row] = end
        return Place(row, end - len(weights))

    def batch(self) -> RolloutBatch:
        arrays: dict[str, Any] = {
            "tokens": self.tokens,
            "positions": self.positions,
            "segment_ids": self.segments,
            "weights": self.weights,
            "row_ids": np.arange(self.plan.rows, dtype=np.int32),
            "advantages": np.zeros_like(self.weights),
            "prefix_ids": self.prefixes if self.plan.share else None,
        }
        return RolloutBatch(**arrays)
