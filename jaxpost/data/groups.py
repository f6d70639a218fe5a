"""Judged examples become groups of answers in tokens: one prompt, its answers, and what is known of each.

An answer's text is that of a prompt_completion row, so tokens and weights are those of supervised fine-tuning; the
group's prompt is what the tokens of all its answers begin with, before any of them is trained. What an example gives,
by kind of data:

    pairs      preference: one pair; ranking: pairs of its answers (`pairs_of_rankings`)
    rankings   ranking, or a preference as a ranking of two
    unpaired   an answer each: unpaired_preference, both sides of a preference, scored answers by `good_score`
    scores     scored and unpaired_preference: one answer; ranking with scores: all its answers
    steps      stepwise: one answer with a label for each judged step
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

from jaxpost.data.encode import EncodeOptions, Pieced, to_pieces, weighted_tokens
from jaxpost.data.formats import Example, PromptCompletion
from jaxpost.data.judged import (
    JUDGED,
    Judged,
    Preference,
    Ranking,
    Scored,
    Stepwise,
    UnpairedPreference,
    strength_of,
)
from jaxpost.data.steps import Step, step_pieces
from jaxpost.data.texts import Text, same_kind
from jaxpost.data.window import fit, group_cost
from jaxpost.text.messages import DataError, Message
from jaxpost.text.tokenizer import Tokenizer

Kind = Literal["pairs", "unpaired", "rankings", "scores", "steps"]


class Answer(NamedTuple):
    """One answer: tokens int32 [n], weights float32 [n] as targets, its place in the group.

    `marks` and `labels`, float32 [n]: where a score is read, and what it should say, of several objectives [n, M];
    None where nothing of it is given (pairs, rankings, unpaired answers).
    """

    tokens: np.ndarray
    weights: np.ndarray
    rank: int
    marks: np.ndarray | None = None
    labels: np.ndarray | None = None


class Group(NamedTuple):
    """Answers to one prompt. `strength`: what the group's order is worth; `cut`: tokens beyond the window."""

    prompt: np.ndarray
    answers: tuple[Answer, ...]
    strength: float = 1.0
    subset: str = ""
    cut: int = 0

    def cost(self, share: bool) -> int:
        """Tokens of a row that the group takes."""
        return group_cost(len(self.prompt), [len(a.tokens) for a in self.answers], share)


class AnswerText(NamedTuple):
    """An answer with its prompt in pieces of text; `score` is its label, `steps` its labelled pieces."""

    pieced: Pieced
    rank: int
    score: float | tuple[float, ...] | None = None
    steps: tuple[Step, ...] = ()


