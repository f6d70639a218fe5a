"""Learned verifiers that judge whole answers: an outcome reward model, and the policy's own likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxpost.search.contract import Case, Verdict
from jaxpost.search.tree import Node


class OutcomeVerifier:
    """judge(cases) -> a reward model's score of each prompt with its answer, of all prompts in one batch.

    Every judgement reads the whole text; that is its price.

    Args:
        write: prompt and answer -> what `score` takes, with its number of tokens; a ValueError says why there is none.
        score: scores of many such texts.
        ratio: tokens of this model for one of the policy's, at most; only budgets ask.
    """

    def __init__(
        self,
        write: Callable[[Any, str], tuple[Any, int]],
        score: Callable[[Sequence[Any]], Sequence[float]],
        *,
        ratio: float | int = 1.0,
    ):
        self.write, self.score, self.ratio = write, score, ratio

    def __call__(self, cases: Sequence[Case]) -> list[Verdict | str]:
        written = [self._try(case.problem.prompt, case.node.answer) for case in cases]
        good = [text for text in written if not isinstance(text, str)]
        scores = iter(self.score([text.what for text in good]) if good else ())
        return [text if isinstance(text, str) else Verdict(float(next(scores)), text.tokens) for text in written]

    def price(self, case: Case, new_tokens: int) -> int:
        text = self._try(case.problem.prompt, case.node.answer or "x")
        return (0 if isinstance(text, str) else text.tokens) + math.ceil(self.ratio * new_tokens)

    def forget(self, nodes: Sequence[Node]) -> None:
        """It keeps nothing."""

    def _try(self, prompt: Any, answer: str) -> _Text | str:
        try:
            return _Text(*self.write(prompt, answer))
        except ValueError as error:
            return f"the reward model cannot read it: {error}"


class _Text(NamedTuple):
    what: Any
    tokens: int


class LikelihoodVerifier:
    """judge(cases) -> how probable the policy found what it drew: exp(sum of log p / n ** length_penalty).

    With length_penalty 1 that is the geometric mean of the n drawn tokens' probabilities, with 0 their product. It
    costs no tokens: the log-probabilities came with the draws.

    Example:
        >>> from jaxpost.search.tree import Ledger, Node, Problem
        >>> root = Node(0, None, (1,), "")
        >>> node = Node(1, root, (2, 3), "ab", logprobs=(math.log(0.25), 0.0), end="stop")
        >>> [verdict] = LikelihoodVerifier()([Case(Problem(0, "", root, Ledger(), str.strip), node)])
        >>> round(verdict.score, 3)
        0.5
    """

    def __init__(self, *, length_penalty: float | int = 1.0):
        self.length_penalty = length_penalty

    def __call__(self, cases: Sequence[Case]) -> list[Verdict | str]:
        return [self._judge(case.node) for case in cases]

    def price(self, case: Case, new_tokens: int) -> int:
        return 0

    def forget(self, nodes: Sequence[Node]) -> None:
        """It keeps nothing."""

    def _judge(self, node: Node) -> Verdict | str:
        count = sum(len(piece.logprobs) for piece in node.path)
        if not count:
            return "nothing of this text was drawn, so it has no likelihood"
        return Verdict(math.exp(node.logprob / count**self.length_penalty))
