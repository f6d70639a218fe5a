"""A `verifier` section -> the verifier of a search."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxpost.assemble.reward_scores import load_reward_model
from jaxpost.assemble.rewards import make_pool
from jaxpost.assemble.search_rewards import reward_verifier
from jaxpost.config import ModelSection
from jaxpost.config_verify import (
    FactVerifier,
    Game24Verifier,
    JudgeVerifier,
    LogicVerifier,
    ModelVerifier,
    RuleVerifier,
    SafetyVerifier,
    SyntaxVerifier,
    VerifierPart,
    VerifierSection,
)
from jaxpost.rewards.contract import Sample
from jaxpost.rewards.runner import Pool
from jaxpost.search.compose import Composed, Gate, Squashed
from jaxpost.search.contract import Case, Policy, Verdict, Verifier
from jaxpost.search.game24 import Solver
from jaxpost.search.judge import Judge
from jaxpost.search.tree import Node
from jaxpost.search.verifiers import Facts, Logic, Safety, Syntax, read_passages, read_patterns

Examples = Mapping[int, Mapping[str, Any]]
"""Rows of the problems by number."""


def make_verifier(
    section: VerifierSection, policy: Policy, judges: Callable[[str], Policy], examples: Examples
) -> tuple[Verifier | None, Callable[[], None]]:
    """The verifier that a section names (None: none), and what ends its worker processes.

    Args:
      policy: the searched one, which may judge too.
      judges: another model as a policy, by its path.
      examples: of the problems, for rules.

    Raises:
      ValueError, FileNotFoundError: a part that cannot be made; names it.
    """
    made: dict[str, Verifier] = {}
    pools: list[Pool] = []
    for i, part in enumerate(section.parts):
        try:
            made[part.name] = _make(part, policy, judges, examples, pools)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"verifier.parts.{i} ({part.kind}): {error}") from None

    def close() -> None:
        for pool in pools:
            pool.close()

    if not made:
        return None, close
    squashed = {part.name: part.squash == "sigmoid" for part in section.parts}
    found = {name: Squashed(verifier) if squashed[name] else verifier for name, verifier in made.items()}
    names = list(found)
    if len(found) == 1:
        return found[names[0]], close
    if section.combine == "gate":
        rest = {name: found[name] for name in names[1:]}
        then = rest[names[1]] if len(rest) == 1 else Composed(rest)
        last = names[1] if len(rest) == 1 else "then"
        return Gate(found[names[0]], then, section.threshold, section.otherwise, (names[0], last)), close
    weights = {part.name: part.weight for part in section.parts} if section.combine == "mean" else {}
    return Composed(found, section.combine, weights), close


def _make(
    part: VerifierPart, policy: Policy, judges: Callable[[str], Policy], examples: Examples, pools: list[Pool]
) -> Verifier:
    if isinstance(part, SyntaxVerifier):
        return Syntax(part.forms)
    if isinstance(part, LogicVerifier):
        return Logic(part.empty)
    if isinstance(part, FactVerifier):
        known = {"overlap": part.overlap, "best": part.best, "least": part.least, "empty": part.empty}
        return Facts(read_passages(part.path, key=part.key), **known)
    if isinstance(part, SafetyVerifier):
        return Safety(read_patterns(part.path), part.must_refuse, part.needless_refusal)
    if isinstance(part, Game24Verifier):
        return Solver()
    if isinstance(part, JudgeVerifier):
        return _judge(part, judges(part.path) if part.path else policy)
    if isinstance(part, ModelVerifier):
        section = ModelSection(param_dtype=part.param_dtype, compute_dtype=part.compute_dtype)
        return reward_verifier(load_reward_model(part.path, section=section), how=part.aggregate)
    assert isinstance(part, RuleVerifier)
    pools.append(make_pool(part.reward, key="reward"))
    return Rules(pools[-1], examples)


def _judge(part: JudgeVerifier, policy: Policy) -> Judge:
    return Judge(
        policy, part.mode, part.max_tokens, part.verdicts, part.low, part.high, part.criteria,
        {"temperature": part.temperature}, part.unreadable,
    )  # fmt: skip


@dataclass
class Rules:
    """Reward functions as a verifier: an oracle, for it sees the row that says what is right."""

    pool: Pool
    examples: Examples

    def __call__(self, cases: Sequence[Case]) -> Sequence[Verdict | str]:
        texts = [Sample(case.node.answer, _tokens(case.node), case.node.end or "stop") for case in cases]
        scored = self.pool([self.examples[case.problem.number] for case in cases], texts)
        why = {problem.row: str(problem) for problem in scored.problems}
        scores = next(iter(scored.rewards.values()))
        return [
            why.get(i, "the rule gave no number") if math.isnan(score) else Verdict(float(score))
            for i, score in enumerate(scores)
        ]

    def price(self, case: Case, new_tokens: int) -> int:
        return 0

    def forget(self, nodes: Sequence[Node]) -> None:
        """Nothing is held."""


def _tokens(node: Node) -> tuple[int, ...]:
    return tuple(token for piece in node.path for token in piece.tokens)
