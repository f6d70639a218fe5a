"""Rows that say how good answers are: pairs, rankings, labels, scores, labelled steps.

    preference            (prompt,) chosen, rejected; strength (a grade or a number) or margin; tie
    ranking               prompt, completions, ranks (0 the best) or scores (more is better); or a preference row with
                          `edited`, a corrected answer above `chosen`
    unpaired_preference   prompt, completion, label (true or false)
    scored                prompt, completion, score (of several objectives {name: score or null})
    stepwise              prompt, completions [text] (or one completion in which every step ends with the separator),
                          labels [true, false, a probability, or null: not judged], or first_error (counted from 0;
                          null: none)

`subset` may stand beside any of them: accuracies are told by it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxpost.data.prompts import split_prompt
from jaxpost.data.texts import Text, Tools, is_empty, parse_text, same_kind
from jaxpost.text.messages import DataError


@dataclass(frozen=True, kw_only=True)
class Preference:
    """Two answers, of which the first is better. The common beginning is the prompt where the row gave none."""

    prompt: Text
    chosen: Text
    rejected: Text
    strength: float | str | None = None
    """How much better: a number, or the name of a grade."""
    tie: bool = False
    """Neither is better."""
    subset: str | None = None
    tools: Tools = None


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Answers to one prompt with their places (0 the best, equal numbers for ties), and their scores, if any."""

    prompt: Text
    completions: tuple[Text, ...]
    ranks: tuple[int, ...]
    scores: tuple[float, ...] | None = None
    strength: float | str | None = None
    subset: str | None = None
    tools: Tools = None


@dataclass(frozen=True, kw_only=True)
class UnpairedPreference:
    """An answer that is good (True) or bad (False)."""

    prompt: Text
    completion: Text
    label: bool
    subset: str | None = None
    tools: Tools = None


@dataclass(frozen=True, kw_only=True)
class Scored:
    """An answer and its grade."""

    prompt: Text
    completion: Text
    score: float
    """Of several objectives the mean of those that are known."""
    aspects: tuple[tuple[str, float], ...] = ()
    """Name and score of every objective, where there are several; NaN: not known."""
    subset: str | None = None
    tools: Tools = None


@dataclass(frozen=True, kw_only=True)
class Stepwise:
    """An answer in steps, each right (1), wrong (0), right with a probability, or not judged (None).

    `completions` of one text that is not split yet: its steps end with the data section's separator.
    """

    prompt: Text
    completions: tuple[str, ...]
    labels: tuple[float | None, ...]
    split: bool = True
    """False: `completions` is one text of len(labels) steps."""
    subset: str | None = None
    tools: Tools = None


JUDGED = (Preference, Ranking, UnpairedPreference, Scored, Stepwise)
Judged = Preference | Ranking | UnpairedPreference | Scored | Stepwise

REQUIRED: dict[str, tuple[set[str], ...]] = {
    "preference": ({"chosen", "rejected"},),
    "ranking": (
        {"prompt", "completions", "ranks"},
        {"prompt", "completions", "scores"},
        {"edited", "chosen", "rejected"},
    ),
    "unpaired_preference": ({"prompt", "completion", "label"},),
    "scored": ({"prompt", "completion", "score"},),
    "stepwise": (
        {"prompt", "completions", "labels"},
        {"prompt", "completions", "first_error"},
        {"prompt", "completion", "labels"},
    ),
}
EXTRA = {
    "preference": {"strength", "margin", "tie", "subset"},
    "ranking": {"strength", "margin", "subset"},
    "unpaired_preference": {"subset"},
    "scored": {"subset"},
    "stepwise": {"subset"},
}


def parse_judged(row: Mapping[str, Any], name: str, text: Callable[[str], Text], tools: Tools) -> Judged:
    """Reads a row of one of these formats; `text(key)` reads a plain or conversational text of it.

    Raises: DataError naming the key.
    """
    rest: dict[str, Any] = {"subset": _subset(row.get("subset")), "tools": tools}
    if name == "ranking" and ("completions" in row or row.get("edited") is not None):
        return _ranking(row, text, {**rest, "strength": _strength(row)})
    if name in ("preference", "ranking"):  # a table with a column of edited answers need not fill it in every row
        prompt, sides = split_prompt(_prompt(row, text), {"chosen": text("chosen"), "rejected": text("rejected")})
        tie = row.get("tie")
        tied = tie is not None and label(tie, "tie")
        check_distinct(list(sides.values()), (0, 0 if tied else 1), list(sides))
        chosen, rejected = sides.values()
        return Preference(prompt=prompt, chosen=chosen, rejected=rejected, tie=tied, strength=_strength(row), **rest)
    if name == "unpaired_preference":
        prompt, completion = _answer(text("prompt"), text("completion"))
        return UnpairedPreference(prompt=prompt, completion=completion, label=label(row["label"], "label"), **rest)
    if name == "scored":
        prompt, completion = _answer(text("prompt"), text("completion"))
        score, aspects = _score(row["score"])
        return Scored(prompt=prompt, completion=completion, score=score, aspects=aspects, **rest)
    return _stepwise(text("prompt"), row, rest)


