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
_CHOSEN = re.compile(_PHRASE.pattern.replace("answer", r"(?:answer|(?:correct|best|right)\s+(?:option|choice))"), re.I)
_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_DISPLAY = re.compile(r"(?:\\\[|\$\$)(.+?)(?:\\\]|\$\$)", re.DOTALL)
_SENTENCE = re.compile(r"\.(?=\s|$)|\n|\*\*")
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.,])(?:(?<![)\]}\-])[-\u2010-\u2013\u2212\ufe63\uff0d])?\$?"
    r"(?:[0-9]{1,9} (?=[0-9]{1,9} ?/ ?[0-9]))?"
    r"(?:[0-9]{1,3}(?:(?:,[0-9]{3})+|(?:[ \u00a0\u2009\u202f][0-9]{3})+)(?![0-9])|[0-9]+|(?=\.[0-9]))(?:\.[0-9]+)?"
    r"(?:[eE][-+]?[0-9]+)?(?: ?/ ?[0-9]+)?(?:\\?%)?(?![0-9])(?:\s(?:hundred|thousand|million|billion|trillion)\b)?"
)
_DENIED = re.compile(
    r"(?:(?:\b(?:not|cannot|never|neither)|n['’]t)(?:\s+\w+){0,2}|\b(?:either|minus|negative)"
    r"|(?:^\s*|[A-Za-z,:]\s+)[$(\\]{0,3}[0-9]+\s+or)"
    r"\s*[$(\\]{0,3}\s*$",
    re.IGNORECASE,
)
"""Right before a number: it is not the answer."""
_OPEN = re.compile(
    r"(?:\b(?:between|than|one\s+of|among|at\s+(?:least|most)|above|below|over|under)|[<≠≤≥]|(?<![\w=/-])>"
    r"|\\(?:neq?|not|[lg](?:eq?|t)))\s*[$(\\]{0,3}\s*$",
    re.IGNORECASE,
)
"""The same, right before the first number of a sentence."""
_ELSE = re.compile(
    r"\s*(?:(?:[-+*/^×÷~]|\.\.|\+/-|to\s)\s*[0-9($\\]|:[0-9]|(?<=\s):\s[0-9]"
    r"|and\s+an?\s+\w|(?:less|more|fewer)\s+than"
    r"|(?:times|plus|minus|over|divided|squared|cubed|factorial)\b)"
    r"|.*\b(?:or|wait|actually|correction)\b[^0-9]*[0-9]",
    re.IGNORECASE,
)
"""After it: more is to be worked out, it is a part of a ratio or a time, or another answer follows."""
_TUPLE = re.compile(r"[(\[{]\s*-?\$?[0-9][^()\[\]{}]*,[^()\[\]{}]*[)\]}]")
"""Numbers between brackets: a point, an interval, a set."""
THINK = ("<think>", "</think>")


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


def after_thinking(text: str) -> str:
    """What a text says outside of its thoughts: behind the last </think>, or before a <think> that does not end.

    A guess that was made on the way is no answer, however right it is.

    >>> after_thinking("<think>5? No.</think> It is 7."), after_thinking("Well. <think> 5"), after_thinking("5")
    (' It is 7.', 'Well. ', '5')
    """
    return text.rpartition(THINK[1])[2].partition(THINK[0])[0]


def final_answer(text: str, *, sources: Sequence[Source] = SOURCES) -> str | None:
    """The final answer that a text states, by the first of these sources that it has; None if it has none.

    tag: what stands in the last <answer> </answer> (2501.12948), or the last box in it. boxed: the last complete box
    (of a box that holds nothing but a box, the inner one).
    hash: what follows the last "####" in its line (GSM8K, 2110.14168). phrase: what follows the last "answer is" or
    "answer:" in its sentence. number: the last number, with the formula around it. Only what follows the thinking is
    read (`after_thinking`), of it the last MAX_READ characters. A sentence that leaves its number open ("either 3 or
    4", "not 5") is itself the answer, and so equals no number.

    >>> final_answer("2 + 2 = 4. The answer is 5 apples."), final_answer("so 1,234 in all", sources=["boxed"])
    ('5 apples', None)
    """
    text = after_thinking(text)[-MAX_READ:]
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
            found = [_denied(text, match) or _in_formula(text, match) for match in list(_NUMBER.finditer(text))[-1:]]
        if found and (stated := found[0].strip().strip("*`").strip()):
            return stated
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
    display = _DISPLAY.match(rest[:1000])
    if display and not _ELSE.match(rest[:1000], display.end()):
        return display[1].strip()
    sentence = _SENTENCE.split(rest[:1000], maxsplit=1)[0].strip()
    if read(sentence).values:
        return sentence
    found = re.search(r"\$([^$]+)\$|\\\((.+?)\\\)", sentence) or _NUMBER.search(sentence)
    before = sentence[: found.start()] if found else ""
    if found is None or _DENIED.search(before) or _OPEN.search(before) or _ELSE.match(sentence, found.end()):
        return sentence
    around = next((t for t in _TUPLE.finditer(sentence) if t.start() < found.start() < t.end()), None)
    if around and not any(found.groups()):
        return sentence if re.search(r"[\\()\[\]{}∪∩]", sentence.replace(around[0], "")) else around[0]
    return next(filter(None, found.groups()), found[0])


