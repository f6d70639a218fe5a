"""What a run changed: every evaluation before and after, item by item where its samples are there.

"Before" is an evaluation's first time and "after" its last. An item is right with the full score, 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxpost.eval.statistics import (
    Interval,
    PairedTest,
    mcnemar,
    mean_share,
    paired_difference,
    pass_at_k,
)
from jaxpost.report.read import NAME, Run, Sample
from jaxpost.report.text import clean, number, of_reward

Items = Mapping[str, Sequence[Sample]]
"""Samples by item. Evaluations number their own items, so an item is its number and its prompt (`item_of`)."""

LAXER = 0.95
"""An evaluation is laxer than another one if so many of the items that are right there are right here."""


@dataclass(frozen=True)
class Row:
    """A number before and after."""

    label: str
    before: Interval | None
    after: Interval | None
    difference: Interval | None = None
    test: PairedTest | None = None


@dataclass(frozen=True)
class Evaluation:
    """One evaluation over a run."""

    name: str
    steps: tuple[int, int]
    """First and last."""
    items: int | None
    samples_per_item: int | None
    """None where items differ, or samples are not kept."""
    accuracy: Row
    pass_at: Sequence[Row]
    before: Items
    """Empty where samples are not kept."""
    after: Items

    @property
    def paired(self) -> list[str]:
        """Items with one sample each time, in the order of the first evaluation."""
        return [e for e, found in self.before.items() if len(found) == 1 and len(self.after.get(e, ())) == 1]

    def right(self, when: str, examples: Sequence[str]) -> list[bool]:
        """Whether each example's one sample is right, "before" or "after"."""
        items = self.before if when == "before" else self.after
        return [items[example][0].right for example in examples]


class Change(NamedTuple):
    """An item whose answer became right or wrong, and what the wrong answer was."""

    item: str
    kind: str
    """One of `KINDS`."""
    before: Sample
    after: Sample


KINDS = {
    "there, not counted": "already right under {laxer}: the answer was there, its form or its end was not",
    "cut off": "cut off before the end",
    "wrong": "ended, and wrong",
    "lost: form": "lost, though still right under {laxer}: its form or its end is missing",
    "lost: cut off": "lost: now cut off before the end",
    "lost: wrong": "lost: ended, and wrong",
}
"""What a wrong answer was, before (of an item gained) or after (of one lost)."""


@dataclass(frozen=True)
class Gain:
    """How much of a gain in accuracy is being right, and how much finishing in time and in form."""

    evaluation: Evaluation
    laxer: Sequence[str]
    """Evaluations of the same items that ask less (`laxer_than`); the laxest one first."""
    items: int
    total: Interval
    being_right: Interval | None
    """The gain under the laxest evaluation. None: there is none."""
    in_time: Interval | None
    """The rest: of the items that are right under the laxest one, more are right under this one too."""
    changes: Sequence[Change]

    def count(self, kind: str) -> int:
        return sum(change.kind == kind for change in self.changes)


def item_of(sample: Sample) -> str:
    """What makes two samples answers to the same item."""
    return f"{sample.example}\n{sample.prompt}"


def evaluations(run: Run) -> list[Evaluation]:
    """Every evaluation by items of a run, in the order in which metrics.jsonl has them."""
    told = dict.fromkeys(k for r in run.evals for k in r if k.endswith("/accuracy") and not of_reward(k))
    keys = [k.removesuffix("/accuracy") for k in told]
    sources = {s.source for s in run.samples}
    names = {clean(k, NAME): k for k in keys if clean(k, NAME) in sources or any(f"{k}/items" in r for r in run.evals)}
    answers: dict[str, dict[int, dict[str, list[Sample]]]] = {}
    for sample in run.samples:
        if sample.source in names:
            items = answers.setdefault(sample.source, {}).setdefault(sample.step, {})
            items.setdefault(item_of(sample), []).append(sample)
    return [_evaluation(run, key, name, answers.get(name, {})) for name, key in names.items()]


def means(run: Run, found: Sequence[Evaluation]) -> list[tuple[str, float, float]]:
    """(name, first, last) of the held-out losses and accuracies that are means over tokens, not of items."""
    keys = dict.fromkeys(k for r in run.evals for k in r if k.rpartition("/")[2] in ("loss", "accuracy"))
    others = [
        k
        for k in keys
        if not k.startswith("best/")
        and not of_reward(k)
        and clean(k.rpartition("/")[0], NAME) not in {e.name for e in found}
    ]
    values = {k: [v for r in run.evals if (v := number(r.get(k))) is not None] for k in others}
    return [(k, found[0], found[-1]) for k, found in values.items() if found]


