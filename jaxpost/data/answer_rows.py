"""Groups of answers in rows: batch k of pairs, rankings or single answers, a pure function of the data, the seed, k.

A row holds whole groups. A group's prompt stands there once, as a segment of its own without its last token, which
leads every answer (the first token of an answer is predicted from it); `prefix_ids` lets answers read the prompt:

  tokens    p_1 .. p_{n-1} | p_n a_1 .. a_s | p_n b_1 .. b_t | the next group ...
  segment   1              | 2              | 3              | 4
  prefix    0              | 1              | 1              | 0
  position  0 .. n-2       | n-1 ..         | n-1 ..         | 0 ..
  group     0              | 1              | 1              |

Without sharing every answer is one segment behind its own copy of the prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from jaxpost.data.answers import AnswerDataset, with_mismatched
from jaxpost.data.groups import Answer
from jaxpost.data.loader import RowSource
from jaxpost.data.packing import Plan, make_plan
from jaxpost.text.messages import DataError
from jaxpost.types import AnswerBatch


class Place(NamedTuple):
    """Where an answer stands: tokens [start:end] of a row of the batch, in segment column `column` of its tables."""

    group: int
    """Number in the data set."""
    answer: int
    """Number in the group."""
    row: int
    """Among this process's rows."""
    column: int
    start: int
    end: int


