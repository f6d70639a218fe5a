"""Alarms over the metrics of preference optimisation, for what goes wrong while the margins look fine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from jaxpost.config_watch import PreferenceWatchSection
from jaxpost.train.watch import Alarm, Rule, State, watch_rules

Limits = PreferenceWatchSection

RULES: dict[str, Rule] = {
    "chosen_falls": Rule(
        "chosen_change",
        lambda limits, first: -limits.chosen_fall,
        False,
        "the chosen answers have become less probable, by {value:.3g} nats a token (limit {limit:.3g}): the margin "
        "grows because the rejected ones fall faster, and the probability goes to answers that nobody judged. Add a "
        "term for the chosen side (as in configs/dpo/rpo.yaml), lower the learning rate, or raise beta.",
    ),
    "chosen_drops": Rule(
        "chosen_logprob",
        lambda limits, first: first - limits.chosen_fall,
        False,
        "the chosen answers' log-probability fell from {first:.3g} to {value:.3g} nats a token (limit {limit:.3g}), "
        "and this loss has no reference to hold it. Add a `sft` loss beside it, or lower the learning rate.",
    ),
    "kl": Rule(
        "kl",
        lambda limits, first: limits.kl,
        True,
        "the KL from the reference is {value:.3g} nats a token, above {limit:.3g}: the policy has left the model that "
        "it came from. Read samples; raise beta or lower the learning rate.",
    ),
}
"""The alarms, by name."""


def watch(
    state: State, record: Mapping[str, Any], *, limits: Limits | None = None, centred: bool
) -> tuple[State, list[Alarm]]:
    """Take in one record of metrics.jsonl.

    Args:
      state: of the call before; {} at the start. A plain dict that survives JSON.
      limits: None: the defaults.
      centred: the log-probabilities are compared with a reference's.

    Returns:
      The new state, and the alarms that this record raises.

    Example:
      >>> state, raised = {}, []
      >>> for step, chosen in enumerate([0.0, 0.0, -0.01, -0.2, -0.3]):
      ...     record = {"step": step, "kind": "train", "logratios/chosen": 10 * chosen, "tokens/chosen": 10.0}
      ...     limits = PreferenceWatchSection(window=1.0, first=2)
      ...     state, alarms = watch(state, record, limits=limits, centred=True)
      ...     raised += [(alarm.step, alarm.alarm) for alarm in alarms]
      >>> raised
      [(3, 'chosen_falls')]
    """
    if record.get("kind") != "train":
        return state, []
    found = {name: float(x) for name, x in record.items() if isinstance(x, Real) and math.isfinite(float(x))}
    metrics = {name: found[name] for name in ("kl",) if name in found}
    tokens = found.get("tokens/chosen", 0.0)
    source, metric = ("logratios/chosen", "chosen_change") if centred else ("logprobs/chosen", "chosen_logprob")
    if tokens > 0 and source in found:
        metrics[metric] = found[source] / tokens
    return watch_rules(state, record["step"], metrics, rules=RULES, limits=limits or Limits())
