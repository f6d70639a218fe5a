"""The `search` section of methods that grow trees or choose between methods. Imports no jax."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jaxpost.config_search_methods import BasicSection, BeamSteps, Greedy, SelfConsistency


@dataclass(frozen=True, kw_only=True)
class TreeOfThoughts:
    """Thoughts that are generated, judged and searched breadth-first or depth-first (2305.10601)."""

    kind: Literal["tree_of_thoughts"] = "tree_of_thoughts"
    order: Literal["breadth", "depth"] = "breadth"
    generator: Literal["sample", "propose"] = "sample"
    evaluator: Literal["value", "vote", "verifier"] = "value"
    branch: int = 5
    """Thoughts of each state."""
    keep: int = 5
    """States that a level keeps (breadth)."""
    depth: int = 3
    evaluations: int = 3
    """Draws of a verdict, or votes."""
    threshold: float = 0.01
    """States at or below it are left (depth)."""
    max_states: int = 100
    separator: str = "\n"
    step_tokens: int = 64
    answer_tokens: int = 256
    verdict_tokens: int = 128
    propose_prompt: str | None = None
    """With {problem}, {steps} and {branch}; None: the library's."""
    value_prompt: str | None = None
    """With {problem} and {steps}."""
    vote_prompt: str | None = None
    """With {problem} and {choices}."""
    words: dict[str, float] | None = None
    """Last lines of a verdict and their values; None: sure 1, likely 0.05, impossible 0.00005."""
    read_proposals: Literal["listed", "game24"] = "listed"
    """How thoughts are read in a reply: lines with a dash, or steps of the game of 24."""


@dataclass(frozen=True, kw_only=True)
class TreeSteps:
    """How a Monte-Carlo tree search over steps goes, but for its depth."""

    simulations: int = 32
    moves: int = 1
    """Times that a move is made and its subtree kept."""
    branch: int = 4
    rule: Literal["puct", "uct"] = "puct"
    exploration: float = 1.25
    value: Literal["score", "rollout", "agreement"] = "score"
    rollouts: int = 2
    rollout_temperature: float | None = None
    leaves: int = 1
    """Leaves that are valued at a time."""
    choose: Literal["visits", "value", "score"] = "visits"
    separator: str = "\n"
    step_tokens: int = 64
    answer_tokens: int = 256


@dataclass(frozen=True, kw_only=True)
class MCTS(TreeSteps):
    """Monte-Carlo tree search over steps: PUCT or UCT, values by the verifier, rollouts or agreement."""

    kind: Literal["mcts"] = "mcts"
    max_depth: int = 8


@dataclass(frozen=True, kw_only=True)
class TokenMCTS:
    """Tree search over the most probable tokens: Gumbel with sequential halving (2111.00210), or PUCT."""

    kind: Literal["token_mcts"] = "token_mcts"
    simulations: int = 16
    best: int = 8
    """Tokens that a node may choose from."""
    search_tokens: int = 32
    """Tokens that are searched; the rest is drawn greedily."""
    rule: Literal["gumbel", "puct"] = "gumbel"
    value: Literal["score", "logprob", "rollout"] = "score"
    rollouts: int = 1
    rollout_temperature: float | None = 0.0
    prompt_value: float = 0.0
    max_depth: int | None = None
    considered: int = 8
    """Actions that the root considers (gumbel)."""
    gumbel_scale: float = 1.0
    value_scale: float = 0.1
    maxvisit_init: float = 50.0
    pb_c_init: float = 1.25
    pb_c_base: float = 19652.0
    dirichlet_fraction: float = 0.25
    dirichlet_alpha: float = 0.3
    answer_tokens: int = 256
    seed: int = 0
    """Of the search's own noise."""


