"""Judged rows as groups of answers in tokens, cached on disk: pairs, rankings, unpaired answers, scores, steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from jaxpost.config import AnswerDataSection, SourceSection
from jaxpost.data.cache import Progress, SourceStats, prepare_sources
from jaxpost.data.dataset import Numbered
from jaxpost.data.groups import Answer, AnswerOptions, Group, Kind
from jaxpost.text.messages import DataError
from jaxpost.text.tokenizer import Tokenizer

MISMATCHED = -1
"""Rank of an answer to another prompt."""


@dataclass
class AnswerDataset(Numbered):
    """All sources' groups, numbered 0 .. len - 1 through the sources in order.

    Lists have an entry for each source. A part is a prompt or an answer; a group's parts stand together, its prompt
    first.
    """

    tokens: list[np.ndarray]
    """int32, parts one after another."""
    weights: list[np.ndarray]
    """float32, 1 on an answer's tokens as targets."""
    marks: list[np.ndarray] | None
    """float32, 1 where a score is read; None: at the last token of each answer."""
    labels: list[np.ndarray] | None
    offsets: list[np.ndarray]
    """int64 [parts + 1]."""
    first: list[np.ndarray]
    """int64 [groups + 1]: the part that is each group's prompt."""
    ranks: list[np.ndarray]
    """int32 [parts]; -2: a prompt."""
    strengths: np.ndarray
    """float32 [groups], of all sources."""
    subsets: np.ndarray
    """Names [groups], of all sources; "" where the rows name none."""
    options: AnswerOptions
    shares: tuple[float, ...] | None
    """Relative weights of the sources; None: by size."""
    stats: list[SourceStats]
    fingerprint: str
    partners: np.ndarray | None = None
    """int64 [groups]: the group whose first answer each group also has, as a mismatched one; None: nobody's."""

    def __post_init__(self) -> None:
        self.number([len(first) - 1 for first in self.first])

    @property
    def kind(self) -> Kind:
        """What the rows were read as."""
        return self.options.kind

    @property
    def lengths(self) -> np.ndarray:
        """int32 [groups]: tokens of a row that each group takes."""
        return self.costs(self.options.share_prompts)

    def costs(self, share: bool) -> np.ndarray:
        """int32 [groups]: tokens of a row that each group takes, its prompt shared by its answers or not."""
        if self.partners is not None:
            return np.array([self.group(i).cost(share) for i in range(len(self))], np.int32)
        out = []
        for offsets, first in zip(self.offsets, self.first, strict=True):
            prompts = np.diff(offsets)[first[:-1]]
            total, answers = np.diff(offsets[first]), np.diff(first) - 1
            once = np.where(prompts > 0, total - 1 + answers, total)
            out.append(once if share else total + prompts * (answers - 1))
        return np.concatenate(out).astype(np.int32)

    @property
    def sizes_of_groups(self) -> np.ndarray:
        """int64 [groups]: answers of each."""
        return np.concatenate([np.diff(first) - 1 for first in self.first]) + (self.partners is not None)

    def group(self, index: int) -> Group:
        """A group by number."""
        group = self._own(index)
        if self.partners is None:
            return group
        other = self._own(int(self.partners[index])).answers[0]
        return _with_answer(group, Answer(other.tokens, other.weights, MISMATCHED), self.options)

    def _own(self, index: int) -> Group:
        source, local = self.locate(index)
        begin, end = self.first[source][local : local + 2]
        bounds, ranks = self.offsets[source][begin : end + 1], self.ranks[source]
        tokens, weights = self.tokens[source], self.weights[source]
        answers = tuple(
            Answer(
                tokens[start:stop],
                weights[start:stop],
                int(ranks[begin + 1 + n]),
                None if self.marks is None else self.marks[source][start:stop],
                None if self.labels is None else self.labels[source][start:stop],
            )
            for n, (start, stop) in enumerate(pairwise(bounds[1:]))
        )
        return Group(tokens[bounds[0] : bounds[1]], answers, float(self.strengths[index]), str(self.subsets[index]))


