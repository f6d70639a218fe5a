"""Rewards that compare a final answer with the reference: mathematics and multiple choice."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxpost.rewards.contract import Completion, Example, RowReward, field
from jaxpost.rewards.latex import equal, read

Source = Literal["tag", "boxed", "hash", "phrase", "number"]
SOURCES: tuple[Source, ...] = ("boxed", "hash", "phrase", "number")

MAX_READ = 2**16
"""Characters at the end of a text in which the answer is looked for."""
MAX_NESTED = 3
"""Boxes in boxes that are opened."""

_PHRASE = re.compile(r"\banswer(?:\s+is|\s*[:：=])[:：\s*]*", re.IGNORECASE)
_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_SENTENCE = re.compile(r"\.(?=\s|$)|\n|\*\*")
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.,])(?:(?<![)\]}\-])-)?\$?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+|(?=\.[0-9]))(?:\.[0-9]+)?"
    r"(?:[eE][-+]?[0-9]+)?(?:/[0-9]+)?(?:\\?%)?(?![0-9])"
)


def boxes(text: str) -> list[str]:
    """The contents of every complete \\boxed{...} or \\fbox{...}, outermost first, braces inside them matched.

    One pass: an escaped brace is text, a box whose braces do not close is none.

    >>> boxes(r"so \\boxed{\\frac{1}{2}} and \\boxed{3")
    ['\\\\frac{1}{2}']
    """
    found: list[tuple[int, int]] = []
    opened: list[int] = []  # start of a box's contents, or -1 for another brace
    for match in re.finditer(r"\\(?:boxed|fbox)\s{0,4}\{|\\[{}]|[{}]", text):
        token = match[0]
        if token == "{":
            opened.append(-1)
        elif token == "}":
            start = opened.pop() if opened else -1
            if start >= 0:
                found.append((start, match.start()))
        elif len(token) > 2:
            opened.append(match.end())
    inner, outer = -1, []
    for start, end in sorted(found):
        if start > inner:
            outer.append(text[start:end])
            inner = end
    return outer


def final_answer(text: str, *, sources: Sequence[Source] = SOURCES) -> str | None:
    """The final answer that a text states, by the first of these sources that it has; None if it has none.

    tag: what stands in the last <answer> </answer> (2501.12948), or the last box in it. boxed: the last complete box
    (of a box that holds nothing but a box, the inner one).
    hash: what follows the last "####" in its line (GSM8K, 2110.14168). phrase: what follows the last "answer is" or
    "answer:" in its sentence. number: the last number. Only the last MAX_READ characters are read.

    >>> final_answer("2 + 2 = 4. The answer is 5 apples."), final_answer("so 1,234 in all", sources=["boxed"])
    ('5 apples', None)
    """
    text = text[-MAX_READ:]
    for source in sources:
        if source == "tag":
            found = [(boxes(inside) or [inside])[-1] for inside in _TAG.findall(text)[-1:]]
        elif source == "boxed":
            found = [_unboxed(inside) for inside in boxes(text)[-1:]]
        elif source == "hash":
            found = [text.rpartition("####")[2].partition("\n")[0]] if "####" in text else []
        elif source == "phrase":
            found = [_phrase(text[match.end() :]) for match in list(_PHRASE.finditer(text))[-1:]]
        else:
            found = _NUMBER.findall(text)[-1:]
        if found and found[0].strip():
            return found[0].strip()
    return None


def _unboxed(text: str) -> str:
    for _ in range(MAX_NESTED):
        inner = boxes(text)
        if len(inner) != 1 or re.sub(r"\\[bf]\w*\s*\{", "", text.strip(), count=1) != inner[0] + "}":
            break
        text = inner[0]
    return text


def _phrase(rest: str) -> str:
    """The sentence's rest if it can be read as a whole, else mathematics between dollars or the first number in it."""
    sentence = _SENTENCE.split(rest[:1000], maxsplit=1)[0].strip()
    if read(sentence).values:
        return sentence
    if math := re.search(r"\$([^$]+)\$|\\\((.+?)\\\)", sentence):
        return math[1] or math[2]
    number = _NUMBER.search(sentence)
    return number[0] if number else sentence


@dataclass(frozen=True)
class MathAnswer(RowReward):
    """1 if the final answer equals the reference, else 0; both are read exactly, nothing is run.

    The reference is example[key]: an answer, a solution that ends in "#### answer" or a box, or a list of answers of
    which one is enough.
    """

    key: str = "answer"
    sources: tuple[Source, ...] = SOURCES
    """Where the answer may stand; ("boxed",) demands a box."""
    tolerance: float = 0.0
    """Relative, for rounded references."""
    name: str = "math"

    def row(self, example: Example, completion: Completion) -> float:
        gold = field(example, self.key, self.name)
        answer = final_answer(completion.text, sources=self.sources)
        if answer is None:
            return 0.0
        golds = gold if isinstance(gold, list | tuple) else [gold]
        return float(any(equal(reference_of(one), answer, tolerance=self.tolerance) for one in golds))


def reference_of(gold: Any) -> str:
    """The answer in a reference: what follows "####" or stands in a box, else all of it."""
    text = str(gold)
    return final_answer(text, sources=("hash", "boxed")) or text


@dataclass(frozen=True)
class MultipleChoice(RowReward):
    """1 if the chosen letter is the reference, else 0.

    example[key] is a letter, or an index from 0. The choice is read from the last box, "answer is (B)" or "answer: B",
    a text that is a letter alone, the last letter in parentheses, or a letter that begins the only line of the kind
    "B) ...", in this order; within the last <answer> </answer> where there is one. A small letter that begins more
    words ("answer is a bird") is none.
    """

    key: str = "answer"
    letters: str = "ABCDE"
    name: str = "choice"

    def row(self, example: Example, completion: Completion) -> float:
        gold = field(example, self.key, self.name)
        if isinstance(gold, int) and not isinstance(gold, bool) and 0 <= gold < len(self.letters):
            gold = self.letters[gold]
        wanted = str(gold).strip().strip("()").upper()
        if len(wanted) != 1 or wanted not in self.letters:
            raise ValueError(f"reward {self.name!r}: {gold!r} is none of the choices {self.letters}")
        return float(self.choice(completion.text) == wanted)

    def choice(self, text: str) -> str | None:
        """The letter that a text chooses, if any."""
        text = text[-MAX_READ:]
        text = (_TAG.findall(text) or [text])[-1]
        one = rf"\(?([{re.escape(self.letters)}])(?:\)|(?![\w'’]))"
        if found := boxes(text):
            text = re.sub(r"\\text\w*|\\mathrm|[{}$\s]", "", found[-1])
            match = re.match(one, text, re.IGNORECASE)
        elif phrases := list(_PHRASE.finditer(text)):
            match = re.compile(rf"\s*(?:option|choice)?\s*[$*]*{one}", re.IGNORECASE).match(text, phrases[-1].end())
            if match and match[1].islower() and match[0][-1] != ")" and re.match(r"[ \t]+\w", text[match.end() :]):
                return None
        else:
            match = re.fullmatch(rf"[\s*]*{one}[.:]?[\s*]*", text, re.IGNORECASE)
            if match is None:
                marked = re.findall(rf"\(([{re.escape(self.letters)}])\)", text)[-1:]
                begun = re.findall(rf"^[ *]*([{re.escape(self.letters)}])[).:]", text, re.MULTILINE)
                return (marked or (begun if len(begun) == 1 else []) or [None])[0]
        return match[1].upper() if match else None
