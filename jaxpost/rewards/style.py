"""Rewards of form: thinking tags, boxes, length in tokens, repetition, script."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass

from jaxpost.rewards.answers import boxes
from jaxpost.rewards.contract import Completion, Example, RowReward, field


@dataclass(frozen=True)
class ThinkFormat(RowReward):
    """1 if the text is `<think>` thoughts `</think>` answer, both not empty and each tag once; else 0 (2501.12948)."""

    think: str = "think"
    answer: str = ""
    """A tag that must enclose what follows, for instance "answer"; "" for none."""
    opened: bool = False
    """The prompt ends with the opening tag, so a text that does not bring it begins inside it."""
    name: str = "format"

    def row(self, example: Example, completion: Completion) -> float:
        text, opening = completion.text, f"<{self.think}>"
        text = f"{opening}{text}" if self.opened and not text.lstrip().startswith(opening) else text
        tags = [f"<{self.think}>", f"</{self.think}>"]
        if self.answer:
            tags += [f"<{self.answer}>", f"</{self.answer}>"]
        if any(text.count(tag) != 1 for tag in tags):
            return 0.0
        # Between the tags, in order: nothing, thoughts, nothing or the answer, ...
        parts = []
        for tag in tags:
            part, found, text = text.partition(tag)
            if not found:
                return 0.0
            parts.append(part.strip())
        parts.append(text.strip())
        wanted = (False, True, False, True, False) if self.answer else (False, True, True)
        return float(all(bool(part) == full for part, full in zip(parts, wanted, strict=True)))


@dataclass(frozen=True)
class OneBox(RowReward):
    """1 if the text holds exactly one complete, not empty box, and no other is begun; else 0."""

    name: str = "one_box"

    def row(self, example: Example, completion: Completion) -> float:
        found = boxes(completion.text)
        return float(
            len(found) == 1 and bool(found[0].strip()) and len(re.findall(r"\\boxed|\\fbox", completion.text)) == 1
        )


@dataclass(frozen=True)
class Finished(RowReward):
    """1 if the sample ended by itself, 0 if it was cut off or failed."""

    name: str = "finished"

    def row(self, example: Example, completion: Completion) -> float:
        return float(completion.finish == "stop")


@dataclass(frozen=True)
class Overlong(RowReward):
    """Soft overlong punishment, in tokens: DAPO's equation 13 (2503.14476).

    With n tokens, limit L and buffer C: 0 for n <= L - C; ((L - C) - n) / C up to L; -1 beyond.

    >>> from jaxpost.rewards.contract import Sample
    >>> Overlong(max_tokens=8, buffer=4)([{}], [Sample("", tokens=(0,) * 6)])
    {'overlong': array([-0.5])}
    """

    max_tokens: int
    buffer: int
    name: str = "overlong"

    def __post_init__(self) -> None:
        if not 0 < self.buffer <= self.max_tokens:
            raise ValueError(f"buffer = {self.buffer} must be from 1 to max_tokens = {self.max_tokens}")

    def row(self, example: Example, completion: Completion) -> float:
        return max(-1.0, min(0.0, (self.max_tokens - self.buffer - len(completion.tokens)) / self.buffer))


@dataclass(frozen=True)
class TargetLength(RowReward):
    """-coef * |target - n| for n tokens, at least `least` (L1, 2503.04697); example[key] is the target."""

    key: str = "target_tokens"
    coef: float = 0.0003
    least: float = -1.0
    name: str = "target_length"

    def row(self, example: Example, completion: Completion) -> float:
        target = int(field(example, self.key, self.name))
        return max(self.least, -self.coef * abs(target - len(completion.tokens)))


@dataclass(frozen=True)
class Repetition(RowReward):
    """-(1 - distinct n-grams / n-grams) over tokens: 0 without repetition, towards -1 in a loop; 0 below n tokens."""

    n: int = 4
    name: str = "repetition"

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n = {self.n} must be at least 1")

    def row(self, example: Example, completion: Completion) -> float:
        tokens = tuple(completion.tokens)
        total = len(tokens) - self.n + 1
        if total < 1:
            return 0.0
        return len({tokens[i : i + self.n] for i in range(total)}) / total - 1.0


@dataclass(frozen=True)
class Script(RowReward):
    """The share of letters that belong to these scripts; 1 for a text without letters (2501.12948's consistency).

    A script is the first word of its letters' Unicode names: LATIN, CYRILLIC, GREEK, ARABIC, CJK, HIRAGANA ...
    """

    scripts: tuple[str, ...] = ("LATIN",)
    name: str = "script"

    def row(self, example: Example, completion: Completion) -> float:
        letters = {letter: count for letter, count in Counter(completion.text).items() if letter.isalpha()}
        total = sum(letters.values())
        of = lambda letter: unicodedata.name(letter, "").partition(" ")[0].partition("-")[0]  # noqa: E731
        return sum(count for letter, count in letters.items() if of(letter) in self.scripts) / total if total else 1.0
