"""What can be said of a text without a model: its form, and whether the arithmetic that it states is so.

Nothing of the text is run: Python is parsed, JSON is read, arithmetic is worked out by `text.arithmetic`.
"""

from __future__ import annotations

import ast
import itertools
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

from jaxpost.text.arithmetic import BadExpression, evaluate

Form = Literal["brackets", "equations", "json", "python"]
MAX_CHARS = 20_000
"""Of a text whose equations are read; more than that of JSON or Python is not well formed."""

_PAIRS = {")": "(", "]": "[", "}": "{"}
_FENCE = re.compile(r"```[ \t]*(\w*)[^\n]*\n(.*?)```", re.DOTALL)
_ARITHMETIC = frozenset("0123456789+-−–*/×·⋅÷().,%$ []")
_SIGNS = "+*/×·⋅÷"
_OPERATORS = _SIGNS + "-−–"
_NEAR = 200
"""Characters of an equation's side that are read."""
_TIMES = re.compile(r"(?<=\d) ?(?:[xX]|\\times|\\cdot) ?(?=[\d(])")
_ITEM = re.compile(r"^\s*(?:[-*•]|\d{1,3}[.):])\s+")
_NAMED = re.compile(
    r"(?<![\w.])([A-Za-z]\w{0,40})[ ]?=[ ]?(-?\d[\d,]{0,30}(?:\.\d{1,30})?)(?![\w.,]{0,30}[ ]?[-+*/×·÷(\d=])"
)
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?:\D|$))")


def balanced(text: str) -> bool:
    """Every bracket closes the one that was opened last.

    >>> balanced("f(x[0])"), balanced("(]"), balanced("(")
    (True, False, False)
    """
    opened: list[str] = []
    for letter in text:
        if letter in "([{":
            opened.append(letter)
        elif letter in _PAIRS and (not opened or opened.pop() != _PAIRS[letter]):
            return False
    return not opened


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language; the whole text where there is no fence at all.

    >>> blocks("So:\\n```json\\n{}\\n```", "json")
    ['{}\\n']
    """
    fences = _FENCE.findall(text)
    return [body for name, body in fences if name.lower() in (language, language[:2], "")] if fences else [text]


def _parses(text: str, form: Literal["json", "python"]) -> bool:
    if len(text) > MAX_CHARS or not text.strip():
        return False
    try:
        if form == "json":
            json.loads(text)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what the text's own code would be warned of
                ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def well_formed(text: str, form: Form) -> float:
    """Share in [0, 1] that has the form.

    brackets: 1 if balanced. equations: of the signs "=", those that stand between two expressions or words; 1 without
    any. json, python: of the fenced blocks, those that parse; without a fence, the whole text.

    >>> well_formed("3+4=7; 7*=2", "equations"), well_formed('{"a": 1}', "json"), well_formed("def f(", "python")
    (0.5, 1.0, 0.0)
    """
    if form == "brackets":
        return float(balanced(text))
    if form == "equations":
        found = [_is_side(left, at=-1) and _is_side(right, at=0) for left, right in _equalities(text[:MAX_CHARS])]
        return sum(found) / len(found) if found else 1.0
    parts = blocks(text, form)
    return sum(_parses(part, form) for part in parts) / len(parts) if parts else 0.0


def _equalities(text: str) -> Iterator[tuple[str, str]]:
    """What stands before and after each "=" of a line, up to the next one."""
    for line in re.split(r"[\n;]", text):
        line = _ITEM.sub("", line, count=1) if "=" in line else ""
        yield from itertools.pairwise(_TIMES.sub("*", line).split("="))


def _before(text: str) -> tuple[str, str]:
    """The arithmetic at a text's end, and the last character in front of it."""
    near = text[-_NEAR:]
    at = next((i for i in range(len(near), 0, -1) if near[i - 1] not in _ARITHMETIC), 0)
    return near[at:].strip().lstrip(").,%").strip(), near[:at].rstrip()[-1:]


def _after(text: str) -> tuple[str, str]:
    """The arithmetic at a text's beginning, and the character behind it."""
    near = text[:_NEAR]
    end = next((i for i, letter in enumerate(near) if letter not in _ARITHMETIC), len(near))
    found = re.split(r"[.,] ", near[:end], maxsplit=1)[0]
    return found.rstrip(" .,([-−+*/×$"), near[end : end + 1] if near[:end][-1:].isdigit() else ""


