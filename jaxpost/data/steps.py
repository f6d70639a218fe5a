"""Answers in steps: which piece of the text carries each step's label."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple, Protocol, runtime_checkable

from jaxpost.data.encode import Pieced
from jaxpost.data.judged import Stepwise
from jaxpost.data.texts import Text
from jaxpost.text.messages import DataError
from jaxpost.text.tokenizer import Tokenizer


class Step(NamedTuple):
    """A judged step: the number of the piece whose last token carries its label."""

    piece: int
    label: float


@runtime_checkable
class StepOptions(Protocol):
    """The options that decide."""

    @property
    def step_separator(self) -> str: ...

    @property
    def step_mark(self) -> str: ...

    @property
    def step_labels(self) -> str: ...

    @property
    def after_error(self) -> str: ...

    def text(
        self, prompt: Text, completion: Text, example: Stepwise, tokenizer: Tokenizer, notes: Counter
    ) -> Pieced: ...


def step_pieces(
    example: Stepwise, tokenizer: Tokenizer, options: StepOptions, notes: Counter[str]
) -> tuple[Pieced, tuple[Step, ...]]:
    """The pieces of an answer, steps and separators each a piece of their own, and the judged steps among them.

    Raises: DataError where a separator is missing or no step is judged.
    """
    separator = options.step_separator
    steps, labels = split_steps(example, separator), labels_of(example.labels, options)
    if all(label is None for label in labels):
        raise DataError("no step of the row is judged (every label is null)", kind="empty_mask")
    last = separator if options.step_mark == "separator" else ""
    pieced = options.text(example.prompt, separator.join(steps) + last, example, tokenizer, notes)
    answer = max(n for n, weight in enumerate(pieced.weights) if weight)
    found, end = _find(pieced.pieces[answer], steps, separator, options.step_mark)
    pieces, weights = list(pieced.pieces[:answer]), list(pieced.weights[:answer])
    judged = []
    for (step, mark), label in zip(found, labels, strict=True):
        for text in (step, mark):
            if text:
                pieces.append(text)
                weights.append(pieced.weights[answer])
        if label is not None:
            carrier = len(pieces) - 1 if options.step_mark == "separator" or not mark else len(pieces) - 2
            judged.append(Step(carrier, label))
    rest = pieced.pieces[answer][end:]
    pieces += [rest] * bool(rest) + pieced.pieces[answer + 1 :]
    weights += [pieced.weights[answer]] * bool(rest) + pieced.weights[answer + 1 :]
    return pieced._replace(pieces=pieces, weights=weights), tuple(judged)


def split_steps(example: Stepwise, separator: str) -> list[str]:
    """The steps' texts, without spaces around them.

    Raises: DataError where the separators of an answer that is one text do not make as many steps as it has labels.
    """
    steps = list(example.completions)
    if not example.split:
        steps = [step for step in steps[0].split(separator) if step.strip()]
        if len(steps) != len(example.labels):
            raise DataError(
                f"the separator {separator!r} (data.step_separator) splits the completion into {len(steps)} steps, but "
                f"the row has {len(example.labels)} labels",
                kind="step_separator",
            )
    return [step.strip() for step in steps]


def labels_of(labels: tuple[float | None, ...], options: StepOptions) -> list[float | None]:
    """Labels after the options `after_error` and `step_labels`."""
    out = list(labels)
    wrong = next((n for n, label in enumerate(out) if label is not None and label < 0.5), None)
    if wrong is not None and options.after_error != "as_given":
        behind = None if options.after_error == "ignore" else 0.0
        out[wrong + 1 :] = [behind] * (len(out) - wrong - 1)
    if options.step_labels == "hard":
        out = [None if label is None else float(label >= 0.5) for label in out]
    return out


def _find(text: str, steps: list[str], separator: str, mark: str) -> tuple[list[tuple[str, str]], int]:
    """Each step as it stands in a rendered answer, with the separator behind it, and where the last one ends.

    What a template puts in front of the first step goes with it.
    """
    found, at = [], 0
    for number, step in enumerate(steps):
        begin = text.find(step, at)
        if begin < 0:
            raise DataError(f"the chat template does not show step {number} as it is: {step[:60]!r}", kind="template")
        end = begin + len(step)
        is_last = number == len(steps) - 1
        between = separator if not is_last or mark == "separator" else ""
        if text[end : end + len(between)] != between:
            raise DataError(
                f"no step separator {separator!r} stands behind step {number}: the chat template takes it away; set "
                "data.step_mark: last, or another data.step_separator",
                kind="step_separator",
            )
        found.append((text[at:end], between))
        at = end + len(between)
    return found, at
