"""`method: search`: what a search at test time can be told. Imports no jax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxpost.config import ModelSection
from jaxpost.config_rewards import RewardSection
from jaxpost.config_rl import ArithmeticPrompts, AskedPrompts, CountdownPrompts, FilePrompts, Game24Prompts, GymPrompts
from jaxpost.config_search_methods import Greedy
from jaxpost.config_search_trees import SearchMethodSection
from jaxpost.config_verify import VerifierSection


@dataclass(frozen=True, kw_only=True)
class PlainPrompts(AskedPrompts):
    """A file as `jaxpost generate --file` reads it: one prompt a line, or JSONL with prompt or messages.

    A row's `sampling` goes before the section's; its other columns are what `gold` reads.
    """

    kind: Literal["plain"] = "plain"
    path: str = ""


SearchPromptsSection = PlainPrompts | FilePrompts | ArithmeticPrompts | Game24Prompts | CountdownPrompts | GymPrompts


@dataclass(frozen=True, kw_only=True)
class DrawSection:
    """How the policy draws, where the method does not say otherwise; `SamplingParams` by name."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0


@dataclass(frozen=True, kw_only=True)
class ZeroShotThoughts:
    """An instruction behind every prompt (2205.11916)."""

    kind: Literal["zero_shot"] = "zero_shot"
    instruction: str = "Let's think step by step."


@dataclass(frozen=True, kw_only=True)
class StepThoughts:
    """The request for steps that a search can tell apart (by its separator), and for one boxed answer."""

    kind: Literal["steps"] = "steps"
    instruction: str | None = None
    """None: the library's, whose steps have an empty line between them."""


@dataclass(frozen=True, kw_only=True)
class ExampleSection:
    """A worked example."""

    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class FewShotThoughts:
    """Worked examples before every prompt (2201.11903): turns in the chat format, else a text."""

    kind: Literal["few_shot"] = "few_shot"
    examples: tuple[ExampleSection, ...] = ()
    question: str = "Q: "
    """What leads a question in a text."""
    answer: str = "A:"


ThoughtsSection = ZeroShotThoughts | StepThoughts | FewShotThoughts


@dataclass(frozen=True, kw_only=True)
class MathAnswers:
    """The final answer, numbers in a normal form: 0.5, 1/2 and \\frac12 are one answer."""

    kind: Literal["math"] = "math"
    sources: tuple[Literal["tag", "boxed", "hash", "phrase", "number"], ...] = ("boxed", "hash", "phrase", "number")
    """Where the answer may stand, tried in this order."""


@dataclass(frozen=True, kw_only=True)
class ChoiceAnswers:
    """The letter that is chosen."""

    kind: Literal["choice"] = "choice"
    letters: str = "ABCDE"


@dataclass(frozen=True, kw_only=True)
class ExpressionAnswers:
    """The expression that is stated last (game of 24, countdown), without spaces."""

    kind: Literal["expression"] = "expression"


@dataclass(frozen=True, kw_only=True)
class TextAnswers:
    """All of the text, without case and with single spaces."""

    kind: Literal["text"] = "text"


AnswersSection = MathAnswers | ChoiceAnswers | ExpressionAnswers | TextAnswers


@dataclass(frozen=True, kw_only=True)
class EngineSection:
    """How much is computed at one time; what is found does not depend on it."""

    together: int = 16
    """Prompts that are searched side by side."""
    rows: int = 64
    """Most texts that decode together."""
    cache_tokens: int | None = None
    """Room of the key-value pages that the trees live in; None: by what the search can need."""
    prefill_tokens: int = 512
    """Tokens of prompts that are read in one pass."""


@dataclass(frozen=True, kw_only=True)
class SearchRunSection:
    """Where a search's results live."""

    dir: str = "runs/{name}"
    name: str = "search"
    seed: int = 0
    """Of the noise; a prompt's result is a function of it, the prompt's number and the budget."""
    trees: int = 20
    """Trees that the report shows; trees.jsonl holds all."""
    resume: Literal["auto", "never", "must"] = "auto"
    allow_changed_config: bool = False
    """Go on in a folder although its configuration differs."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """`method: search`: more from a model at test time."""

    method: Literal["search"] = "search"
    model: ModelSection = ModelSection()
    prompts: SearchPromptsSection = PlainPrompts()
    count: int | None = None
    """Most prompts; of a file so many rows, drawn by prompts.seed. Endless sources need it."""
    thoughts: ThoughtsSection | None = None
    """A chain-of-thought template around every prompt."""
    sampling: DrawSection = DrawSection()
    search: SearchMethodSection = Greedy()
    verifier: VerifierSection = VerifierSection()
    """What `Score` asks."""
    answers: AnswersSection = MathAnswers()
    """What of a text is its answer, as votes compare it."""
    gold: RewardSection | None = None
    """What says whether an answer is right (a reward of 1); it is not seen by the search. None: `math` where rows have
    an `answer`, `reaches` where they have `numbers`."""
    budget: int | None = None
    """Most generated + verifier tokens of each prompt; None: no limit."""
    engine: EngineSection = EngineSection()
    run: SearchRunSection = SearchRunSection()
