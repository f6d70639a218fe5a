"""What a rule reward can be told: one section per reward, and how several become one. Imports no jax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class _Part:
    weight: float = 1.0
    """Factor of this part in a sum; in a product or minimum it must stay 1."""
    clip_low: float | None = None
    """Cut the part's score from below before it is combined."""
    clip_high: float | None = None


@dataclass(frozen=True, kw_only=True)
class MathSection(_Part):
    """1 if the final answer equals the reference; read exactly, nothing is run."""

    kind: Literal["math"] = "math"
    name: str = "math"
    key: str = "answer"
    """The field of an example that holds the reference."""
    sources: tuple[Literal["tag", "boxed", "hash", "phrase", "number"], ...] = ("boxed", "hash", "phrase", "number")
    """Where the answer may stand, tried in this order."""
    tolerance: float = 0.0
    """Relative, for rounded references."""


@dataclass(frozen=True, kw_only=True)
class MathVerifySection(_Part):
    """1 if the package math-verify finds the final answer equal to the reference: sets, intervals, matrices too."""

    kind: Literal["math_verify"] = "math_verify"
    name: str = "math_verify"
    key: str = "answer"
    sources: tuple[Literal["tag", "boxed", "hash", "phrase", "number"], ...] = ("boxed", "hash", "phrase", "number")
    seconds: float = 2.0
    """For one answer, in a process of its own that is killed then; less than the reward's `seconds`."""
    memory_mb: int = 2048


@dataclass(frozen=True, kw_only=True)
class CodeSection(_Part):
    """The share of its tests that the last Python block of an answer passes, in the sandbox."""

    kind: Literal["code"] = "code"
    name: str = "code"
    key: str = "tests"
    """The field of an example that holds the tests: asserts, calls, whole programs, or a check function."""
    partial: bool = True
    """False: 1 if all tests pass, else 0."""
    tolerance: float = 0.0
    """Relative, between numbers with a point that calls return."""
    seconds: float = 3.0
    """For all tests of one program, by the clock; the reward's `seconds` must be two more."""
    memory_mb: int = 512
    output_kb: int = 256
    isolation: Literal["auto", "process", "filters", "namespaces"] = "auto"
    """auto: the strongest that works on this machine; a run does not start if the one named does not."""


@dataclass(frozen=True, kw_only=True)
class GymSection(_Part):
    """1 if the final answer is the one of reasoning-gym's problem (prompts.kind gym)."""

    kind: Literal["gym"] = "gym"
    name: str = "gym"


@dataclass(frozen=True, kw_only=True)
class ChoiceSection(_Part):
    """1 if the chosen letter is the reference."""

    kind: Literal["choice"] = "choice"
    name: str = "choice"
    key: str = "answer"
    letters: str = "ABCDE"


@dataclass(frozen=True, kw_only=True)
class ReachesSection(_Part):
    """1 if the stated expression reaches the example's target with its numbers (countdown, game of 24)."""

    kind: Literal["reaches"] = "reaches"
    name: str = "reaches"
    use: Literal["all", "some"] = "all"


@dataclass(frozen=True, kw_only=True)
class ThinkFormatSection(_Part):
    """1 if the text is <think>...</think> followed by an answer."""

    kind: Literal["think_format"] = "think_format"
    name: str = "format"
    think: str = "think"
    answer: str = ""
    """Tag that must hold the answer; "": any text after the thinking."""
    opened: bool = False
    """The prompt ends with the opening tag already."""


@dataclass(frozen=True, kw_only=True)
class OneBoxSection(_Part):
    """1 if the text has exactly one complete box."""

    kind: Literal["one_box"] = "one_box"
    name: str = "one_box"


@dataclass(frozen=True, kw_only=True)
class FinishedSection(_Part):
    """1 if the answer ended by itself within its limit of tokens."""

    kind: Literal["finished"] = "finished"
    name: str = "finished"


@dataclass(frozen=True, kw_only=True)
class OverlongSection(_Part):
    """DAPO's soft overlong penalty in tokens: 0, falling to -1 over the last `buffer` tokens (2503.14476)."""

    kind: Literal["overlong"] = "overlong"
    name: str = "overlong"
    max_tokens: int = 1024
    buffer: int = 256


