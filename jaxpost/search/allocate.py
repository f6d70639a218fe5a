"""Compute where it helps: the plain policy by thresholds of difficulty, and one prompt set with a fixed total.

Plain (after 2408.03314, where the best use of test-time compute depends on the difficulty): below `easy` greedy, below
`hard` a beam, else a tree search. Fitted: `spend` probes all prompts, and `curves.Fitted` gives each its method and
budget, so that the total is spent where the marginal gain is greatest.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from jaxpost.search.contract import Method, Policy, Search, SearchOutput, Verifier
from jaxpost.search.curves import Fitted, Level, Plan
from jaxpost.search.difficulty import MEASURING, Measuring, measure, probe_only, vote_of
from jaxpost.search.drive import Progress, search
from jaxpost.search.tree import Problem
from jaxpost.search.width import widest


def plain(
    problem: Problem, *, greedy: Method, beam: Callable[[Problem, int], Search],
    tree: Callable[[Problem, int], Search], measuring: Measuring = MEASURING, easy: float = 0.3, hard: float = 0.7,
    width: int = 3, depth: int = 5, snr: float | None = None, least: float = 0.1,
) -> Search:  # fmt: skip
    """Difficulty < easy: greedy; < hard: a beam of `width`; else a tree search (MCTS) of `depth`.

    Args:
      beam: (problem, width) -> search.
      tree: (problem, depth) -> search.
      snr: the scorer's measured signal-to-noise ratio, which caps the width (`width.widest`); None: no cap.
      least: what one more beam must gain (`width.widest`).
    """
    found = yield from measure(problem, measuring)
    if found.difficulty < easy:
        chosen, searching = "greedy", greedy(problem)
    elif found.difficulty < hard:
        wide = width if snr is None else min(width, widest(snr, least=least, most=width))
        chosen, searching = f"beam {wide}", beam(problem, wide)
    else:
        chosen, searching = f"tree {depth}", tree(problem, depth)
    problem.root.facts["chosen"] = chosen
    result = yield from searching
    return result if result.candidates else vote_of(problem, found)


class Option(NamedTuple):
    """What a fitted policy may choose: a method for each budget, and the verifiers that it asks."""

    make: Callable[[int], Method]
    verifiers: Mapping[str, Verifier] = {}


@dataclass(frozen=True)
class Spending:
    """What a fixed total was spent on.

    Attributes:
      outputs: by prompt; their ledgers hold the probes' tokens too.
      difficulties, plan: of the prompts.
      probe_tokens: spent on measuring.
    """

    outputs: Sequence[SearchOutput]
    difficulties: Sequence[float]
    plan: Plan
    probe_tokens: int

    @property
    def spent(self) -> int:
        return sum(output.tokens_spent for output in self.outputs)

    def report(self, right: Sequence[bool]) -> dict[str, float]:
        """Predicted and realised accuracy, tokens, and the share of prompts that each choice had."""
        out = {
            "predicted": self.plan.predicted,
            "realised": sum(right) / len(right) if right else math.nan,
            "tokens": float(self.spent),
            "probe_tokens": float(self.probe_tokens),
        }
        names = [choice.method or "none" for choice in self.plan.choices]
        return out | {f"share/{name}": names.count(name) / len(names) for name in sorted(set(names))}


def _later(problem: Problem, *, method: Method, first: int) -> Search:
    """The noise of a prompt's second search is not its probes': its nodes are numbered after theirs."""
    problem.nodes = max(problem.nodes, first)
    return (yield from method(problem))


def spend(
    prompts: Sequence[Any], fitted: Fitted, policy: Policy, *, total: int, options: Mapping[str, Option],
    measuring: Measuring = MEASURING, verifiers: Mapping[str, Verifier] | None = None,
    canonical: Callable[[str], str | None] = str.strip, numbers: Sequence[int] | None = None, together: int = 16,
    progress: Callable[[Progress], None] | None = None,
) -> Spending:  # fmt: skip
    """Searches all prompts with `total` generated + verifier tokens.

    First every prompt is measured (its probes count); then `fitted.plan` gives it a method and a budget of what is
    left. A prompt that is given nothing more is answered by the vote of its probes. The total is never exceeded: a
    policy fitted at cost "mean" plans with what methods spend, not with their limits, so that no more prompts are
    searched at a time than there is room for their limits, and the last may get less than planned, or nothing.

    Args:
      options: by the names of methods that the fitted policy uses.
      verifiers: of the measuring.

    Raises:
      ValueError: the fitted policy names a method that is not among the options.
    """
    missing = fitted.methods - set(options)
    if missing:
        raise ValueError(f"the fitted policy uses {', '.join(sorted(missing))}: no such method was given")
    names = list(range(len(prompts))) if numbers is None else list(numbers)
    common: dict[str, Any] = {"canonical": canonical, "together": together, "progress": progress}
    share = total // max(1, len(prompts))
    probing = partial(probe_only, how=measuring)
    outputs = search(prompts, probing, policy, budget=share, numbers=names, verifiers=verifiers, **common)
    spent = sum(output.tokens_spent for output in outputs)
    levels = [float(output.tree.facts.get("difficulty", 0.5)) for output in outputs]
    plan = fitted.plan(levels, total - spent)
    left, waiting = total - spent, [i for i, choice in enumerate(plan.choices) if choice.budget > 0]
    while waiting and left > 0:
        limits = _within({i: plan.choices[i].budget for i in waiting[:together]}, left)
        waiting = waiting[len(limits) :]
        for group in _groups(limits, options, plan):
            found = search(
                [prompts[i] for i in group],
                [_bound(options, plan.choices[i], outputs[i].problem.nodes) for i in group],
                policy, budget=[limits[i] for i in group], numbers=[names[i] for i in group],
                verifiers=options[plan.choices[group[0]].method].verifiers, **common,
            )  # fmt: skip
            for i, output in zip(group, found, strict=True):
                left -= output.tokens_spent
                outputs[i] = _joined(outputs[i], output)
    return Spending(outputs, levels, plan, spent)


def _within(budgets: Mapping[int, int], left: int) -> dict[int, int]:
    """The first prompts' budgets, as many as fit into what is left; the first gets what is left if none does."""
    fitting: dict[int, int] = {}
    for i, budget in budgets.items():
        if budget > left and fitting:
            break
        fitting[i] = min(budget, left)
        left -= fitting[i]
        if left <= 0:
            break
    return fitting