def _prompt(row: Mapping[str, Any], text: Callable[[str], Text]) -> Text | None:
    """The prompt of two sides; None where the row has none, or an empty one beside whole dialogues."""
    value = row.get("prompt")
    if value is None or (value in ("", []) and not isinstance(row["chosen"], str)):
        return None
    prompt = text("prompt")
    if is_empty(prompt):
        raise DataError("prompt is empty; leave it out where both sides begin with the prompt", kind="empty")
    return prompt


def _subset(value: Any) -> str | None:
    if value is None or isinstance(value, str | int):
        return None if value is None else str(value)
    raise DataError(f"subset must be a name, not {value!r:.80}")


def label(value: Any, key: str) -> bool:
    """A value that is true or false, or 1 or 0. Raises: DataError naming the key."""
    if isinstance(value, bool) or value in (0, 1):
        return bool(value)
    raise DataError(
        f"{key} must be true or false, not {value!r:.80}; if the column means something else, set the source's format"
    )


def number(value: Any, key: str, *, kind: str = "score") -> float:
    """A finite number. Raises: DataError naming the key.

    >>> number(True, "score")
    1.0
    """
    if isinstance(value, int | float) and abs(value) <= sys.float_info.max:
        return float(value)
    raise DataError(f"{key} must be a finite number, not {value!r:.80}", kind=kind)


def _score(value: Any) -> tuple[float, tuple[tuple[str, float], ...]]:
    """A grade, or the mean of several objectives' grades and each of them."""
    if not isinstance(value, Mapping):
        return number(value, "score"), ()
    aspects = tuple((str(k), math.nan if v is None else number(v, f"score.{k}")) for k, v in value.items())
    known = [v for _, v in aspects if not math.isnan(v)]
    if not known:
        raise DataError("score has no number in it", kind="score")
    return sum(known) / len(known), aspects


def _strength(row: Mapping[str, Any]) -> float | str | None:
    for key in ("strength", "margin"):
        value = row.get(key)
        if value is None:
            continue
        if isinstance(value, str):
            return value
        found = number(value, key, kind="strength")
        if found < 0:
            raise DataError(f"{key} must not be negative, as chosen is the better side; it is {value}", kind="strength")
        return found
    return None


def strength_of(given: float | str | None, grades: Mapping[str, float]) -> float:
    """The number of a strength or a grade; 1 where there is none. Raises: DataError for a grade that the table lacks.

    >>> strength_of("Slightly_better", {"slightly": 0.5})
    0.5
    """
    if not isinstance(given, str):
        return 1.0 if given is None else float(given)
    table = {_plain(name): value for name, value in grades.items()}
    for key in (_plain(given), _plain(given).removesuffix(" better")):
        if key in table:
            return table[key]
    message = f"strength is {given!r}, which data.grades lacks; it has {', '.join(grades) or 'none'}"
    raise DataError(message, kind="strength")


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", " ")


def _answer(prompt: Text, completion: Text) -> tuple[Text, Text]:
    prompt, completion = same_kind(prompt, completion)
    if is_empty(completion):
        raise DataError("completion is empty", kind="empty")
    return prompt, completion


def check_distinct(answers: Sequence[Text], ranks: Sequence[int], names: Sequence[str]) -> None:
    """Equal answers cannot have different places. Raises: DataError naming them."""
    for i, first in enumerate(answers):
        for j in range(i):
            if answers[j] == first and ranks[j] != ranks[i]:
                raise DataError(f"{names[j]} and {names[i]} are identical, so neither is better", kind="identical")