class GroupText(NamedTuple):
    """A group before it is tokenised."""

    answers: tuple[AnswerText, ...]
    strength: float
    subset: str


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """What decides a group's tokens, beside the tokenizer (`data.encode.Coding`)."""

    kind: Kind
    mask: str
    seq_len: int
    max_length: int
    share_prompts: bool
    on_long_row: str
    cut: str
    system_prompt: str | None
    on_tie: str
    grades: tuple[tuple[str, float], ...]
    pairs_of_rankings: str
    good_score: float | None
    objectives: tuple[str, ...]
    step_separator: str
    step_mark: str
    step_labels: str
    after_error: str

    def split(self, example: Example, tokenizer: Tokenizer, notes: Counter[str]) -> list[GroupText | str]:
        """The groups of an example; a str is why one is left out.

        Raises: DataError where the example says nothing of this kind.
        """
        if not isinstance(example, JUDGED):
            name = type(example).__name__
            raise DataError(f"a {name} row does not say how good an answer is; {self.kind} are needed", kind="format")
        return list(_SPLIT[self.kind](self, example, tokenizer, notes))

    def encode(self, items: Sequence[GroupText], tokenizer: Tokenizer) -> list[Group | DataError | str]:
        """Tokens of each group, an error, or why it is dropped."""
        flat = weighted_tokens([answer.pieced for item in items for answer in item.answers], tokenizer)
        return [self._group(item, [next(flat) for _ in item.answers]) for item in items]

    def _group(self, item: GroupText, encoded: list[tuple[np.ndarray, ...]]) -> Group | DataError | str:
        whole = []
        for answer, (tokens, weights, owner) in zip(item.answers, encoded, strict=True):
            try:
                marks, labels = _marks(answer, owner)
            except DataError as error:
                return error
            weights[:1] = 0.0
            trained = np.flatnonzero(weights)
            if trained.size == 0:
                return DataError("nothing of an answer is trained (every token's weight is 0)", kind="empty_mask")
            end = trained[-1] + 1  # a template's text behind the last turn is no part of the answer
            whole.append((tokens[:end], weights[:end], marks[:end], labels[:end]))
        for i in range(len(whole)):
            for j in range(i):
                if item.answers[i].rank != item.answers[j].rank and np.array_equal(whole[i][0], whole[j][0]):
                    return DataError("two answers are identical in tokens, so neither is better", kind="identical")
        head = _shared([tokens for tokens, *_ in whole], min(int(np.flatnonzero(w)[0]) for _, w, *_ in whole))
        prompt = whole[0][0][:head]
        answers = tuple(
            Answer(tokens[head:], weights[head:], text.rank, *self._given(text, marks[head:], labels[head:]))
            for text, (tokens, weights, marks, labels) in zip(item.answers, whole, strict=True)
        )
        return self._fit(Group(prompt, answers, item.strength, item.subset))

    def _given(self, text: AnswerText, marks: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray | None, ...]:
        if isinstance(text.score, tuple):
            labels = np.full((len(marks), len(text.score)), np.nan, np.float32)
        if text.score is not None:
            marks[-1], labels[-1] = 1.0, text.score
        return (marks, labels) if self.kind in ("scores", "steps") else (None, None)

    def _fit(self, group: Group) -> Group | DataError | str:
        lengths = [len(answer.tokens) for answer in group.answers]
        fitted = fit(len(group.prompt), lengths, self)
        if fitted is None:
            return group
        full = group_cost(len(group.prompt), lengths, self.share_prompts)
        if self.on_long_row == "error":
            return DataError(
                f"the group takes {full} tokens of a row of {self.seq_len} (its longest answer with its prompt "
                f"{len(group.prompt) + max(lengths)}, of {self.max_length}); raise data.seq_len, or set "
                "data.on_long_row to truncate or drop",
                kind="too_long",
            )
        if self.on_long_row == "drop":
            return "too long"
        start, most = fitted
        if most < 1:
            return "the prompt leaves no room for an answer"
        answers = tuple(self._shortened(answer, most) for answer in group.answers)
        if any(not answer.weights.any() for answer in answers):
            return "nothing trained within the window"
        if self.kind == "steps" and any(answer.marks is None or not answer.marks.any() for answer in answers):
            return "no judged step within the window"
        for i, a in enumerate(answers):
            if any(a.rank != b.rank and np.array_equal(a.tokens, b.tokens) for b in answers[:i]):
                return "identical within the window"
        short = group._replace(prompt=group.prompt[start:], answers=answers)
        return short._replace(cut=full - short.cost(self.share_prompts))

    def _shortened(self, answer: Answer, most: int) -> Answer:
        if len(answer.tokens) <= most:
            return answer
        cut = Answer(answer.tokens[:most], answer.weights[:most], answer.rank)
        if answer.marks is None or answer.labels is None:
            return cut
        marks, labels = answer.marks[:most].copy(), answer.labels[:most].copy()
        if self.kind == "scores":  # the score is then read where the answer now ends
            marks[-1], labels[-1] = answer.marks[-1], answer.labels[-1]
        return cut._replace(marks=marks, labels=labels)

    def arrays(self, encoded: Sequence[Group]) -> dict[str, np.ndarray]:
        """Flat arrays of all groups: parts (a prompt, then its answers) one after another.

        tokens, weights [n], for scores and steps also marks, labels [n]; offsets [parts + 1]; first [groups + 1], the
        part that is each group's prompt; ranks [parts]; strengths [groups]; subsets [groups].
        """
        tokens, weights, marks, labels, ranks, first = [], [], [], [], [], [0]
        for group in encoded:
            nothing = np.zeros(len(group.prompt), np.float32)
            given = group.answers[0].labels
            unsaid = nothing if given is None else np.zeros((len(nothing), *given.shape[1:]), np.float32)
            parts = (Answer(group.prompt, nothing, -2, nothing, unsaid), *group.answers)
            tokens += [part.tokens for part in parts]
            weights += [part.weights for part in parts]
            marks += [part.marks for part in parts if part.marks is not None]
            labels += [part.labels for part in parts if part.labels is not None]
            ranks += [part.rank for part in parts]
            first.append(first[-1] + len(parts))
        out = {
            "tokens": np.concatenate(tokens).astype(np.int32),
            "weights": np.concatenate(weights).astype(np.float32),
            "offsets": np.concatenate([[0], np.cumsum([len(part) for part in tokens])]).astype(np.int64),
            "first": np.array(first, np.int64),
            "ranks": np.array(ranks, np.int32),
            "strengths": np.array([group.strength for group in encoded], np.float32),
            "subsets": np.array([group.subset for group in encoded]),
        }
        if self.kind in ("scores", "steps"):
            out |= {"marks": np.concatenate(marks), "labels": np.concatenate(labels)}
        return out

    def strength(self, given: float | str | None) -> float:
        """The number of a grade. Raises: DataError where it has none."""
        return strength_of(given, dict(self.grades))

    def text(self, prompt: Text, completion: Text, example: Judged, tokenizer: Tokenizer, notes: Counter) -> Pieced:
        """Pieces of one answer with its prompt: only the answer is trained."""
        if self.mask != "completion" and isinstance(prompt, str) and isinstance(completion, str):
            prompt, completion = same_kind(as_turn(prompt), completion)
        row = PromptCompletion(prompt=prompt, completion=completion, tools=example.tools)
        options = EncodeOptions(mask="completion", seq_len=self.seq_len, system_prompt=self.system_prompt)
        return to_pieces(row, tokenizer, options, notes)