def _is_side(text: str, *, at: int) -> bool:
    """An expression, or a word, stands next to the sign."""
    stripped = text.strip()
    if not stripped:
        return False
    if stripped[at].isalpha() or stripped[at] in "\"'{}\\":
        return True
    found, _ = _before(text) if at else _after(text)
    try:
        _value(found if at else text[: len(found)] if found else text)
    except BadExpression:
        return False
    return at != 0 or not set(text[len(found) : len(found) + 2].strip()) & set("*/×÷+")


def syntax(text: str, forms: Sequence[Form] = ("brackets", "equations")) -> float:
    """The product of `well_formed` over forms.

    >>> syntax("(3+4)=7"), syntax("(3+4=7")
    (1.0, 0.0)
    """
    score = 1.0
    for form in forms:
        score *= well_formed(text, form)
    return score


class Statement(NamedTuple):
    """Something that a text states, and whether it is so."""

    text: str
    holds: bool
    why: str = ""


def _value(side: str) -> Fraction:
    cleaned = _THOUSANDS.sub("", side.replace("$", "")).strip().rstrip(".,")
    share = cleaned.endswith("%")
    value = evaluate(cleaned.removesuffix("%")).value
    return value / 100 if share else value


def _agree(left: Fraction, right: Fraction, written: str) -> bool:
    """Equal; or `written`, a decimal, is the other rounded to its places."""
    decimals = re.fullmatch(r"[-−]?\d+\.(\d+)", _THOUSANDS.sub("", written.replace("$", "")).strip().rstrip(".,"))
    slack = Fraction(1, 2 * 10 ** len(decimals[1])) if decimals else Fraction(0)
    return abs(left - right) <= slack


def statements(text: str) -> Iterator[Statement]:
    """Arithmetic "a op b = c (= d)", each equality worked out exactly, and names that are given two values.

    A decimal on the right may be rounded to the places that it shows. A name's second value contradicts its first
    where no other text (such as "x = x + 1") says why it changed.

    >>> [(s.text, s.holds) for s in statements("40+30=70; 70+8=79. So x = 3 and later x = 4.")]
    [('40+30=70', True), ('70+8=79', False), ('x = 3', True), ('x = 4', False)]
    """
    text = text[:MAX_CHARS]
    for before, after in _equalities(text):
        (left, word), (right, glued) = _before(before), _after(after)
        if not left or not right or glued.isalnum() or left[0] in _SIGNS or (word and not set(left) & set(_OPERATORS)):
            continue  # "5 apples + 4 = 9": what is left of the sign is not the whole side
        if word.isalnum() and left[0] in "-−–":
            continue
        try:
            a, b = _value(left), _value(right)
        except BadExpression:
            continue
        holds = _agree(a, b, right)
        yield Statement(f"{left}={right.strip()}", holds, "" if holds else f"{left} is {a}")
    known: dict[str, tuple[Fraction, str]] = {}
    for name, number in _NAMED.findall(text):
        value, said = _value(number), f"{name} = {number}"
        first, earlier = known.setdefault(name, (value, said))
        yield Statement(said, value == first, "" if value == first else f"{earlier} was said before")


def logic(text: str, *, empty: float = 1.0) -> float:
    """Share of the text's `statements` that hold; `empty` where it states nothing.

    >>> logic("40+30=70; 70+8=79"), logic("no idea")
    (0.5, 1.0)
    """
    found = [statement.holds for statement in statements(text)]
    return sum(found) / len(found) if found else empty


_REFUSAL = re.compile(
    r"\b(?:i(?:['’]m| am) sorry|i (?:can(?:['’]t|not| not)|won['’]t|will not|am (?:not able|unable) to|must decline)"
    r"|i(?:['’]m| am) (?:not able|unable) to|as an ai\b.{0,60}\b(?:can(?:['’]t|not)|unable))",
    re.IGNORECASE,
)


def refuses(text: str, *, within: int = 200) -> bool:
    """The text's beginning says that it will not answer.

    >>> refuses("I'm sorry, but I can't help with that."), refuses("The answer is 4. I cannot say more.", within=16)
    (True, False)
    """
    return _REFUSAL.search(text[:within]) is not None