def _denied(text: str, match: re.Match[str]) -> str | None:
    """What its sentence says up to a number that it calls wrong, or one of two; else None."""
    before = _SENTENCE.split(text[max(match.start() - 200, 0) : match.start()])[-1]
    return before + match[0] if _DENIED.search(before) else None


def _in_formula(text: str, match: re.Match[str]) -> str:
    """A number; all that is written without space where it is a part of a formula (\\frac{1}{2}, 2^10, 3½, 12,5)."""
    start, end = match.span()
    before, after = text[start - 1 : start], text[end : end + 2]
    inside = before in ("^", "_", "{", "}", "\\", "√", "∛", "⁄") or before.isdigit() or after[:1].isdigit()
    if not inside and not re.match(r"[\^_}π⁄‰½⅓⅔¼¾⅕⅛]|,[0-9]", after):
        return match[0]
    head, tail = (
        re.search(r"\S{0,200}$", text[max(start - 200, 0) : start]),
        re.match(r"\S{0,200}", text[end : end + 200]),
    )
    around = f"{head[0] if head else ''}{match[0]}{tail[0] if tail else ''}"
    return around.strip("$*`\"'.,;:!?")


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

    example[key] is a letter, or an index from 0. The choice is read from the last box, "answer is (B)", "answer: B" or
    "correct option is B", a text that is a letter alone, the last letter in parentheses, or a letter that begins the
    only line of the kind "B) ...", in this order; within the last <answer> </answer> where there is one. A small letter
    that begins more words ("answer is a bird") is none, and neither are two letters side by side ("A or B").
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
        text = after_thinking(text)[-MAX_READ:]
        text = (_TAG.findall(text) or [text])[-1]
        one = rf"\(?([{re.escape(self.letters)}])(?:\)|(?![\w'’]))"
        if found := boxes(text):
            text = re.sub(r"\\(?:[,;:! \\]|q?quad|lor|land|vee|wedge)", ",", found[-1])
            text = re.sub(r"\\text\w*|\\math(?:rm|bf)|[{}$\s]", "", text)
            match = re.match(rf",*(?:option|choice)?{one}", text, re.IGNORECASE)
        elif phrases := list(_CHOSEN.finditer(text)):
            match = re.compile(rf"\s*(?:option|choice)?\s*[$*\[\"`]*{one}", re.IGNORECASE).match(
                text, phrases[-1].end()
            )
            if match and match[1].islower() and match[0][-1] != ")" and re.match(r"[ \t]+\w", text[match.end() :]):
                return None
        elif (match := re.fullmatch(rf"[\s*]*(?:(?:option|choice)\s)?{one}[.:]?[\s*]*", text, re.IGNORECASE)) is None:
            return self._marked(text)
        if match is None or self._joined(match[1], text[match.end() :]):
            return None
        return match[1].upper()

    def _marked(self, text: str) -> str | None:
        """The last letter in parentheses, or the only one that begins a line."""
        letters = re.escape(self.letters)
        marked = list(re.finditer(rf"\(([{letters}])\)", text))[-2:]
        if len(marked) == 2 and self._joined(marked[0][1], text[marked[0].end() : marked[1].end()]):
            return None
        begun = re.findall(rf"^[ *]*([{letters}])[).:]", text, re.MULTILINE)
        return marked[-1][1] if marked else begun[0] if len(begun) == 1 else None

    def _joined(self, letter: str, rest: str) -> bool:
        """Whether another letter stands beside it, as in "A or B": who names several has chosen none."""
        letters = re.escape(self.letters)
        joint = r"[ \t,;/|&+*$)]{0,8}(?:and/or|and|or|to|through|maybe|as\swell\sas)?[ \t,;/*$]{0,8}"
        other = re.match(rf"{joint}(?:\(([{letters}])\)|([{letters}])(?![\w'’]))", rest)
        return other is not None and (other[1] or other[2]).upper() != letter.upper()
