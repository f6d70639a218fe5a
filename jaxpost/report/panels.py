"""Which charts a run's metrics make. What no chart names is drawn too, each number in a chart of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxpost.metrics.charts import Chart, Points, Series, thin
from jaxpost.report.read import Run
from jaxpost.report.text import clean, number, of_reward

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Panel:
    """A chart to be, where any of its numbers are there."""

    title: str
    train: Mapping[str, str]
    """label -> key of training records; a key that ends in /* takes every key under it."""
    held_out: str = ""
    """Key of each evaluation, as in <name>/<key>; [low, high] bands come with "accuracy"."""
    percent: bool = False
    from_zero: bool = False


SECTIONS: Mapping[str, Sequence[Panel]] = {
    "What it is for": (
        Panel("held-out accuracy", {}, "accuracy", percent=True),
        Panel("reward", {"reward": "reward", "deviation": "reward_std"}),
        Panel("reward by component", {"": "reward/*"}),
        Panel("held-out reward by component", {}, "reward/*"),
        Panel("held-out pass@k", {}, "pass@*", percent=True),
        Panel("held-out accuracy of votes", {}, "vote@*", percent=True),
        Panel("loss", {"train": "loss"}, "loss"),
    ),
    "Both sides": (
        Panel("rewards", {"chosen": "rewards/chosen", "rejected": "rewards/rejected"}),
        Panel("reward margin", {"train": "rewards/margin"}, "rewards/margin"),
        Panel("pairs in the right order", {"train": "rewards/accuracy"}, "rewards/accuracy", percent=True),
        Panel("log-probability of an answer", {"chosen": "logprobs/chosen", "rejected": "logprobs/rejected"}),
        Panel("log pi / pi_ref of an answer", {"chosen": "logratios/chosen", "rejected": "logratios/rejected"}),
        Panel("length, tokens", {"chosen": "tokens/chosen", "rejected": "tokens/rejected"}, from_zero=True),
    ),
    "The reward model": (
        Panel("area under the curve", {}, "area_under_curve"),
        Panel("first wrong step found", {}, "first_error/*", percent=True),
        Panel("correlation with grades", {}, "correlation"),
        Panel("calibration error", {}, "calibration_error", from_zero=True),
        Panel("correlation of score and length", {}, "length_correlation"),
        Panel("deviation between members", {"train": "uncertainty"}, "uncertainty", from_zero=True),
    ),
    "How far the policy went": (
        Panel("KL, nats a token", {"from the reference": "kl", "from the old policy": "old_kl"}, from_zero=True),
        Panel("entropy, nats a token", {"train": "entropy"}, from_zero=True),
        Panel("ratio to the old policy", {"mean": "ratio"}),
        Panel(
            "clipped tokens",
            {"all": "clip_fraction", "low": "clip_low", "high": "clip_high"},
            percent=True,
            from_zero=True,
        ),
    ),
    "The samples": (
        Panel("answer length, tokens", {"train": "answer_tokens"}, "answer_tokens", from_zero=True),
        Panel("truncated answers", {"train": "truncated"}, "truncated", percent=True, from_zero=True),
        Panel("repeated 4-grams", {"train": "repetition"}, percent=True, from_zero=True),
        Panel(
            "groups",
            {"sampled": "groups", "without variance": "zero_variance_groups", "dropped": "dropped_groups"},
            from_zero=True,
        ),
        Panel(
            "refills and unscored samples", {"refills": "refills", "unscored": "unscored"}, "unscored", from_zero=True
        ),
    ),
    "Sampler and learner": (
        Panel("effective sample size", {"train": "effective_sample_size"}, percent=True),
        Panel("sampler/learner gap, nats a token", {"train": "sampler_gap"}, from_zero=True),
        Panel("importance weight", {"mean": "sampler_weight"}),
        Panel("staleness, policy versions", {"train": "staleness"}, from_zero=True),
    ),
    "The updates": (
        Panel("gradient norm", {"train": "grad_norm"}, from_zero=True),
        Panel("learning rate", {"train": "lr"}, from_zero=True),
    ),
}
_QUIET = ("step", "kind", "time", "policy_version", "ratio_squared", "sampler_weight_squared", "samples",
          "updates", "problems", "tokens_trained", "tokens")  # fmt: skip
"""Keys that need no chart."""
_NO_SHARE = ("per_", "percent", "gib", "compile")
"""Marks of what is under `time` and no part of a step's seconds."""


def sections(run: Run, *, most: int = 600) -> dict[str, list[Chart]]:
    """The charts under their headings; headings without charts are left out.

    Args:
      most: points of a line.
    """
    train, evals = run.train, run.evals
    names = evaluation_names(evals)
    found = {
        title: [chart for panel in panels if (chart := _chart(panel, train, evals, names, most)) is not None]
        for title, panels in SECTIONS.items()
    }
    found["Calibration"] = reliability_charts(evals)
    found["Time"] = time_charts(train, most)
    found["Other numbers"] = _others(train, most)
    return {title: charts for title, charts in found.items() if charts}


def evaluation_names(evals: Sequence[Record]) -> list[str]:
    """What evaluations are called: all before the last slash of their keys; "" of a single one."""
    keys = dict.fromkeys(k for r in evals for k in r if not k.startswith("best/"))
    marks = ("accuracy", "loss", "items")
    found = dict.fromkeys(k.rpartition("/")[0] for k in keys if k.rpartition("/")[2] in marks and not of_reward(k))
    return [name for name in found if name.rpartition("/")[2] != "rewards"]  # of pairs, not of items


def points(records: Sequence[Record], key: str, most: int = 600) -> Points:
    """(step, value) of the records that have a finite number under the key."""
    return thin([(r["step"], v) for r in records if (v := number(r.get(key))) is not None], most)


def _chart(
    panel: Panel, train: Sequence[Record], evals: Sequence[Record], names: Sequence[str], most: int
) -> Chart | None:
    series = [
        Series(label, found, smooth=True)
        for label, key in _keys(panel.train, train).items()
        if (found := points(train, key, most))
    ]
    for name in names if panel.held_out else ():
        head = f"{name}/" if name else ""
        for label, key in _keys({name or "held out": head + panel.held_out}, evals).items():
            if found := points(evals, key, most):
                bounds = _bounds(evals, head, most) if panel.held_out == "accuracy" else None
                series.append(Series(label, found, bounds, dots=True))
    if not series:
        return None
    shares = panel.percent and all(-1e-6 <= y <= 1 + 1e-6 for s in series for _, y in s.points)
    return Chart(panel.title, series, percent=shares, from_zero=panel.from_zero)


def _keys(keys: Mapping[str, str], records: Sequence[Record]) -> dict[str, str]:
    """label -> key, with one for each key that a pattern's star stands for."""
    found: dict[str, str] = {}
    for label, key in keys.items():
        if not key.endswith("*"):
            found[clean(label, 40)] = key
            continue
        head = key[:-1]
        short = head.rpartition("/")[0] + "/" if "/" in head else ""
        for full in dict.fromkeys(k for r in records for k in r if k.startswith(head)):
            found[clean(f"{label} {full.removeprefix(short)}".strip(), 40)] = full
    return found


def _bounds(evals: Sequence[Record], head: str, most: int) -> Points | None:
    """(low, high) of every evaluation's accuracy; None where one lacks them."""
    bounds = [
        (number(r.get(f"{head}low")), number(r.get(f"{head}high")))
        for r in evals
        if number(r.get(f"{head}accuracy")) is not None
    ]
    whole = [(low, high) for low, high in bounds if low is not None and high is not None]
    return whole if len(whole) == len(bounds) <= most else None


def reliability_charts(evals: Sequence[Record]) -> list[Chart]:
    """How often what is given x % comes true: first and last evaluation of each source, against the diagonal."""
    charts = []
    for name in evaluation_names(evals):
        head = f"{name}/reliability/" if name else "reliability/"
        told = [r for r in evals if any(str(key).startswith(head) for key in r)]
        if not told:
            continue
        series = [Series("x %", [(0.0, 0.0), (100.0, 1.0)])]
        for label, record in {"first": told[0], "last": told[-1]}.items():
            bins = (str(key)[len(head) :].rpartition("/")[0] for key in record if str(key).startswith(head))
            found = [(number(record.get(f"{head}{b}/said")), number(record.get(f"{head}{b}/true"))) for b in
                     dict.fromkeys(bins)]  # fmt: skip
            points_ = [(100 * said, true) for said, true in found if said is not None and true is not None]
            series.append(Series(label, points_, dots=True))
        title = clean(f"{name}: of what is given x %, so much is right".removeprefix(": "), 80)
        charts.append(Chart(title, series, percent=True, from_zero=True))
    return charts


def time_charts(train: Sequence[Record], most: int = 600) -> list[Chart]:
    """Where the seconds of a step went, as areas on top of one another; speeds, each on its own."""
    spent = [(r["step"], r["time"]) for r in train if isinstance(r.get("time"), Mapping)]
    spent = spent[:: -(-len(spent) // most) or 1]
    names = dict.fromkeys(k for _, parts in spent for k, v in parts.items() if number(v) is not None)
    parts = [k for k in names if k != "seconds" and not any(mark in k for mark in _NO_SHARE)]
    charts = []
    if parts:
        areas = [Series(clean(k, 40), [(float(x), number(t.get(k)) or 0.0) for x, t in spent]) for k in parts]
        charts.append(Chart("seconds of a step", areas, stacked=True, from_zero=True))
    for name in (k for k in names if k not in parts and k not in ("seconds", "compile_seconds")):
        found = thin([(x, v) for x, t in spent if (v := number(t.get(name))) is not None], most)
        charts.append(Chart(clean(name.replace("_", " "), 60), [Series("train", found, smooth=True)], from_zero=True))
    return [chart for chart in charts if any(s.points for s in chart.series)]


def _others(train: Sequence[Record], most: int) -> list[Chart]:
    """Numbers of training records that no panel names."""
    named = {key for panels in SECTIONS.values() for panel in panels for key in panel.train.values()}
    stars = tuple(key[:-1] for key in named if key.endswith("*"))
    keys = dict.fromkeys(k for r in train for k in r if k not in named and k not in _QUIET and not k.startswith(stars))
    found = ((key, points(train, key, most)) for key in keys)
    return [Chart(clean(key, 60), [Series("train", line, smooth=True)]) for key, line in found if line]


def compared(runs: Mapping[str, Run], *, most: int = 400) -> dict[str, list[Chart]]:
    """The charts of several runs: one line a run, one chart for every number."""
    apart = {name: sections(run, most=most) for name, run in runs.items()}
    found: dict[str, list[Chart]] = {}
    for heading in dict.fromkeys(h for by_heading in apart.values() for h in by_heading if h not in ("Time",)):
        lines: dict[tuple[str, str], list[tuple[str, Chart, Series]]] = {}
        for name, by_heading in apart.items():
            for chart in by_heading.get(heading, ()):
                for s in chart.series:
                    lines.setdefault((chart.title, s.label), []).append((name, chart, s))
        alone = {title for title, label in lines if sum(t == title for t, _ in lines) == 1}
        found[heading] = [
            Chart(
                title if title in alone else f"{title}: {label}",
                [replace(s, label=clean(name, 24)) for name, _, s in group],
                percent=all(chart.percent for _, chart, _ in group),
                from_zero=group[0][1].from_zero,
            )
            for (title, label), group in lines.items()
        ]
    return {heading: charts for heading, charts in found.items() if charts}