def as_turn(prompt: str) -> Text:
    """A plain prompt as what a user says."""
    return (Message(role="user", content=prompt),)


def _marks(answer: AnswerText, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Marks and labels of steps: each at the last token of its piece. Raises: DataError where it has none."""
    marks, labels = np.zeros((2, len(owner)), np.float32)
    for step in answer.steps:
        at = np.flatnonzero(owner == step.piece)
        if at.size == 0:
            message = "no token begins in a step separator: set data.step_mark: last, or another data.step_separator"
            raise DataError(message, kind="step_separator")
        marks[at[-1]], labels[at[-1]] = 1.0, step.label
    return marks, labels


def _shared(tokens: Sequence[np.ndarray], most: int) -> int:
    """How many tokens, up to `most`, all begin with."""
    first, *others = tokens
    for other in others:
        differ = np.flatnonzero(first[:most] != other[:most])
        most = int(differ[0]) if differ.size else most
    return most


def _pairs(
    options: AnswerOptions, example: Judged, tokenizer: Tokenizer, notes: Counter[str]
) -> Iterator[GroupText | str]:
    if isinstance(example, Preference):
        return (yield from _rankings(options, example, tokenizer, notes))
    if not isinstance(example, Ranking):
        raise _unfit(options, example, "preference or ranking")
    order = sorted(range(len(example.ranks)), key=lambda n: example.ranks[n])
    chosen = [(a, b) for n, a in enumerate(order) for b in order[n + 1 :]]
    if options.pairs_of_rankings == "best_worst":
        chosen = [(order[0], order[-1])] if len(order) > 1 else []
    elif options.pairs_of_rankings == "neighbours":
        chosen = list(pairwise(order))
    if not chosen:
        raise DataError("a ranking of one answer has no pairs", kind="length")
    for a, b in chosen:
        sides = tuple(example.completions[n] for n in (a, b))
        tied = example.ranks[a] == example.ranks[b]
        pair = replace(example, completions=sides, ranks=(0, 0 if tied else 1), scores=None)
        yield from _rankings(options, pair, tokenizer, notes)


def _rankings(
    options: AnswerOptions, example: Judged, tokenizer: Tokenizer, notes: Counter[str]
) -> Iterator[GroupText | str]:
    if isinstance(example, Preference):
        sides, ranks = (example.chosen, example.rejected), (0, 0 if example.tie else 1)
    elif isinstance(example, Ranking):
        sides, ranks = example.completions, example.ranks
    else:
        raise _unfit(options, example, "preference or ranking")
    if len(sides) < 2:
        raise DataError("a ranking needs two answers or more", kind="length")
    if len(set(ranks)) == 1:
        if options.on_tie != "keep":
            yield _tie(options)
            return
        notes["ties kept"] += 1
    strength = options.strength(example.strength)
    answers = (
        AnswerText(options.text(example.prompt, side, example, tokenizer, notes), rank)
        for side, rank in zip(sides, ranks, strict=True)
    )
    yield GroupText(tuple(answers), strength, example.subset or "")


def _tie(options: AnswerOptions) -> str:
    """Why a tie is left out. Raises: DataError where it must not be there."""
    if options.on_tie == "error":
        raise DataError("no answer is better (a tie); set data.on_tie to skip or keep", kind="tie")
    return "tie"


def _unpaired(
    options: AnswerOptions, example: Judged, tokenizer: Tokenizer, notes: Counter[str]
) -> Iterator[GroupText | str]:
    if isinstance(example, UnpairedPreference):
        found = [(example.completion, example.label)]
    elif isinstance(example, Preference):
        if example.tie:
            yield _tie(options)
            return
        found = [(example.chosen, True), (example.rejected, False)]
    elif isinstance(example, Scored) or (isinstance(example, Ranking) and example.scores is not None):
        if options.good_score is None:
            raise DataError("a scored answer is desirable from data.good_score on, which is not set", kind="score")
        found = [(text, score >= options.good_score) for text, score in _scored(example)]
    else:
        raise _unfit(options, example, "unpaired_preference, preference or scored")
    for completion, good in found:
        pieced = options.text(example.prompt, completion, example, tokenizer, notes)
        yield GroupText((AnswerText(pieced, 0 if good else 1),), 1.0, example.subset or "")


def _scored(example: Scored | Ranking) -> list[tuple[Text, float]]:
    if isinstance(example, Scored):
        return [(example.completion, example.score)]
    return list(zip(example.completions, example.scores or (), strict=True))


def _scores(
    options: AnswerOptions, example: Judged, tokenizer: Tokenizer, notes: Counter[str]
) -> Iterator[GroupText | str]:
    if isinstance(example, UnpairedPreference):
        found = [(example.completion, float(example.label))]
    elif isinstance(example, Scored) or (isinstance(example, Ranking) and example.scores is not None):
        found = _scored(example)
    else:
        raise _unfit(options, example, "scored, unpaired_preference or ranking with scores")
    order = sorted({score for _, score in found}, reverse=True)
    given = _aspects(example, options.objectives) if options.objectives else None
    answers = (
        AnswerText(options.text(example.prompt, text, example, tokenizer, notes), order.index(score), given or score)
        for text, score in found
    )
    yield GroupText(tuple(answers), 1.0, example.subset or "")


def _aspects(example: Judged, objectives: Sequence[str]) -> tuple[float, ...]:
    """The scores of the objectives, NaN where one is not known. Raises: DataError where the row has none of them."""
    known = dict(example.aspects) if isinstance(example, Scored) else {}
    if not known.keys() & set(objectives):
        has = f"has {', '.join(known)}" if known else "has one number or none"
        raise DataError(
            f"score lacks {', '.join(objectives)} (data.objectives): it {has}, and must be {{name: number}}",
            kind="score",
        )
    return tuple(known.get(name, np.nan) for name in objectives)


def _steps(
    options: AnswerOptions, example: Judged, tokenizer: Tokenizer, notes: Counter[str]
) -> Iterator[GroupText | str]:
    if not isinstance(example, Stepwise):
        raise _unfit(options, example, "stepwise")
    pieced, steps = step_pieces(example, tokenizer, options, notes)
    yield GroupText((AnswerText(pieced, 0, steps=steps),), 1.0, example.subset or "")


def _unfit(options: AnswerOptions, example: Judged, wanted: str) -> DataError:
    name = type(example).__name__
    return DataError(f"a {name} row does not give {options.kind}; it takes rows of format {wanted}", kind="format")


_SPLIT: dict[str, Callable[..., Iterator[GroupText | str]]] = {
    "pairs": _pairs,
    "rankings": _rankings,
    "unpaired": _unpaired,
    "scores": _scores,
    "steps": _steps,
}
