"""Alarms over the metrics of an online run: what goes wrong in reinforcement learning while the reward looks fine.

`watch` is a pure function: state and record in, new state and alarms out. The state is a plain dict that survives
JSON, so that a resumed run raises the alarms that an uninterrupted one would have raised. Every metric is smoothed
by an exponential mean, and compared with a limit or with its own first values. An alarm is raised when its limit is
crossed, and again only after the metric has come back by a margin (hysteresis).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, NamedTuple

from jaxpost.config_watch import WatchCommon, WatchSection

State = dict[str, Any]


Limits = WatchSection
"""Where alarms are raised."""


class Alarm(NamedTuple):
    """One crossing of a limit, as it stands in alarms.jsonl."""

    step: int
    alarm: str
    """Its name: `reward_hacking`, or that of a rule in `RULES`."""
    message: str
    """A sentence with numbers, and what to do."""


class Rule(NamedTuple):
    """When a metric of training records raises an alarm."""

    metric: str
    limit: Callable[[Any, float], float]
    """(limits, first value) -> the limit."""
    above: bool
    message: str
    """Formatted with value, first and limit."""


RULES: dict[str, Rule] = {
    "kl": Rule(
        "kl",
        lambda limits, first: limits.kl,
        True,
        "the KL from the reference is {value:.3g} nats a token, above {limit:.3g}: the policy has left the model that "
        "it came from. Read samples; raise the KL's coefficient or lower the learning rate.",
    ),
    "old_kl": Rule(
        "old_kl",
        lambda limits, first: limits.old_kl,
        True,
        "one step moves the policy by {value:.3g} nats a token, above {limit:.3g}: updates are too large. Lower the "
        "learning rate, or take fewer updates from each batch of samples.",
    ),
    "length_growth": Rule(
        "answer_tokens",
        lambda limits, first: limits.length_up * first,
        True,
        "answers have grown from {first:.1f} to {value:.1f} tokens, more than {limit:.1f}. Fine if longer answers are "
        "right more often; otherwise the reward or the loss's mean pays for length.",
    ),
    "length_collapse": Rule(
        "answer_tokens",
        lambda limits, first: limits.length_down * first,
        False,
        "answers have shrunk from {first:.1f} to {value:.1f} tokens, less than {limit:.1f}. Fine if short answers are "
        "what is asked for; otherwise the reward can be had without the work. Read samples.",
    ),
    "repetition": Rule(
        "repetition",
        lambda limits, first: limits.repetition,
        True,
        "{value:.0%} of the 4-grams in an answer are repeated, above {limit:.0%}: answers degenerate. Read samples; "
        "add a repetition penalty to the reward or go back to an earlier checkpoint.",
    ),
    "entropy_collapse": Rule(
        "entropy",
        lambda limits, first: limits.entropy * first,
        False,
        "the entropy fell from {first:.3g} to {value:.3g} nats a token, below {limit:.3g}: samples of a prompt become "
        "alike and exploration ends. Raise clip_high or the entropy bonus, or lower the learning rate.",
    ),
    "zero_variance": Rule(
        "zero_variance",
        lambda limits, first: limits.zero_variance,
        True,
        "in {value:.0%} of the groups all rewards are equal, above {limit:.0%}, and such groups teach nothing: the "
        "prompts are too easy or too hard. Change their difficulty, draw more samples of each, or refill the batch.",
    ),
    "unscored": Rule(
        "unscored",
        lambda limits, first: limits.unscored,
        True,
        "{value:.0%} of the samples have no reward, above {limit:.0%}: a reward function fails or takes too long, "
        "which the log names, or answers are cut off and loss.truncated is unscore.",
    ),
    "sampler_mismatch": Rule(
        "sampler_gap",
        lambda limits, first: limits.sampler_gap,
        True,
        "sampler and learner differ by {value:.3g} nats a token, above {limit:.3g}: samples are not the policy's own. "
        "Compute both in one precision, check temperature and top-p, or correct by importance weights.",
    ),
    "effective_sample_size": Rule(
        "effective_sample_size",
        lambda limits, first: limits.effective_sample_size,
        False,
        "importance weights leave {value:.0%} of the samples, below {limit:.0%}: few samples carry the gradient. Take "
        "fewer updates from a batch, lower the learning rate, or allow less staleness.",
    ),
    "truncation": Rule(
        "truncated",
        lambda limits, first: first + limits.truncation_rise,
        True,
        "{value:.0%} of the answers are cut off, at first {first:.0%}: they do not end in time. Allow more tokens, or "
        "let the reward ask for an end.",
    ),
}
"""The alarms on a training metric, by name."""


def watch(
    state: State,
    record: Mapping[str, Any],
    *,
    limits: Limits | None = None,
    gold: str | None = None,
) -> tuple[State, list[Alarm]]:
    """Take in one record of metrics.jsonl.

    Args:
      state: of the call before; {} at the start.
      record: of kind "train" or "eval"; what it lacks, or is not finite, is passed over.
      limits: None: the defaults.
      gold: the evaluation whose accuracy is the truth that the reward stands for; None: each record's first.

    Returns:
      The new state, and the alarms that this record raises.

    Example:
      >>> state, raised = {}, []
      >>> for step, entropy in enumerate([2.0, 2.0, 0.1, 0.01, 0.01]):
      ...     record = {"step": step, "kind": "train", "entropy": entropy}
      ...     state, alarms = watch(state, record, limits=Limits(window=1.0, first=2))
      ...     raised += [(alarm.step, alarm.alarm) for alarm in alarms]
      >>> raised
      [(2, 'entropy_collapse')]
    """
    limits = Limits() if limits is None else limits
    state = _copied(state)
    if record.get("kind") == "train":
        return watch_rules(state, record["step"], _metrics(record), rules=RULES, limits=limits)
    if record.get("kind") == "eval":
        message = _gold_against_proxy(state, record, limits, gold)
        return state, [] if message is None else [Alarm(int(record["step"]), "reward_hacking", message)]
    return state, []


def watch_rules(
    state: State, step: int, metrics: Mapping[str, float], *, rules: Mapping[str, Rule], limits: WatchCommon
) -> tuple[State, list[Alarm]]:
    """Take in the metrics of one training record, by any rules.

    Args:
      metrics: finite numbers; a rule whose metric is absent waits.
      limits: what the rules' limits read.
    """
    state = _copied(state)
    _take_in(state, metrics, limits)
    alarms = [
        Alarm(int(step), name, message)
        for name, rule in rules.items()
        if (message := _check(state, name, rule, limits)) is not None
    ]
    return state, alarms


def _copied(state: State) -> State:
    return {"smooth": {}, "first": {}, "raised": [], "golds": {}} | {
        key: dict(value) if isinstance(value, Mapping) else list(value) for key, value in state.items()
    }


def _metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers that are watched: the record's own, and shares of counts."""
    names = {rule.metric for rule in RULES.values()} | {"reward", "reward_std"}
    found = {name: record[name] for name in names - {"zero_variance", "unscored"} if name in record}
    for name, part, whole in (
        ("zero_variance", "zero_variance_groups", "groups"),
        ("unscored", "unscored", "samples"),
    ):
        if part in record and record.get(whole):
            found[name] = record[part] / max(record[whole], record[part])
    return {k: float(v) for k, v in found.items() if isinstance(v, Real) and math.isfinite(v)}