@dataclass(frozen=True, kw_only=True)
class TargetLengthSection(_Part):
    """-coef |target - tokens| (2503.04697)."""

    kind: Literal["target_length"] = "target_length"
    name: str = "target_length"
    key: str = "target_tokens"
    coef: float = 0.0003
    least: float = -1.0


@dataclass(frozen=True, kw_only=True)
class RepetitionSection(_Part):
    """Minus the share of repeated n-grams of tokens."""

    kind: Literal["repetition"] = "repetition"
    name: str = "repetition"
    n: int = 4


@dataclass(frozen=True, kw_only=True)
class ScriptSection(_Part):
    """The share of letters of the wanted scripts."""

    kind: Literal["script"] = "script"
    name: str = "script"
    scripts: tuple[str, ...] = ("LATIN",)


@dataclass(frozen=True, kw_only=True)
class FunctionSection(_Part):
    """A Python function of a file of yours, f(examples, completions) -> numbers; plain or async."""

    kind: Literal["function"] = "function"
    path: str = "rewards.py:reward"
    """file.py:function"""


@dataclass(frozen=True, kw_only=True)
class ModelRewardSection(_Part):
    """The score of a reward model: loaded on the policy's devices, several models as an ensemble."""

    kind: Literal["model"] = "model"
    name: str = "model"
    path: tuple[str, ...] = ()
    """Exports of `method: reward`, sequence or token classifiers, adapters with a head, hub ids."""
    template: str = "{prompt}"
    """What the reward model is shown as the question: {prompt} and other columns of the problem. With messages as the
    prompt it stays as it is."""
    members: Literal["mean", "min", "mean_std"] = "mean"
    """How an ensemble's scores become one; mean_std: mean - penalty * deviation (2310.02743)."""
    penalty: float = 1.0
    steps: Literal["min", "last", "prod", "mean"] = "min"
    """How a process model's steps become one score; advantage.kind grpo_process reads each of them."""
    objectives: tuple[float, ...] = ()
    """Weights of a model's objectives; empty: equal, adding up to 1."""
    tokens: int = 16_384
    """Most tokens of a batch."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True, kw_only=True)
class JudgeSection(_Part):
    """The verdict of a language model that is asked about the answer."""

    kind: Literal["judge"] = "judge"
    name: str = "judge"
    mode: Literal["point", "pair", "rubric", "verifier", "critic"] = "point"
    """One rating; the better of two answers to a problem, in both orders; a rating by criterion; right or wrong after
    reasoning; minus the number of faults found."""
    path: str = ""
    """The model that judges: a folder or hub id; with `server` its name there ("": the only one that it serves)."""
    server: str = ""
    """An OpenAI-compatible address, such as http://localhost:8000/v1, in the place of our own engine."""
    template: str = "{prompt}"
    """What the judge is shown as the question: {prompt} and other columns of the problem."""
    low: int = 1
    high: int = 10
    """Scale of ratings, whose ends become 0 and 1."""
    criteria: tuple[str, ...] = ()
    """Of mode rubric; each is a column of its own."""
    probability: bool = True
    """Of mode verifier: the probability of yes against no after the reasoning, not the word (our own engine only)."""
    verdicts: int = 1
    """Asked so often, with a temperature above 0; the mean of those that can be read counts."""
    max_tokens: int = 512
    temperature: float = 0.0
    rows: int = 32
    """Verdicts written together, or requests under way at once."""


RewardPart = (
    MathSection
    | MathVerifySection
    | CodeSection
    | GymSection
    | ChoiceSection
    | ReachesSection
    | ThinkFormatSection
    | OneBoxSection
    | FinishedSection
    | OverlongSection
    | TargetLengthSection
    | RepetitionSection
    | ScriptSection
    | FunctionSection
    | ModelRewardSection
    | JudgeSection
)


@dataclass(frozen=True, kw_only=True)
class RewardSection:
    """Rule rewards and reward models, combined: combine(parts) where every gate is passed, `closed` elsewhere."""

    parts: tuple[RewardPart, ...] = ()
    combine: Literal["sum", "product", "min"] = "sum"
    gates: tuple[RewardPart, ...] = ()
    """Conditions: parts whose score must reach `threshold`."""
    threshold: float = 1.0
    closed: float = 0.0
    """The reward where a gate is shut."""
    workers: int = 2
    """Processes that score; one that hangs is killed."""
    seconds: float = 5.0
    """For one row of one part."""
