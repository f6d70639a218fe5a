"""What a search may ask for. The first sentence says what, the words after -> what is sent back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxpost.search.tree import Node


@dataclass(frozen=True)
class Draw:
    """Continue nodes by drawing. -> for each node the list of its new children, fewer where the budget ended.

    Attributes:
        n: children of each node, or one number a node.
        max_tokens: of each child.
        stop: texts that end a child as a step (kept at its end); (): children end with the answer.
        scored: the method will have the children scored, so room for that is kept in the budget.
        verifier: the tokens are a verifier's (a vote, a judgement), and so is the prompt of an aside.
        sampling: SamplingParams by name, in place of the search's own: temperature, top_p ...
        top_logprobs: so many of the most probable tokens' log-probabilities are kept at every place (`Node.best`); all
            log-probabilities are of softmax(logits) then, not of softmax(logits / temperature).
        note: of the children.
    """

    nodes: Sequence[Node]
    n: int | Sequence[int] = 1
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    scored: bool = False
    verifier: bool = False
    sampling: Mapping[str, Any] = field(default_factory=dict)
    top_logprobs: int = 0
    note: str = ""


@dataclass(frozen=True)
class Ask:
    """New prompts to the policy. -> a root for each, to draw from.

    A prompt is a text or messages, written by the same chat template as the problem's own.
    """

    prompts: Sequence[Any]
    verifier: bool = False
    note: str = ""


@dataclass(frozen=True)
class Write:
    """Add given text to nodes: a forced marker, an instruction. -> the children."""

    nodes: Sequence[Node]
    texts: Sequence[str]
    note: str = ""


@dataclass(frozen=True)
class Rank:
    """The most probable next tokens. -> for each node (tokens [best], log-probabilities [best]), best first.

    Costs a generated token a node, as drawing one would; () where the budget ended. Log-probabilities are of
    softmax(logits).
    """

    nodes: Sequence[Node]
    best: int


@dataclass(frozen=True)
class Push:
    """Add one token that `Rank` named to nodes. -> the children (end "stop" after an end token). Costs nothing."""

    nodes: Sequence[Node]
    tokens: Sequence[int]
    logprobs: Sequence[float]


@dataclass(frozen=True)
class Likelihood:
    """How probable given texts are after nodes. -> for each the log-probabilities of its tokens; () where the budget
    ended.

    Verifier tokens: those of the texts.
    """

    nodes: Sequence[Node]
    texts: Sequence[str]


@dataclass(frozen=True)
class Score:
    """Have the search's verifier judge nodes. -> their scores; also set as `node.score` and `node.steps`.

    NaN where the budget ended. `verifier` names another than the search's own.
    """

    nodes: Sequence[Node]
    verifier: str = "verifier"


@dataclass(frozen=True)
class Together:
    """Array work of many prompts in one call. -> what function(list of arguments)[this prompt's] gave.

    All prompts that yield the same function at the same time share a call.
    """

    function: Callable[[list[Any]], list[Any]]
    argument: Any


Request = Draw | Ask | Write | Rank | Push | Likelihood | Score | Together