def _groups(chunk: Iterable[int], options: Mapping[str, Option], plan: Plan) -> Iterable[list[int]]:
    """Prompts by the verifiers that their methods ask."""
    groups: dict[tuple[tuple[str, int], ...], list[int]] = defaultdict(list)
    for i in chunk:
        asked = options[plan.choices[i].method].verifiers
        groups[tuple(sorted((name, id(verifier)) for name, verifier in asked.items()))].append(i)
    return groups.values()


def _bound(options: Mapping[str, Option], choice: Level, first: int) -> Method:
    return partial(_later, method=options[choice.method].make(choice.budget), first=first)


def _joined(probed: SearchOutput, searched: SearchOutput) -> SearchOutput:
    """The second search's result with the first one's tokens; the probes' answer where the second has none."""
    before, after = probed.problem.ledger, searched.problem.ledger
    after.limit = None if after.limit is None else after.limit + before.spent
    after.generated += before.generated
    after.verified += before.verified
    after.read += before.read
    searched.tree.facts |= {k: v for k, v in probed.tree.facts.items() if k in ("difficulty", "features")}
    whole = any(c.node is None or c.node.complete for c in searched.answers)
    if whole or not probed.answers:
        return searched
    return replace(searched, answers=probed.answers, votes=probed.votes, error=None)