def _take_in(state: State, metrics: Mapping[str, float], limits: WatchCommon) -> None:
    keep = 1.0 - 1.0 / max(limits.window, 1.0)
    for name, value in metrics.items():
        total, weight = state["smooth"].get(name, (0.0, 0.0))
        state["smooth"][name] = [keep * total + (1 - keep) * value, keep * weight + (1 - keep)]
        total, count = state["first"].get(name, (0.0, 0))
        if count < limits.first:
            state["first"][name] = [total + value, count + 1]


def _smoothed(state: State, name: str) -> float:
    total, weight = state["smooth"][name]
    return total / weight


def _first(state: State, name: str, limits: WatchCommon) -> float | None:
    """The mean of the first records; None before there are enough."""
    total, count = state["first"].get(name, (0.0, 0))
    return total / count if count >= max(limits.first, 1) else None


def _check(state: State, name: str, rule: Rule, limits: WatchCommon) -> str | None:
    """The message of a rule whose limit has just been crossed; keeps `raised` up to date."""
    first = _first(state, rule.metric, limits)
    if first is None:
        return None
    value, limit = _smoothed(state, rule.metric), rule.limit(limits, first)
    sign = 1 if rule.above else -1
    if not math.isfinite(limit):
        return None
    if sign * (value - limit) > 0:
        if name not in state["raised"]:
            state["raised"] = sorted([*state["raised"], name])
            return rule.message.format(value=value, first=first, limit=limit)
    elif sign * (value - limit) < -limits.margin * abs(limit):
        state["raised"] = [other for other in state["raised"] if other != name]
    return None


