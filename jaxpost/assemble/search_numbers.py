"""What the rows of a search say: accuracy of the chosen answer, of any candidate and pass@k, apart, and tokens."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpost.eval.search import Outcome, any_of, pass_at, top_1
from jaxpost.eval.statistics import Interval, bootstrap_mean
from jaxpost.eval.verifiers import report


def summarise(rows: Sequence[Mapping[str, Any]], *, independent: bool) -> dict[str, Any]:
    """Numbers of results.jsonl, each estimate as [value, low, high] with a 95% interval.

    top1: the chosen answer is right (Wilson). any: one of the candidates is, a search's ceiling. pass@k: the chance
    that k fresh samples hold a right one, for the k that every prompt has. A prompt without an answer counts as wrong.
    Prompts whose right answer is not known are in none of them. warnings: the most frequent, with their numbers.

    Args:
      independent: the candidates are independent samples; of others nothing is said of pass@k.
    """
    known = [outcome_of(row) for row in rows if is_known(row)]
    out: dict[str, Any] = {"prompts": len(rows), "failed": sum("error" in row for row in rows), "known": len(known)}
    for name in ("generated", "verified", "read"):
        out[name] = sum(row[name] for row in rows)
    out["spent"] = out["generated"] + out["verified"]
    out["spent_per_prompt"] = _listed(bootstrap_mean([row["generated"] + row["verified"] for row in rows]))
    if warned := Counter(sentence for row in rows for sentence in row.get("warnings", ())):
        out["warnings"] = dict(warned.most_common(5))
    if not known:
        return out
    most = max(1, *(len(outcome.offered) for outcome in known))
    out["top1"], out["any"] = _listed(top_1(known)), _listed(any_of(known, most))
    least = min(len(outcome.offered) for outcome in known)
    for k in [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= least] if independent and least > 1 else []:
        out[f"pass@{k}"] = _listed(pass_at(known, k))
    return out


def is_known(row: Mapping[str, Any]) -> bool:
    """Whether it can be said if the answer is right; without candidates it is wrong where there is a right one."""
    found = row.get("candidates", ())
    return all(c["right"] is not None for c in found) if found else row.get("gold") is not None


def outcome_of(row: Mapping[str, Any]) -> Outcome:
    """A row of results.jsonl, judged."""
    offered = tuple(bool(candidate["right"]) for candidate in row.get("candidates", ()))
    return Outcome(row.get("right") is True, offered, row["generated"] + row["verified"], "error" in row)


def verifier_report(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The calibration and false-accept report of the verifier and its parts, over all candidates of which it is known
    whether they are right; None where none was judged, or all are right or all wrong."""
    told = [(c["judged"], c["right"]) for row in rows for c in row.get("candidates", ()) if c.get("judged")]
    known = [(judged, bool(right)) for judged, right in told if right is not None]
    right = [label for _, label in known]
    if len(set(right)) < 2:
        return None
    names = dict.fromkeys(name for judged, _ in known for name in judged if not name.endswith("unreadable"))
    return report({name: [judged.get(name, math.nan) for judged, _ in known] for name in names}, right)


def _listed(found: Interval) -> list[float]:
    return [round(float(x), 6) for x in found]


def told(numbers: Mapping[str, Any]) -> list[str]:
    """The numbers in lines.

    >>> told({"prompts": 4, "failed": 0, "known": 4, "generated": 100, "verified": 20, "spent": 120,
    ...       "spent_per_prompt": [30.0, 20.0, 40.0], "top1": [0.5, 0.15, 0.85], "any": [0.75, 0.3, 0.95]})[0]
    'right: 50.0% [15.0, 85.0] of 4 prompts; any candidate 75.0% [30.0, 95.0]'
    """
    lines = []
    if "top1" in numbers:
        parts = [
            f"right: {_share(numbers['top1'])} of {numbers['known']} prompts",
            f"any candidate {_share(numbers['any'])}",
        ]
        parts += [f"{name} {_share(value)}" for name, value in numbers.items() if name.startswith("pass@")]
        lines.append("; ".join(parts))
    each = numbers["spent_per_prompt"][0]
    kinds = f"{numbers['generated']} generated + {numbers['verified']} verifier"
    lines.append(f"spent: {numbers['spent']} tokens ({kinds}), {each:.0f} a prompt")
    if numbers["failed"]:
        lines.append(f"{numbers['failed']} of {numbers['prompts']} prompts failed; their rows say why")
    lines += [
        f"{count} of {numbers['prompts']} prompts: {sentence[:300]}"
        for sentence, count in numbers.get("warnings", {}).items()
    ]
    return lines


def _share(value: Sequence[float]) -> str:
    return f"{100 * value[0]:.1f}% [{100 * value[1]:.1f}, {100 * value[2]:.1f}]"
