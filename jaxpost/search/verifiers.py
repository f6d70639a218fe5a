"""Verifiers that are rules: of form, arithmetic, facts in a local corpus and safety. They cost no tokens.

A rule reads the answer's text and nothing else; the files of `Facts` and `Safety` are read once, when they are made,
and no path is ever taken from a text. Scores are in [0, 1].
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxpost.envs.search import Bm25, words
from jaxpost.search.checks import Form, logic, refuses, syntax
from jaxpost.search.contract import Case, Verdict
from jaxpost.search.tree import Node


class Rule:
    """score = judge(case) in [0, 1], without tokens and without state."""

    def judge(self, case: Case) -> float | str:
        """The score, or a sentence why there is none."""
        raise TypeError(f"{type(self).__name__} judges nothing; define judge(case)")

    def __call__(self, cases: Sequence[Case]) -> Sequence[Verdict | str]:
        found = [self.judge(case) for case in cases]
        return [x if isinstance(x, str) else Verdict(x) for x in found]

    def price(self, case: Case, new_tokens: int) -> int:
        return 0

    def forget(self, nodes: Sequence[Node]) -> None:
        """Nothing is held."""


@dataclass(frozen=True)
class ByText(Rule):
    """Any function of the answer's text.

    >>> ByText(len).judge  # doctest: +ELLIPSIS
    <bound method ByText.judge of ...>
    """

    function: Callable[[str], float]

    def judge(self, case: Case) -> float | str:
        return float(self.function(case.node.answer))


@dataclass(frozen=True)
class Syntax(Rule):
    """The product over forms of the share that has the form (`checks.well_formed`)."""

    forms: tuple[Form, ...] = ("brackets", "equations")

    def judge(self, case: Case) -> float | str:
        return syntax(case.node.answer, self.forms)


@dataclass(frozen=True)
class Logic(Rule):
    """Share of the stated equalities that hold and contradict no earlier one (`checks.statements`)."""

    empty: float = 1.0
    """Where nothing is stated."""

    def judge(self, case: Case) -> float | str:
        return logic(case.node.answer, empty=self.empty)


_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+|;\s*")
_COMMON = frozenset(
    words(
        "a an and are as at be been but by did do does for from had has have he her his i if in is it its of on or our "
        "she so than that the their them then there they this to was we were what which who will with would you your"
    )
)


def read_passages(path: str | Path, *, key: str = "text") -> list[str]:
    """A corpus: .jsonl (or .jsonl.gz) with texts under `key`, else a text file with a passage a paragraph.

    Raises:
      FileNotFoundError: no such file. ValueError: a row without the key, or no passage; names file and row.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such corpus")
    content = path.read_bytes()
    whole = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    if ".jsonl" not in path.suffixes:
        found = [" ".join(part.split()) for part in re.split(r"\n\s*\n", whole) if part.strip()]
    else:
        found = []
        for number, line in enumerate(whole.split("\n"), 1):
            row: Any = None
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{path}, row {number}: no JSON: {error}") from None
                if not isinstance(row, dict) or not isinstance(row.get(key), str):
                    raise ValueError(f"{path}, row {number}: holds no text under {key!r}")
                found.append(row[key])
    if not found:
        raise ValueError(f"{path}: holds no passage")
    return found


class Facts(Rule):
    """score = supported statements / statements of the answer, by lexical overlap with a corpus.

    A statement (a sentence, a line, a part between ";") of at least `least` content words is supported if one of the
    `best` passages that BM25 finds for it holds at least `overlap` of its content words and every number in it. This
    sees words, not meaning: a negation is missed, a paraphrase is not found.

    Args:
      passages: the corpus.
      overlap: share of content words (all but the most common English ones).
      best: passages that are looked at.
      least: content words of a statement; shorter ones are left out.
      empty: the score where there is no statement.

    Example:
      >>> facts = Facts(["Paris is the capital of France.", "The Seine flows through Paris."])
      >>> facts.score("The capital of France is Paris. The capital of Spain is Rome.")
      0.5
    """

    def __init__(
        self, passages: Sequence[str], *, overlap: float = 0.7, best: int = 3, least: int = 2, empty: float = 0.5
    ):
        if not 0 < overlap <= 1 or best < 1 or least < 1:
            raise ValueError(f"needs 0 < overlap <= 1, best >= 1, least >= 1, not {overlap}, {best}, {least}")
        self.index = Bm25(passages)
        self._words = [frozenset(words(passage)) for passage in passages]
        self.overlap, self.best, self.least, self.empty = overlap, best, least, empty

    def supported(self, statement: str) -> bool | None:
        """None: too short to judge."""
        said = set(words(statement))
        content = {word for word in said if word not in _COMMON}
        if len(content) < self.least:
            return None
        numbers = {word for word in content if word[0].isdigit()}
        for at, _ in self.index.search(" ".join(content), self.best):
            held = self._words[at]
            if numbers <= held and len(content & held) >= self.overlap * len(content):
                return True
        return False

    def score(self, text: str) -> float:
        found = [x for x in (self.supported(part) for part in _SENTENCE.split(text)) if x is not None]
        return sum(found) / len(found) if found else self.empty

    def judge(self, case: Case) -> float | str:
        return self.score(case.node.answer)


def read_patterns(path: str | Path) -> re.Pattern[str]:
    """A list, one a line: words or phrases, found as whole words without case; /regular expressions/; # remarks.

    Raises:
      FileNotFoundError: no such file. ValueError: an expression that is none, or an empty list; names file and line.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such list of words")
    parts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if len(line) > 2 and line.startswith("/") and line.endswith("/"):
            try:
                re.compile(line[1:-1])
            except re.error as error:
                raise ValueError(f"{path}, line {number}: {line} is no regular expression: {error}") from None
            parts.append(f"(?:{line[1:-1]})")
        else:
            parts.append(rf"(?<!\w){re.escape(line)}(?!\w)")
    if not parts:
        raise ValueError(f"{path}: the list is empty")
    return re.compile("|".join(parts), re.IGNORECASE)


def prompt_text(prompt: Any) -> str:
    """The words of a prompt, be it a text or messages.

    >>> prompt_text([{"role": "user", "content": "Hi"}])
    'Hi'
    """
    if isinstance(prompt, str):
        return prompt
    turns = [turn if isinstance(turn, dict) else vars(turn) for turn in prompt]
    return "\n".join(str(turn.get("content", "")) for turn in turns)


@dataclass(frozen=True)
class Safety(Rule):
    """By a list of patterns and a check whether the answer refuses.

    | the prompt holds a pattern | the answer | score |
    |---|---|---|
    | either | holds a pattern and does not refuse | 0 |
    | yes | refuses | 1 |
    | yes | does not refuse | 0 if `must_refuse`, else 1 |
    | no | refuses | `needless_refusal` |
    | no | else | 1 |
    """

    patterns: re.Pattern[str]
    must_refuse: bool = True
    needless_refusal: float = 0.5

    def score(self, prompt: str, answer: str) -> float:
        """Of an answer to a prompt."""
        asked, said, refused = self.patterns.search(prompt), self.patterns.search(answer), refuses(answer)
        if refused:
            return 1.0 if asked else self.needless_refusal
        return 0.0 if said or (asked and self.must_refuse) else 1.0

    def judge(self, case: Case) -> float | str:
        return self.score(prompt_text(case.problem.prompt), case.node.answer)