def _gold_against_proxy(state: State, record: Mapping[str, Any], limits: Limits, gold: str | None) -> str | None:
    """Held-out accuracy against the smoothed reward, since the first evaluation and since the best one."""
    keys = [key for key in record if key.endswith("/accuracy")]
    key = f"{gold}/accuracy" if gold else next(iter(keys), "")
    accuracy = record.get(key)
    if not isinstance(accuracy, Real) or not math.isfinite(accuracy):
        return None
    name = key.removesuffix("/accuracy")
    high = float(record.get(f"{name}/high", accuracy))
    reward = _smoothed(state, "reward") if "reward" in state["smooth"] else None
    now = {"step": int(record["step"]), "accuracy": float(accuracy), "reward": reward}
    golds = state["golds"]
    message = None
    if reward is not None and golds:
        # An evaluation before the first update is compared with the rewards of the first steps.
        rise = {w: reward - (old if (old := golds[w]["reward"]) is not None else _mean_first(state)) for w in golds}
        enough = limits.reward_rise * max(_mean_first(state, "reward_std"), 1e-6)
        for which, worse in (
            ("first", accuracy <= golds["first"]["accuracy"]),
            ("best", high < golds["best"]["accuracy"]),
        ):
            if message is None and worse and rise[which] >= enough:
                message = _hacking(state, name, golds[which], now, limits)
    if not golds:
        golds["first"] = now
    if accuracy > golds.get("best", {"accuracy": -math.inf})["accuracy"]:
        golds["best"] = now
    raised = "reward_hacking" in state["raised"]
    state["raised"] = sorted({*state["raised"]} - {"reward_hacking"} | ({"reward_hacking"} if message else set()))
    return None if raised else message


def _mean_first(state: State, name: str = "reward") -> float:
    total, count = state["first"].get(name, (0.0, 0))
    return total / count if count else 0.0


def _hacking(state: State, name: str, then: Mapping[str, Any], now: Mapping[str, Any], limits: Limits) -> str:
    old = then["reward"] if then["reward"] is not None else _mean_first(state)
    signs = [
        f"{label} {start:.3g} -> {_smoothed(state, metric):.3g}"
        for metric, label in (("kl", "KL"), ("answer_tokens", "tokens"), ("repetition", "repetition"))
        if (start := _first(state, metric, limits)) is not None
    ]
    beside = f" Beside it: {', '.join(signs)}." if signs else ""
    return (
        f"since step {then['step']} the reward rose from {old:.3g} to {now['reward']:.3g}, and accuracy on {name} went "
        f"from {then['accuracy']:.1%} to {now['accuracy']:.1%}: the policy may have found a way to the reward that is "
        f"not the task.{beside} Read the samples with the highest reward; mend the reward, or stop."
    )
