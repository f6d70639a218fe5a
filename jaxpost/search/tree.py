"""Trees of text: nodes, a prompt with its tree while it is searched, and what the search has spent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

End = Literal["step", "stop", "length"]
"""How a node's text ended: at a separator, at the answer's end, or at its limit of tokens."""
Aggregate = Literal["last", "min", "prod", "mean"]


@dataclass(eq=False)
class Node:
    """One piece of text in a tree; the texts from the root down to it are the text that it stands for.

    Attributes:
        number: in its tree, in order of creation; names the node in the noise of what is drawn.
        tokens: the policy's, of this piece alone; the root's are the prompt.
        text: of this piece; the root's is "".
        logprobs: of each token as it was drawn; () where the piece was given, not drawn.
        end: None where the piece was given.
        score: what the verifier said of the text up to here; NaN where it was not asked.
        steps: what it said of each step up to here, where it judges steps.
        value, visits: mean of what was backed up, and how often.
        prior: probability that the policy gave this piece, where a search uses it.
        note: what the piece is for (an action's name, "critique" ...).
        facts: whatever else a method wants to be seen in pictures and exports.
        pruned: nothing will be drawn from it any more, so that what it holds may go.
        best: at each token's place the log-probabilities of the most probable tokens, under softmax(logits); () where
            a search did not ask for them.
    """

    number: int
    parent: Node | None = field(repr=False)
    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...] = ()
    end: End | None = None
    score: float = math.nan
    steps: tuple[float, ...] = ()
    value: float = 0.0
    visits: int = 0
    prior: float = math.nan
    note: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    children: list[Node] = field(default_factory=list, repr=False)
    pruned: bool = False
    best: tuple[tuple[float, ...], ...] = field(default=(), repr=False)

    @property
    def depth(self) -> int:
        """0 of a root."""
        return sum(1 for _ in self.lineage()) - 1

    @property
    def complete(self) -> bool:
        """The answer ends here by itself."""
        return self.end == "stop"

    def lineage(self) -> Iterator[Node]:
        """This node, its parent, and so on to the root."""
        node: Node | None = self
        while node is not None:
            yield node
            node = node.parent

    @property
    def path(self) -> list[Node]:
        """From the first node below the root down to this one."""
        return list(self.lineage())[-2::-1]

    @property
    def answer(self) -> str:
        """All text below the root."""
        return "".join(node.text for node in self.path)

    @property
    def answer_tokens(self) -> int:
        return sum(len(node.tokens) for node in self.path)

    @property
    def all_tokens(self) -> list[int]:
        """With the prompt's."""
        return [token for node in reversed(list(self.lineage())) for token in node.tokens]

    @property
    def logprob(self) -> float:
        """Sum over all that was drawn from the root to here."""
        return math.fsum(x for node in self.path for x in node.logprobs)

    def walk(self) -> Iterator[Node]:
        """This node and all below it, parents first."""
        stack: list[Node] = [self]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(reversed(node.children))

    def back_up(self, value: float) -> None:
        """Adds a value to the mean of this node and of all above it."""
        for node in self.lineage():
            node.visits += 1
            node.value += (value - node.value) / node.visits


def aggregate(steps: Sequence[float], how: Aggregate) -> float:
    """One number for the scores of an answer's steps; NaN for none.

    >>> [aggregate([0.5, 1.0, 0.8], how) for how in ("last", "min", "prod")]
    [0.8, 0.5, 0.4]
    """
    if not steps:
        return math.nan
    if how == "last":
        return steps[-1]
    if how == "min":
        return min(steps)
    return math.prod(steps) if how == "prod" else math.fsum(steps) / len(steps)


@dataclass
class Ledger:
    """Tokens of one prompt's search. The budget is of `spent`: generated + verifier tokens."""

    limit: int | None = None
    generated: int = 0
    """Drawn by the policy."""
    verified: int = 0
    """Read or drawn by verifiers."""
    read: int = 0
    """Prompts and given pieces that the policy read; not part of the budget."""
    refused: int = 0
    """Requests, or parts of them, that no budget was left for."""

    @property
    def spent(self) -> int:
        return self.generated + self.verified

    @property
    def left(self) -> float:
        return math.inf if self.limit is None else float(self.limit - self.spent)


@dataclass(eq=False)
class Problem:
    """One prompt while it is searched.

    Attributes:
        number: names the prompt in the noise.
        prompt: a text or messages.
        root: the prompt, read.
        canonical: the answer that a text gives, as votes compare it; None where it gives none.
        asides: roots of other prompts that the search asked (proposals, votes, critiques).
        warnings: sentences for the user.
    """

    number: int
    prompt: Any
    root: Node
    ledger: Ledger
    canonical: Callable[[str], str | None]
    asides: list[Node] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    nodes: int = 1
    dropped: list[Node] = field(default_factory=list)

    def child(self, parent: Node | None, tokens: Sequence[int], text: str, **known: Any) -> Node:
        """A new node, below `parent` or as the root of an aside."""
        node = Node(self.nodes, parent, tuple(tokens), text, **known)
        self.nodes += 1
        (self.asides if parent is None else parent.children).append(node)
        return node

    def prune(self, nodes: Sequence[Node]) -> None:
        """Nothing will be drawn from these, nor from what is below them: what they hold goes, their text stays."""
        for top in nodes:
            for node in top.walk():
                if not node.pruned:
                    node.pruned = True
                    self.dropped.append(node)

    def warn(self, sentence: str) -> None:
        """Says it once."""
        if sentence not in self.warnings:
            self.warnings.append(sentence)