def _evaluation(run: Run, key: str, name: str, answers: Mapping[int, Items]) -> Evaluation:
    records = [r for r in run.evals if number(r.get(f"{key}/accuracy")) is not None]
    first, last = records[0], records[-1]
    before, after = answers.get(first["step"], {}), answers.get(last["step"], {})
    counts = {len(found) for items in (before, after) for found in items.values()}
    each = counts.pop() if len(counts) == 1 else None
    shares = [_accuracy(items) or _reported(r, key) for items, r in ((before, first), (after, last))]
    steps = (first["step"], last["step"])
    for items, record, share in ((before, first, shares[0]), (after, last, shares[1])):
        reported = number(record[f"{key}/accuracy"])
        if items and reported is not None and abs(reported - share.value) > 1e-6:
            run.notices.append(
                f"{name} at step {record['step']}: metrics.jsonl says {reported:.4f}, but of the samples "
                f"{share.value:.4f} have the full score; the table counts samples."
            )
    if steps[0] == steps[1]:  # no second time yet
        return Evaluation(name, steps, _items(before, first, key), each, Row(name, shares[0], None), [], before, {})
    both = [e for e in before if e in after]
    difference = test = None
    if both:
        means = [[np.mean([s.right for s in items[e]]) for e in both] for items in (before, after)]
        difference = paired_difference(*means)
        test = mcnemar(*means) if each == 1 else None
    row = Row(name, shares[0], shares[1], difference, test)
    return Evaluation(name, steps, _items(before, first, key), each, row, _pass_at(before, after), before, after)


def _items(samples: Items, record: Mapping[str, object], key: str) -> int | None:
    found = number(record.get(f"{key}/items"))
    return len(samples) or (None if found is None else int(found))


def _accuracy(items: Items) -> Interval | None:
    """By items, however many samples each has."""
    if not items:
        return None
    return mean_share([float(np.mean([s.right for s in found])) for found in items.values()])


def _reported(record: Mapping[str, object], name: str) -> Interval:
    value, low, high = (number(record.get(f"{name}/{key}")) for key in ("accuracy", "low", "high"))
    value = float("nan") if value is None else value
    return Interval(value, value if low is None else low, value if high is None else high)


def _pass_at(before: Items, after: Items) -> list[Row]:
    """pass@2, 4, 8 ... up to the number of samples that every item has."""
    both = [e for e in before if e in after]
    most = min((len(items[e]) for items in (before, after) for e in both), default=1)
    ks = [k for k in (2, 4, 8, 16, 32, 64, 128, 256) if k <= most] if most > 1 else []
    ks += [most] if ks and most not in ks else []
    rows = []
    for k in ks:
        first, last = (
            [pass_at_k(len(items[e]), sum(s.right for s in items[e]), k) for e in both] for items in (before, after)
        )
        rows.append(Row(f"pass@{k}", mean_share(first), mean_share(last), paired_difference(first, last)))
    return rows


def laxer_than(one: Evaluation, others: Sequence[Evaluation]) -> list[Evaluation]:
    """Evaluations of the same items under which nearly all that is right here is right, before and after.

    A lenient parser of the same texts and a longer limit are; another set of problems is not. The laxest first.
    """
    found = []
    mine = one.paired
    for other in others:
        theirs = set(other.paired)
        shared = [e for e in mine if e in theirs]
        if other.name == one.name or len(shared) < len(mine) or not shared:
            continue
        kept, surplus = [], 0
        for when in ("before", "after"):
            here, there = one.right(when, shared), other.right(when, shared)
            kept += [b for a, b in zip(here, there, strict=True) if a]
            surplus += sum(there) - sum(here)
        if kept and np.mean(kept) >= LAXER and surplus > 0:
            found.append((surplus, other))
    return [other for _, other in sorted(found, key=lambda pair: -pair[0])]


def gain(one: Evaluation, others: Sequence[Evaluation]) -> Gain | None:
    """Takes the change of one evaluation's accuracy apart; None without paired samples."""
    examples = one.paired
    if not examples:
        return None
    laxer = laxer_than(one, others)
    before, after = (np.array(one.right(when, examples), float) for when in ("before", "after"))
    being_right = in_time = None
    if laxer:
        lax = [np.array(laxer[0].right(when, examples), float) for when in ("before", "after")]
        being_right = paired_difference(*lax)
        in_time = paired_difference(before - lax[0], after - lax[1])
    changes = [
        Change(e, _kind(e, laxer, one, gained=bool(now)), one.before[e][0], one.after[e][0])
        for e, then, now in zip(examples, before, after, strict=True)
        if then != now
    ]
    names = [other.name for other in laxer]
    return Gain(one, names, len(examples), paired_difference(before, after), being_right, in_time, changes)


def _kind(example: str, laxer: Sequence[Evaluation], one: Evaluation, *, gained: bool) -> str:
    when = "before" if gained else "after"
    wrong = (one.before if gained else one.after)[example][0]
    if any(other.right(when, [example])[0] for other in laxer):
        return "there, not counted" if gained else "lost: form"
    if wrong.truncated:
        return "cut off" if gained else "lost: cut off"
    return "wrong" if gained else "lost: wrong"