@dataclass
class AnswerSource(RowSource[AnswerDataset, AnswerBatch]):
    """Batches of groups.

    Attributes:
      share: one copy of a prompt for all answers of its group.
      columns: S, width of the segments' tables; every batch has the same.
      scored: whether batches say where a score is read.
      reference: log-probabilities of each group's answer tokens, one answer after another; None: unknown.
      unweighted: token ids that are read in answers and never trained (formatting).
    """

    share: bool = True
    columns: int = 1
    scored: bool = False
    reference: Sequence[np.ndarray] | None = None
    unweighted: tuple[int, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Changes with anything that would change a batch, but for the reference."""
        parts = (super().fingerprint, self.share, self.columns, self.scored, *self.unweighted)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @property
    def stats(self) -> dict[str, Any]:
        """Counts for logs and reports."""
        return super().stats | {"answers": int(self.dataset.sizes_of_groups.sum())}

    def places(self, k: int) -> list[Place]:
        """Where each answer of batch k stands, by row, group and answer."""
        return [place for row, number in enumerate(self.numbers(k)) for place in self._places(row, int(number))]

    def _places(self, row: int, number: int) -> Iterator[Place]:
        at = column = 0
        for index in self.plan.row(number).tolist():
            group = self.dataset.group(index)
            prompt = len(group.prompt)
            if self.share and prompt > 1:
                at, column = at + prompt - 1, column + 1
            lead = min(prompt, 1) if self.share else prompt
            for n, answer in enumerate(group.answers):
                end = at + lead + len(answer.tokens)
                yield Place(index, n, row, column, at + lead, end)
                at, column = end, column + 1

    def batch(self, k: int) -> AnswerBatch:
        """Batch k: numpy arrays of this process's rows.

        Row r of batch k has row id k * B + r (wrapped to int32), whichever process holds it.
        """
        numbers = self.numbers(k)
        out = _Arrays(len(numbers), self.plan.seq_len, self)
        for row, number in enumerate(numbers):
            out.fill(row, list(self._places(row, int(number))))
        return out.batch(numbers.astype(np.int32))

    def read(self, k: int, values: np.ndarray) -> dict[int, np.ndarray]:
        """Values [B T] of batch k (of this process's rows) by group: one answer's tokens after another's."""
        parts: dict[int, list[np.ndarray]] = {}
        for place in self.places(k):
            parts.setdefault(place.group, []).append(np.asarray(values[place.row, place.start : place.end]))
        return {group: np.concatenate(found) for group, found in parts.items()}

    def with_reference(self, logprobs: Sequence[np.ndarray]) -> AnswerSource:
        """The same batches with the reference's log-probabilities in `ref_logprobs`.

        Args:
          logprobs: of each group of the data set in order, its answers' tokens one answer after another (`read`).
        Raises: DataError where a group has another number of tokens.
        """
        if len(logprobs) != len(self.dataset):
            raise DataError(f"log-probabilities of {len(logprobs)} groups for a data set of {len(self.dataset)}")
        for index, values in enumerate(logprobs):
            tokens = sum(len(answer.tokens) for answer in self.dataset.group(index).answers)
            if len(values) != tokens:
                raise DataError(f"group {index} has {tokens} answer tokens, but {len(values)} log-probabilities")
        return replace(self, reference=logprobs)


class _Arrays:
    """The arrays of a batch, as they are filled."""

    def __init__(self, rows: int, width: int, source: AnswerSource):
        self.source = source
        self.tokens = np.full((rows, width), source.pad_id, np.int32)
        self.positions, self.segments, self.prefixes = np.zeros((3, rows, width), np.int32)
        self.weights, self.marks, self.reference = np.zeros((3, rows, width), np.float32)
        objectives = source.dataset.options.objectives if source.dataset.kind == "scores" else ()
        self.labels = np.zeros((rows, width, *([len(objectives)] if objectives else [])), np.float32)
        self.groups, self.ranks = np.zeros((2, rows, source.columns), np.int32)
        self.strengths = np.zeros((rows, source.columns), np.float32)

    def fill(self, row: int, places: Sequence[Place]) -> None:
        """Writes the groups of a row."""
        count = begin = done = 0
        for place in places:
            group, share = self.source.dataset.group(place.group), self.source.share
            head = len(group.prompt) - 1 if share and len(group.prompt) > 1 else 0
            if place.answer == 0:
                count += 1
                begin, done = place.column if head else 0, 0  # the segment before the first answer's is the prompt's
                if head:
                    self.segment(row, place.start - 1 - head, group.prompt[:-1], 0, place.column)
            answer = group.answers[place.answer]
            lead = group.prompt[head:]
            self.segment(row, place.start - len(lead), np.concatenate([lead, answer.tokens]), head, place.column + 1)
            self.prefixes[row, place.start - len(lead) : place.end] = begin
            self.answer(row, place, answer)
            self.groups[row, place.column] = count
            self.ranks[row, place.column] = answer.rank
            self.strengths[row, place.column] = group.strength
            if self.source.reference is not None:
                size = len(answer.tokens)
                self.reference[row, place.start : place.end] = self.source.reference[place.group][done : done + size]
                done += size

    def segment(self, row: int, start: int, tokens: np.ndarray, first: int, number: int) -> None:
        """Writes a segment whose first token has position `first`."""
        end = start + len(tokens)
        self.tokens[row, start:end] = tokens
        self.positions[row, start:end] = np.arange(first, first + len(tokens))
        self.segments[row, start:end] = number

    def answer(self, row: int, place: Place, answer: Answer) -> None:
        """Writes what is known of an answer's tokens."""
        span = slice(place.start, place.end)
        self.weights[row, span] = np.where(np.isin(answer.tokens, self.source.unweighted), 0.0, answer.weights)
        if answer.marks is not None and answer.labels is not None:
            self.marks[row, span], self.labels[row, span] = answer.marks, answer.labels
        elif answer.rank >= 0:
            self.marks[row, place.end - 1] = 1.0
            self.labels[row, place.end - 1] = float(self.source.dataset.kind == "unpaired" and answer.rank == 0)

    def batch(self, row_ids: np.ndarray) -> AnswerBatch:
        """The batch, without the arrays that say nothing here."""
        source = self.source
        labelled = source.scored and source.dataset.kind in ("unpaired", "scores", "steps")
        arrays: dict[str, Any] = {
            "tokens": self.tokens,
            "positions": self.positions,
            "segment_ids": self.segments,
            "weights": self.weights,
            "row_ids": row_ids,
            "groups": self.groups,
            "ranks": self.ranks,
            "strengths": self.strengths,
            "marks": self.marks if source.scored else None,
            "labels": self.labels if labelled else None,
            "ref_logprobs": self.reference if source.reference is not None else None,
            "prefix_ids": self.prefixes if source.share else None,
        }
        return AnswerBatch(**arrays)


def most_segments(plan: Plan, segments: np.ndarray) -> int:
    """Most segments of any row of a plan, in any epoch; `segments` [groups], of each.

    Groups of equal length change places from epoch to epoch, so the most of each length counts. A mixture's epochs
    differ in their lengths too: there it is the most that any choice of groups makes of one row.
    """
    most = np.zeros(plan.seq_len + 1, np.int64)
    np.maximum.at(most, plan.lengths, segments)
    if plan.shares is None:
        return max(int(most[plan.lengths[row]].sum()) for row in plan.epoch(0))
    if not plan.packing:
        return int(most.max())
    best = np.zeros(plan.seq_len + 1, np.int64)
    used = np.flatnonzero(most)
    for size in range(1, plan.seq_len + 1):
        fitting = used[used <= size]
        best[size] = max(int((best[size - fitting] + most[fitting]).max(initial=0)), best[size - 1])
    return int(best[-1])


def make_answer_source(
    dataset: AnswerDataset,
    *,
    seq_len: int,
    batch_size: int,
    share_prompts: bool = True,
    packing: bool = True,
    seed: int = 0,
    endless: bool = True,
    pad_id: int = 0,
    rows: Sequence[int] | np.ndarray | None = None,
    prefetch: int = 4,
    mismatched: bool = False,
    scored: bool | None = None,
    unweighted: Sequence[int] = (),
) -> AnswerSource:
    """Plans a data set of groups and reads it: `endless` True for training, False for one ordered pass of evaluation.

    Args:
      seq_len: tokens of a row; groups were fitted to the one they were prepared with.
      batch_size: rows of a batch, over all processes. A row holds as many whole groups as fit, or one.
      share_prompts: one copy of a prompt for all answers of a group.
      packing: as many groups in a row as fit, or one.
      mismatched: every group gets an answer of another one, of rank -1 (`with_mismatched`).
      unweighted: token ids that are read in answers and never trained.
      scored: whether batches have `marks` (and `labels`, but for pairs and rankings); None: for scores and steps.
    Raises: DataError where a group does not fit a row.
    """
    if mismatched:
        dataset = with_mismatched(dataset, seed=seed)
    lengths = dataset.costs(share_prompts)
    if lengths.max() > seq_len:
        raise DataError(
            f"a group takes {lengths.max()} tokens of a row of {seq_len}: prepare the rows with this seq_len and "
            f"share_prompts={share_prompts}"
        )
    plan = make_plan(
        lengths,
        seq_len=seq_len,
        batch_size=batch_size,
        packing=packing,
        seed=seed,
        endless=endless,
        starts=dataset.starts,
        shares=dataset.shares,
    )
    segments = dataset.sizes_of_groups + (1 if share_prompts else 0)
    return AnswerSource(
        dataset,
        plan,
        pad_id,
        rows,
        prefetch,
        share=share_prompts,
        columns=most_segments(plan, segments),
        scored=dataset.kind in ("scores", "steps") if scored is None else scored,
        unweighted=tuple(sorted(unweighted)),
    )
