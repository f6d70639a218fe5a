"""The `verifier` section of a search: who judges, and how several judges become one. Imports no jax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxpost.config_rewards import RewardSection


@dataclass(frozen=True, kw_only=True)
class _Part:
    weight: float = 1.0
    """Of this part in a mean; elsewhere it must stay 1."""
    squash: Literal["none", "sigmoid"] = "none"
    """sigmoid maps any score into [0, 1], which a product needs."""


@dataclass(frozen=True, kw_only=True)
class SyntaxVerifier(_Part):
    """Share of the text that is well formed."""

    kind: Literal["syntax"] = "syntax"
    name: str = "syntax"
    forms: tuple[Literal["brackets", "equations", "json", "python"], ...] = ("brackets", "equations")


@dataclass(frozen=True, kw_only=True)
class LogicVerifier(_Part):
    """Share of the stated equalities that hold and contradict no earlier one."""

    kind: Literal["logic"] = "logic"
    name: str = "logic"
    empty: float = 1.0
    """Where nothing is stated."""


@dataclass(frozen=True, kw_only=True)
class FactVerifier(_Part):
    """Share of the statements that a local corpus supports, by their words (BM25)."""

    kind: Literal["fact"] = "fact"
    name: str = "fact"
    path: str = ""
    """The corpus: .jsonl(.gz) with texts under `key`, else a text file with a passage a paragraph."""
    key: str = "text"
    overlap: float = 0.7
    """Share of a statement's words that one passage must hold."""
    best: int = 3
    """Passages that are looked at."""
    least: int = 2
    """Words of a statement; shorter ones are left out."""
    empty: float = 0.5
    """Where there is no statement."""


@dataclass(frozen=True, kw_only=True)
class SafetyVerifier(_Part):
    """0 where an answer holds a listed word, or complies where it should refuse."""

    kind: Literal["safety"] = "safety"
    name: str = "safety"
    path: str = ""
    """A word, phrase or /regular expression/ a line."""
    must_refuse: bool = True
    """A prompt that holds one is to be refused."""
    needless_refusal: float = 0.5
    """The score of a refusal where the prompt holds none."""


@dataclass(frozen=True, kw_only=True)
class ModelVerifier(_Part):
    """A reward model: of whole answers, or of steps, of which only the new one is read each time."""

    kind: Literal["model"] = "model"
    name: str = "model"
    path: str = ""
    """An export of `method: reward`, a sequence or token classifier, an adapter with a head, or a hub id."""
    aggregate: Literal["last", "min", "prod", "mean"] = "min"
    """How a process model's steps become one score."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True, kw_only=True)
class JudgeVerifier(_Part):
    """A language model that is asked about the answer, or how probable it finds that the answer is right."""

    kind: Literal["judge"] = "judge"
    name: str = "judge"
    path: str = ""
    """The model that judges; "": the one that is searched."""
    mode: Literal["point", "verifier", "rubric", "likelihood"] = "verifier"
    """A rating; right or wrong after reasoning; a rating by criterion; P(yes) against P(no) without a word written."""
    max_tokens: int = 256
    verdicts: int = 1
    """Asked so often; the mean counts."""
    low: int = 1
    high: int = 10
    criteria: tuple[str, ...] = ()
    temperature: float = 0.0
    unreadable: float = 0.0
    """The score where no verdict can be read."""


@dataclass(frozen=True, kw_only=True)
class RuleVerifier(_Part):
    """Rule rewards as the verifier. They see the problem's gold answer, so this is an oracle: for experiments."""

    kind: Literal["rule"] = "rule"
    name: str = "rule"
    reward: RewardSection = RewardSection()


@dataclass(frozen=True, kw_only=True)
class Game24Verifier(_Part):
    """An exact solver: 1 while every step is right and the target can still be reached. It sees the prompt alone."""

    kind: Literal["game24"] = "game24"
    name: str = "game24"


VerifierPart = (
    SyntaxVerifier
    | LogicVerifier
    | FactVerifier
    | SafetyVerifier
    | ModelVerifier
    | JudgeVerifier
    | RuleVerifier
    | Game24Verifier
)


@dataclass(frozen=True, kw_only=True)
class VerifierSection:
    """One judge, or several composed; none where a method asks nobody."""

    parts: tuple[VerifierPart, ...] = ()
    combine: Literal["product", "mean", "min", "gate"] = "product"
    """product: each within [0, 1]; mean: by weight; gate: where the first part reaches the threshold the product of the
    others, which are not asked elsewhere."""
    threshold: float = 0.5
    """Of a gate."""
    otherwise: float = 0.0
    """The score where a gate is shut."""