@dataclass(frozen=True, kw_only=True)
class RAP:
    """Reasoning as planning (2305.14992): sub-questions, answers by agreement, a reward of both."""

    kind: Literal["rap"] = "rap"
    simulations: int = 16
    branch: int = 3
    answers: int = 3
    max_depth: int = 5
    alpha: float = 0.5
    exploration: float = 1.0
    leaves: int = 1
    choose: Literal["visits", "value", "vote"] = "vote"
    question_piece: str = "Question {t}: "
    answer_piece: str = "Answer {t}: "
    final: str = "Now we can answer the question."
    useful_prompt: str | None = None
    """With {problem}, {steps} and {question}; None: the library's."""
    useful_words: tuple[str, ...] = ("Yes", "No")
    """What a useful question is answered with, and a useless one."""
    separator: str = "\n"
    step_tokens: int = 64
    answer_tokens: int = 256


@dataclass(frozen=True, kw_only=True)
class RStar:
    """Five kinds of actions, and a second look at what was found (2408.06195)."""

    kind: Literal["rstar"] = "rstar"
    simulations: int = 16
    actions: tuple[Literal["step", "rest", "subquestion", "reanswer", "rephrase"], ...] = (
        "step", "rest", "subquestion", "reanswer", "rephrase",
    )  # fmt: skip
    branch: int = 2
    max_depth: int = 5
    rollouts: int = 1
    exploration: float = 2.0
    leaves: int = 1
    checks: int = 1
    """Second looks at every answer."""
    given: float = 0.5
    """Share of an answer that a second look is shown."""
    pieces: dict[str, str] | None = None
    """What leads each action's text; None: the library's."""
    separator: str = "\n"
    step_tokens: int = 64
    answer_tokens: int = 256


@dataclass(frozen=True, kw_only=True)
class MeasuringSection:
    """How a prompt's difficulty is estimated: features within [0, 1], and their weighted mean."""

    weights: dict[str, float] = field(default_factory=dict)
    """Of length, domain, ambiguity, past, agreement, surprise and verifier; 1 where nothing is said."""
    probes: int = 4
    """Samples that are drawn to look at; they cost tokens."""
    greedy: bool = False
    """The first probe is drawn at temperature 0."""
    max_tokens: int = 256
    sampling: dict[str, float] = field(default_factory=dict)
    """Of the probes: temperature, top_p ..."""
    long_prompt: int = 200
    """Tokens of a prompt that counts as long."""
    domain_words: tuple[str, ...] | None = None
    """None: the library's, of mathematics."""
    many_domain: int = 3
    """Words of the domain that count as many."""
    ambiguous_words: tuple[str, ...] | None = None
    many_ambiguous: int = 4
    surprising: float = 1.0
    """Nats a token that count as surprising."""
    score: bool = False
    """The verifier judges the probes."""


@dataclass(frozen=True, kw_only=True)
class Allocate:
    """By estimated difficulty: below `easy` greedy, below `hard` a step beam, else MCTS (2408.03314)."""

    kind: Literal["allocate"] = "allocate"
    easy: float = 0.3
    hard: float = 0.7
    width: int = 3
    """Of the beam."""
    depth: int = 5
    """Of the tree search."""
    snr: float | None = None
    """The verifier's measured signal-to-noise ratio, which caps the width."""
    least: float = 0.1
    """What one more beam must gain where it is capped, in deviations of the values."""
    measuring: MeasuringSection = MeasuringSection()
    greedy: Greedy = Greedy()
    beam: BeamSteps = BeamSteps()
    tree: TreeSteps = TreeSteps()


TreeSection = TreeOfThoughts | MCTS | TokenMCTS | RAP | RStar


@dataclass(frozen=True, kw_only=True)
class Metacognition:
    """A cheap method, and a dear one where the first leaves one unsure."""

    kind: Literal["metacognition"] = "metacognition"
    cheap: BasicSection = Greedy()
    dear: BasicSection | TreeSection = SelfConsistency()
    signal: Literal["entropy", "confidence", "disagreement", "score"] = "entropy"
    threshold: float = 0.5
    """Uncertainty above it asks the dear method."""
    window: int = 16
    """Of `confidence`, in tokens."""
    top_logprobs: int = 20
    """The most probable tokens that `entropy` and `confidence` look at."""


SearchMethodSection = BasicSection | TreeSection | Allocate | Metacognition