def _with_answer(group: Group, answer: Answer, options: AnswerOptions) -> Group:
    """The group with one more answer, of which as much is kept as the row has room for."""
    room = options.seq_len - group.cost(options.share_prompts)
    room -= (0 if group.prompt.size == 0 else 1) if options.share_prompts else len(group.prompt)
    most = max(0, min(room, options.max_length - len(group.prompt)))
    short = answer._replace(tokens=answer.tokens[:most], weights=answer.weights[:most])
    return group._replace(answers=(*group.answers, short)) if most and short.weights.any() else group


def with_mismatched(dataset: AnswerDataset, *, seed: int = 0) -> AnswerDataset:
    """Gives every group one more answer, of rank -1, that was written to another prompt (KTO's baseline, 2402.01306).

    Whose answer it is does not depend on the batch, so that reference log-probabilities of it can be kept: the groups
    stand in a circle, shuffled by `seed`, and each takes the first answer of the next that has another prompt.

    Raises: DataError where all groups have one prompt.
    """
    count = len(dataset)
    prompts = [dataset.group(i).prompt.tobytes() for i in range(count)]
    if len(set(prompts)) < 2:
        raise DataError("every row has the same prompt, so no answer belongs to another one")
    order = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 5]))).permutation(count)
    partners = np.zeros(count, np.int64)
    for place, index in enumerate(order):
        step = 1
        while prompts[order[(place + step) % count]] == prompts[index]:
            step += 1
        partners[index] = order[(place + step) % count]
    return replace(dataset, partners=partners, fingerprint=f"{dataset.fingerprint}+mismatched {seed}")


def answer_options(section: AnswerDataSection, kind: Kind, *, share_prompts: bool = True) -> AnswerOptions:
    """The part of a data section that decides a group's tokens.

    Raises: DataError for a mask that says nothing of answers.
    """
    if section.mask not in ("assistant", "completion"):
        raise DataError(
            f"data.mask is {section.mask}; answers are judged as wholes: use assistant (plain texts are shown as chat "
            "turns) or completion (plain texts as they are)"
        )
    return AnswerOptions(
        kind=kind,
        mask=section.mask,
        seq_len=section.seq_len,
        max_length=section.seq_len if section.max_length is None else section.max_length,
        share_prompts=share_prompts,
        on_long_row=section.on_long_row,
        cut=section.cut,
        system_prompt=section.system_prompt,
        on_tie=section.on_tie,
        grades=tuple(section.grades.items()),
        pairs_of_rankings=section.pairs_of_rankings,
        good_score=section.good_score,
        objectives=section.objectives,
        step_separator=section.step_separator,
        step_mark=section.step_mark,
        step_labels=section.step_labels,
        after_error=section.after_error,
    )


def prepare_answers(
    section: AnswerDataSection,
    sources: Sequence[SourceSection],
    tokenizer: Tokenizer,
    *,
    kind: Kind,
    cache_dir: str | Path,
    share_prompts: bool = True,
    report: Callable[[Progress], None] | None = None,
    rejected: str | Path | None = None,
) -> AnswerDataset:
    """Tokenises judged rows, or reads them back from the cache.

    Args:
      section: window, what is cut, policies for bad rows, long rows and ties, grades, steps.
      sources: what to read (`section.train` or `section.eval`).
      kind: what the rows are read as (see `data.groups`).
      cache_dir: where token files are kept.
      share_prompts: whether batches have one copy of a prompt for all answers of a group, so that more fits a row.
      report: called about twice a second while rows are tokenised.
      rejected: file (JSON lines) that the rows left out as bad are written to; not made where there are none.
    Raises: DataError or FileNotFoundError, naming the file, the row and what to do.
    """
    options = answer_options(section, kind, share_prompts=share_prompts)
    prepared = prepare_sources(
        section, sources, tokenizer, options, cache_dir=cache_dir, report=report, rejected=rejected
    )
    labelled = kind in ("scores", "steps")
    return AnswerDataset(
        tokens=prepared.load("tokens", mapped=True),
        weights=prepared.load("weights", mapped=True),
        marks=prepared.load("marks", mapped=True) if labelled else None,
        labels=prepared.load("labels", mapped=True) if labelled else None,
        offsets=prepared.load("offsets"),
        first=prepared.load("first"),
        ranks=prepared.load("ranks"),
        strengths=np.concatenate(prepared.load("strengths")),
        subsets=np.concatenate(prepared.load("subsets")),
        options=options,
        shares=prepared.shares,
        stats=prepared.stats,
        fingerprint=prepared.fingerprint,
    )