def _ranking(row: Mapping[str, Any], text: Callable[[str], Text], rest: dict[str, Any]) -> Ranking:
    if "edited" in row and "completions" not in row:
        keys = ("edited", "chosen", "rejected")
        prompt, answers = split_prompt(_prompt(row, text), {key: text(key) for key in keys})
        check_distinct(list(answers.values()), (0, 1, 2), keys)
        return Ranking(prompt=prompt, completions=tuple(answers.values()), ranks=(0, 1, 2), **rest)
    values = row["completions"]
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise DataError(f"completions must be a list of answers, not {values!r:.80}")
    names = [f"completions[{n}]" for n in range(len(values))]
    answers = {name: parse_text(value, name) for name, value in zip(names, values, strict=True)}
    prompt, answers = split_prompt(text("prompt"), answers)
    scores, places = (
        None if row.get(key) is None else numbers(row[key], key, len(values), "completions")
        for key in ("scores", "ranks")
    )
    if scores is None and places is None:
        raise DataError("ranks or scores must say which of completions is better; both are null")
    order = sorted(set(scores or ()), reverse=True)
    ranks = tuple(order.index(value) for value in scores or ())
    if places is not None:
        order = sorted(set(places))
        ranks, by_score = tuple(order.index(value) for value in places), ranks
        if scores is not None and any(
            ranks[i] < ranks[j] and by_score[i] > by_score[j] for i in range(len(ranks)) for j in range(len(ranks))
        ):
            raise DataError("ranks and scores contradict one another: 0 is the best rank, the highest the best score")
    check_distinct(list(answers.values()), ranks, names)
    return Ranking(prompt=prompt, completions=tuple(answers.values()), ranks=ranks, scores=scores, **rest)


def numbers(values: Any, key: str, count: int, of: str) -> tuple[float, ...]:
    """A list of `count` finite numbers. Raises: DataError naming the key and the entry."""
    _check_length(values, key, count, of)
    return tuple(number(value, f"{key}[{n}]") for n, value in enumerate(values))


def _check_length(values: Any, key: str, count: int, of: str) -> None:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise DataError(f"{key} must be a list, not {values!r:.80}")
    if len(values) != count:
        raise DataError(f"{key} must have one entry for each of the {count} {of}; it has {len(values)}", kind="length")


def _stepwise(prompt: Text, row: Mapping[str, Any], rest: dict[str, Any]) -> Stepwise:
    steps = row.get("completions")
    if steps is None:
        whole, labels = row["completion"], row["labels"]
        if not isinstance(whole, str):
            raise DataError(f"completion of a stepwise row must be text, not {whole!r:.80}")
        if not isinstance(labels, Sequence) or isinstance(labels, str) or not labels:
            raise DataError(f"labels must be a list with one entry for each step, not {labels!r:.80}")
        return Stepwise(prompt=prompt, completions=(whole,), labels=_labels(labels), split=False, **rest)
    if not isinstance(steps, Sequence) or isinstance(steps, str) or not steps:
        raise DataError(f"completions must be a list of steps, not {steps!r:.80}")
    for index, step in enumerate(steps):
        if not isinstance(step, str):
            raise DataError(f"completions[{index}] must be text, not {step!r:.80}")
        if not step.strip():
            raise DataError(f"completions[{index}] is empty", kind="empty")
    if "labels" in row:
        _check_length(row["labels"], "labels", len(steps), "completions")
        return Stepwise(prompt=prompt, completions=tuple(steps), labels=_labels(row["labels"]), **rest)
    labels = first_error_labels(row["first_error"], len(steps))
    return Stepwise(prompt=prompt, completions=tuple(steps), labels=labels, **rest)


def first_error_labels(first: Any, steps: int) -> tuple[float | None, ...]:
    """Labels of steps of which only the first wrong one is known (counted from 0; None: all are right).

    >>> first_error_labels(1, 4)
    (1.0, 0.0, None, None)

    Raises: DataError where there is no such step.
    """
    if first is None:
        return (1.0,) * steps
    if isinstance(first, float) and first.is_integer():
        first = int(first)  # what tables make of whole numbers beside nulls
    if isinstance(first, bool) or not isinstance(first, int) or not 0 <= first < steps:
        raise DataError(
            f"first_error must be null or 0 to {steps - 1}, a step's number; it is {first!r}", kind="length"
        )
    return (1.0,) * first + (0.0,) + (None,) * (steps - first - 1)


def _labels(values: Sequence[Any]) -> tuple[float | None, ...]:
    out: list[float | None] = []
    for n, value in enumerate(values):
        if value is not None and not (isinstance(value, int | float) and 0 <= value <= 1):
            message = f"labels[{n}] must be true or false, a probability, or null (not judged), not {value!r:.80}"
            raise DataError(message, kind="score")
        out.append(None if value is None else float(value))
    return tuple(out)
