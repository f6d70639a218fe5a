"""A model that is asked about answers as a verifier: a rating, a reasoned verdict, or the probability of yes.

What it reads and draws is charged: of each question about a problem what is its own, and what all of them begin with
once. So a text that has grown is read again from where the answer begins. A verdict that cannot be read
(`rewards.verdicts`: the last line, in one form) has the score `unreadable` and is counted; it is never guessed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxpost.rewards.verdicts import question, value_of
from jaxpost.search.contract import Case, Job, Policy, Verdict
from jaxpost.search.pieces import fill
from jaxpost.search.tree import Node, Problem
from jaxpost.search.verifiers import prompt_text

Mode = Literal["point", "verifier", "rubric", "likelihood"]
ASIDE = 1 << 24
"""Added to a node's number in the name of a judge's noise, which is then not the noise of any answer."""
DIRECT = (
    "Is the answer to the question correct? Reply with one line: `Correct: yes` or `Correct: no`.\n\n"
    "<question>\n{question}\n</question>\n\n<answer>\n{answer}\n</answer>"
)
LEAD, YES, NO = "Correct:", " yes", " no"
_ANSWERS = ("x", "1", " A", "\n", "\n\nx", "")
"""What questions hold in common is what they hold in common about these."""


@dataclass
class Judge:
    """Verdicts of a policy on answers.

    point, verifier, rubric: it writes at most `max_tokens` tokens, and the verdict is read from their last line; the
    score is the mean over `verdicts` writings that can be read, after a question that is read once. likelihood: it
    writes nothing; with the lead "Correct:" forced, the score is P(yes) / (P(yes) + P(no)).

    Attributes:
      policy: the searched one or another.
      rows: most questions at a time.
      unreadable: the score where no verdict can be read.
      asked, unread: how many verdicts were asked for, and could not be read.
    """

    policy: Policy
    mode: Mode = "verifier"
    max_tokens: int = 256
    verdicts: int = 1
    low: int = 1
    high: int = 10
    criteria: tuple[str, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    unreadable: float = 0.0
    rows: int = 64
    asked: int = 0
    unread: int = 0
    _read: dict[Node, tuple[int, ...]] = field(default_factory=dict, repr=False)
    """The questions about nodes, in tokens."""
    _heads: dict[Node, Node] = field(default_factory=dict, repr=False)
    """By problem's root: the beginning of all questions about it, read once and then held."""
    _paid: set[Node] = field(default_factory=set, repr=False)
    """Roots of problems whose beginning was charged."""

    def __post_init__(self) -> None:
        if self.mode == "rubric" and not self.criteria:
            raise ValueError("a rubric needs criteria")
        if self.verdicts < 1 or self.max_tokens < 1 or self.low >= self.high:
            raise ValueError(f"needs verdicts >= 1, max_tokens >= 1, low < high: {self}")

    def question(self, case: Case) -> str:
        """What is asked about an answer."""
        return self._question(case.problem, case.node.answer)

    def _question(self, problem: Problem, answer: str) -> str:
        asked = prompt_text(problem.prompt)
        if self.mode == "likelihood":
            return fill(DIRECT, question=asked, answer=answer)
        return question(self.mode, asked, [answer], low=self.low, high=self.high, criteria=self.criteria)

    def __call__(self, cases: Sequence[Case]) -> Sequence[Verdict | str]:
        out: list[Verdict | str] = []
        for start in range(0, len(cases), self.rows):
            part = list(cases[start : start + self.rows])
            out += self._likelihoods(part) if self.mode == "likelihood" else self._writings(part)
        return out

    def price(self, case: Case, new_tokens: int) -> int:
        read = self._tokens(case)
        known = 0 if isinstance(read, str) else len(self._asked(case, read).tokens)
        if self.mode == "likelihood":
            return known + new_tokens + len(self._lead) + len(self._words[0]) + len(self._words[1])
        return known + new_tokens + self.max_tokens * self.verdicts

    def opening(self, problem: Problem) -> int:
        """Tokens that its first verdict costs besides: what all questions about the problem begin with."""
        return 0 if problem.root in self._paid else len(self._head(problem).tokens)

    def forget(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            self._read.pop(node, None)
            self._paid.discard(node)
        self.policy.forget([head for node in nodes if (head := self._heads.pop(node, None)) is not None])

    @property
    def _lead(self) -> tuple[int, ...]:
        return self.policy.encode(LEAD)

    @property
    def _words(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.policy.encode(YES), self.policy.encode(NO)

    def _tokens(self, case: Case) -> tuple[int, ...] | str:
        if case.node not in self._read:
            [read] = self.policy.read([self.question(case)])
            if isinstance(read, str):
                return read
            self._read[case.node] = read
        return self._read[case.node]

    def _head(self, problem: Problem) -> Node:
        """What questions about a problem begin with, whatever the answer."""
        if problem.root not in self._heads:
            read = self.policy.read([self._question(problem, answer) for answer in _ANSWERS])
            known = [tokens for tokens in read if not isinstance(tokens, str)]
            same = [all(t == ts[0] for t in ts) for ts in zip(*known, strict=False)] if len(known) == len(read) else []
            self._heads[problem.root] = Node(0, None, known[0][: [*same, False].index(False)] if known else (), "")
        return self._heads[problem.root]

    def _asked(self, case: Case, read: tuple[int, ...], more: tuple[int, ...] = ()) -> Node:
        """A question, below what it shares with others: its tokens are what is read for it alone."""
        head = self._head(case.problem)
        if head.tokens and read[: len(head.tokens)] == head.tokens and len(read) > len(head.tokens):
            return Node(case.node.number, head, (*read[len(head.tokens) :], *more), "")
        return Node(0, None, (*read, *more), "")

    def _pay(self, case: Case, asked: Node, *, more: int) -> int:
        """What a verdict cost: its own question, `more`, and of the first one the shared beginning."""
        first = asked.parent is not None and case.problem.root not in self._paid
        self._paid |= {case.problem.root} if first else set()
        return len(asked.tokens) + more + (len(self._head(case.problem).tokens) if first else 0)

    def _writings(self, cases: Sequence[Case]) -> list[Verdict | str]:
        tokens = [self._tokens(case) for case in cases]
        asked = [None if isinstance(r, str) else self._asked(c, r) for c, r in zip(cases, tokens, strict=True)]
        jobs, of = [], []
        for at, (case, node) in enumerate(zip(cases, asked, strict=True)):
            if node is None:
                continue
            for again in range(self.verdicts):
                name, size = ASIDE * (1 + again) + case.node.number, len(tokens[at])
                jobs.append(Job(node, self.max_tokens, (), self.sampling, case.problem.number, name, begin=size))
                of.append(at)
        drawn = self.policy.draw(jobs) if jobs else []
        self.policy.forget([n for job in jobs for n in (job.node, Node(job.sample, job.node, (), ""))])
        found: list[list[Any]] = [[] for _ in cases]
        for at, each in zip(of, drawn, strict=True):
            found[at].append(each)
        return [
            f"the judge cannot read its question: {read}" if node is None else self._verdict(case, node, each)
            for case, read, node, each in zip(cases, tokens, asked, found, strict=True)
        ]

    def _verdict(self, case: Case, asked: Node, drawn: Sequence[Any]) -> Verdict | str:
        fault = next((each for each in drawn if isinstance(each, str)), None)
        if fault is not None:
            return f"the judge could not answer: {fault}"
        spent = self._pay(case, asked, more=sum(len(each.tokens) for each in drawn))
        mode: Any = self.mode
        said = [value_of(mode, d.text, low=self.low, high=self.high, criteria=self.criteria) for d in drawn]
        kept = [(value, parts) for value, parts in said if value is not None]
        self.asked += len(said)
        self.unread += len(said) - len(kept)
        parts: dict[str, float] = {"unreadable": 1 - len(kept) / len(said)}
        if not kept:
            return Verdict(self.unreadable, spent, (), parts)
        for name in kept[0][1]:
            parts[name] = math.fsum(p[name] for _, p in kept) / len(kept)
        return Verdict(math.fsum(value for value, _ in kept) / len(kept), spent, (), parts)

    def _likelihoods(self, cases: Sequence[Case]) -> list[Verdict | str]:
        tokens = [self._tokens(case) for case in cases]
        lead, words = self._lead, self._words
        asked = [None if isinstance(r, str) else self._asked(c, r, lead) for c, r in zip(cases, tokens, strict=True)]
        nodes = [node for node in asked if node is not None]
        found = self.policy.likelihood([n for n in nodes for _ in words], [w for _ in nodes for w in words])
        self.policy.forget(nodes)
        pairs = iter(zip(found[::2], found[1::2], strict=True))
        out: list[Verdict | str] = []
        for case, read, node in zip(cases, tokens, asked, strict=True):
            if node is None:
                out.append(f"the judge cannot read its question: {read}")
                continue
            yes, no = next(pairs)
            if isinstance(yes, str) or isinstance(no, str):
                out.append(f"the judge could not answer: {yes if isinstance(yes, str) else no}")
                continue
            self.asked += 1
            gap = math.fsum(no) - math.fsum(yes)
            score = 1.0 / (1.0 + math.exp(min(gap, 700.0)))
            out.append(Verdict(score, self._pay(case, node, more=len(words[0]) + len(words[1]))))
        return out

    def report(self) -> dict[str, float]:
        """How many verdicts were asked for, and the share that could not be read."""
        return {"asked": float(self.asked), "unreadable": self.unread / self.asked if self.asked else 0.0}
