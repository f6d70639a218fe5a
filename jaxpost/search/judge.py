"""A model that is asked about answers as a verifier: a rating, a reasoned verdict, or the probability of yes.

What it reads and draws is charged. A verdict that cannot be read (`rewards.verdicts`: the last line, in one form) has
the score `unreadable` and is counted; it is never guessed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxpost.rewards.verdicts import question, value_of
from jaxpost.search.contract import Case, Job, Policy, Verdict
from jaxpost.search.tree import Node
from jaxpost.search.verifiers import prompt_text

Mode = Literal["point", "verifier", "rubric", "likelihood"]
ASIDE = 1 << 24
"""Added to a node's number in the name of a judge's noise, which is then not the noise of any answer."""
DIRECT = (
    "Is the answer to the question correct? Reply with one line: `Correct: yes` or `Correct: no`.\n\n"
    "<question>\n{question}\n</question>\n\n<answer>\n{answer}\n</answer>"
)
LEAD, YES, NO = "Correct:", " yes", " no"


@dataclass
class Judge:
    """Verdicts of a policy on answers.

    point, verifier, rubric: it writes at most `max_tokens` tokens, and the verdict is read from their last line; the
    score is the mean over `verdicts` writings that can be read. likelihood: it writes nothing; with the lead
    "Correct:" forced, the score is P(yes) / (P(yes) + P(no)).

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

    def __post_init__(self) -> None:
        if self.mode == "rubric" and not self.criteria:
            raise ValueError("a rubric needs criteria")
        if self.verdicts < 1 or self.max_tokens < 1 or self.low >= self.high:
            raise ValueError(f"needs verdicts >= 1, max_tokens >= 1, low < high: {self}")

    def question(self, case: Case) -> str:
        """What is asked about an answer."""
        asked, answer = prompt_text(case.problem.prompt), case.node.answer
        if self.mode == "likelihood":
            return DIRECT.replace("{question}", asked).replace("{answer}", answer)
        return question(self.mode, asked, [answer], low=self.low, high=self.high, criteria=self.criteria)

    def __call__(self, cases: Sequence[Case]) -> Sequence[Verdict | str]:
        out: list[Verdict | str] = []
        for start in range(0, len(cases), self.rows):
            part = list(cases[start : start + self.rows])
            out += self._likelihoods(part) if self.mode == "likelihood" else self._writings(part)
        return out

    def price(self, case: Case, new_tokens: int) -> int:
        read = self._tokens(case)
        known = 0 if isinstance(read, str) else len(read)
        if self.mode == "likelihood":
            return known + new_tokens + len(self._lead) + len(self._words[0]) + len(self._words[1])
        return (known + new_tokens + self.max_tokens) * self.verdicts

    def forget(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            self._read.pop(node, None)

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

    def _writings(self, cases: Sequence[Case]) -> list[Verdict | str]:
        tokens = [self._tokens(case) for case in cases]
        jobs, of = [], []
        for at, (case, read) in enumerate(zip(cases, tokens, strict=True)):
            if isinstance(read, str):
                continue
            for again in range(self.verdicts):
                name = ASIDE * (1 + again) + case.node.number
                root = Node(0, None, read, "")
                jobs.append(Job(root, self.max_tokens, (), self.sampling, case.problem.number, name))
                of.append(at)
        drawn = self.policy.draw(jobs) if jobs else []
        self.policy.forget([job.node for job in jobs])
        found: list[list[Any]] = [[] for _ in cases]
        for at, each in zip(of, drawn, strict=True):
            found[at].append(each)
        return [
            f"the judge cannot read its question: {read}" if isinstance(read, str) else self._verdict(len(read), each)
            for read, each in zip(tokens, found, strict=True)
        ]

    def _verdict(self, prompt: int, drawn: Sequence[Any]) -> Verdict | str:
        fault = next((each for each in drawn if isinstance(each, str)), None)
        if fault is not None:
            return f"the judge could not answer: {fault}"
        spent = sum(prompt + len(each.tokens) for each in drawn)
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
        roots = [Node(0, None, (*read, *lead), "") for read in tokens if not isinstance(read, str)]
        found = self.policy.likelihood([r for r in roots for _ in words], [w for _ in roots for w in words])
        self.policy.forget(roots)
        pairs = iter(zip(found[::2], found[1::2], strict=True))
        out: list[Verdict | str] = []
        for read in tokens:
            if isinstance(read, str):
                out.append(f"the judge cannot read its question: {read}")
                continue
            yes, no = next(pairs)
            if isinstance(yes, str) or isinstance(no, str):
                out.append(f"the judge could not answer: {yes if isinstance(yes, str) else no}")
                continue
            self.asked += 1
            gap = math.fsum(no) - math.fsum(yes)
            score = 1.0 / (1.0 + math.exp(min(gap, 700.0)))
            out.append(Verdict(score, len(read) + len(lead) + len(words[0]) + len(words[1])))
        return out

    def report(self) -> dict[str, float]:
        """How many verdicts were asked for, and the share that could not be read."""
        return {"asked": float(self.asked), "unreadable": self.unread / self.asked if self.asked else 0.0}
