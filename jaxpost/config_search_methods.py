"""The `search` section: one frozen dataclass for each method of test-time search. Imports no jax.

A section has the keyword parameters of the function in `jaxpost.search` that its kind names, with the same defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Choice = Literal["best", "weighted", "majority"]
Aggregate = Literal["last", "min", "prod", "mean"]


@dataclass(frozen=True, kw_only=True)
class Greedy:
    """The most probable token, again and again."""

    kind: Literal["greedy"] = "greedy"
    max_tokens: int = 256


@dataclass(frozen=True, kw_only=True)
class Samples:
    """n answers, drawn; the first one counts."""

    kind: Literal["sample"] = "sample"
    n: int = 1
    max_tokens: int = 256


@dataclass(frozen=True, kw_only=True)
class BestOfN:
    """n answers, the best score wins (2110.14168), or the answer whose scores sum to most (2206.02336)."""

    kind: Literal["best_of_n"] = "best_of_n"
    n: int = 16
    max_tokens: int = 256
    choose: Choice = "best"
    aggregate: Aggregate | None = None
    """One number for the scores of steps; None: the verifier's own."""


@dataclass(frozen=True, kw_only=True)
class SelfConsistency:
    """A vote of n answers (2203.11171): counted, weighted, or of the confident ones alone (DeepConf, 2508.15260)."""

    kind: Literal["self_consistency"] = "self_consistency"
    n: int = 16
    max_tokens: int = 256
    weights: Literal["count", "score", "confidence"] = "count"
    measure: Literal["mean", "bottom", "lowest", "tail"] = "mean"
    window: int = 64
    top_logprobs: int = 20
    """The most probable tokens that a token's confidence is made of."""
    keep: float = 1.0
    """Share of the answers, the surest ones, that vote."""
    early_stop: bool = False
    wave: int = 4


@dataclass(frozen=True, kw_only=True)
class BeamSteps:
    """How a step beam goes, but for its width."""

    factor: int = 4
    """Texts drawn for each one that goes on."""
    max_steps: int = 40
    max_tokens: int = 128
    """Of one step."""
    separator: str = "\n\n"
    """Text that ends a step."""
    lookahead: int = 0
    """Further steps that are drawn, greedily, to score a step; they are thrown away."""
    aggregate: Aggregate | None = None
    choose: Choice = "best"


@dataclass(frozen=True, kw_only=True)
class StepBeam(BeamSteps):
    """Beam search over steps: of `width` texts the best width / factor go on (2408.03314)."""

    kind: Literal["step_beam"] = "step_beam"
    width: int = 16


@dataclass(frozen=True, kw_only=True)
class DVTS:
    """width / factor independent step beams that keep one text each."""

    kind: Literal["dvts"] = "dvts"
    width: int = 16
    factor: int = 4
    max_steps: int = 40
    max_tokens: int = 128
    separator: str = "\n\n"
    lookahead: int = 0
    aggregate: Aggregate | None = None
    choose: Choice = "best"


@dataclass(frozen=True, kw_only=True)
class Rebase:
    """`width` children a round, dealt to the open texts by softmax of their scores (2408.00724)."""

    kind: Literal["rebase"] = "rebase"
    width: int = 16
    temperature: float = 0.2
    max_steps: int = 40
    max_tokens: int = 128
    separator: str = "\n\n"
    lookahead: int = 0
    aggregate: Aggregate | None = None
    choose: Choice = "weighted"


@dataclass(frozen=True, kw_only=True)
class TokenBeam:
    """The most probable whole answer that `beams` beams of tokens find."""

    kind: Literal["token_beam"] = "token_beam"
    beams: int = 4
    max_tokens: int = 256
    length_penalty: float = 1.0
    """Above 0 favours longer texts."""
    early_stopping: Literal["no", "yes", "never"] = "no"
    """When it ends: once no open beam at its present length can win, once `beams` have ended, or once none can win at
    any length."""


@dataclass(frozen=True, kw_only=True)
class Oreo:
    """Beam search by a value function (2412.16145): V(s) + likelihood * log p(s), by steps or tokens."""

    kind: Literal["oreo"] = "oreo"
    unit: Literal["step", "token"] = "step"
    beams: int = 4
    expand: int = 4
    """Continuations of each beam."""
    likelihood: float = 0.0
    max_steps: int = 40
    max_tokens: int = 128
    separator: str = "\n\n"
    aggregate: Aggregate | None = None
    choose: Choice = "best"


@dataclass(frozen=True, kw_only=True)
class BudgetForcing:
    """Thinking of a chosen length (s1, 2501.19393): early ends are replaced by "Wait", late ones forced."""

    kind: Literal["budget_forcing"] = "budget_forcing"
    marker: str = "</think>"
    """Text that ends thinking."""
    max_thinking: int = 512
    waits: int = 1
    """How often an end is refused."""
    wait: str = "Wait"
    answer_prefix: str = ""
    """Written behind a forced marker, such as "Final Answer:"."""
    max_tokens: int = 256
    """Of the answer."""


@dataclass(frozen=True, kw_only=True)
class SelfRefine:
    """Draft, critique, revise (2303.17651)."""

    kind: Literal["refine"] = "refine"
    rounds: int = 3
    keep: Literal["last", "best"] = "last"
    """best: by the verifier."""
    answer_tokens: int = 256
    feedback_tokens: int = 256
    feedback_prompt: str | None = None
    """With {problem} and {answer}; None: the library's."""
    refine_prompt: str | None = None
    """With {problem}, {answer} and {feedback}."""
    stop: str = "No mistakes"
    """Feedback that holds it ends the rounds."""


@dataclass(frozen=True, kw_only=True)
class Debate:
    """Agents that read each other's answers, and a vote (2305.14325)."""

    kind: Literal["debate"] = "debate"
    agents: int = 3
    rounds: int = 2
    answer_tokens: int = 256
    prompt: str | None = None
    """With {problem}, {own} and {others}; None: the library's."""


BasicSection = (
    Greedy | Samples | TokenBeam | BestOfN | SelfConsistency | StepBeam | DVTS | Rebase | Oreo | BudgetForcing
    | SelfRefine | Debate
)  # fmt: skip
