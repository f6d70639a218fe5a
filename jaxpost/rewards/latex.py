"""Reads a short mathematical answer, plain or in LaTeX, as exact values; nothing is run and every size is limited."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from jaxpost.rewards.exact import Beyond, Exact

MAX_CHARS = 512
MAX_DEPTH = 24
MAX_DIGITS = 200
MAX_SIDES = 8
"""Of what is said to be equal."""

_UNITS = {"cm", "mm", "km", "kg", "mg", "ml", "ft", "lb", "oz", "mi", "yd", "hr", "am", "pm", "in", "mph", "dollars"}
_NAMES = {
    **{"centimeter": "cm", "centimetre": "cm", "millimeter": "mm", "millimetre": "mm"},
    **{"kilometer": "km", "kilometre": "km", "meter": "m", "metre": "m"},
    **{"kilogram": "kg", "gram": "g", "hr": "hour", "h": "hour", "minute": "min", "second": "s", "sec": "s"},
    **{"inche": "in", "inch": "in", "foot": "ft", "feet": "ft", "pound": "lb", "lb": "lb", "ounce": "oz", "mile": "mi"},
}
_UNIT = re.compile(
    r"(?P<value>.*(?:[0-9)}%]|\\pi))(?P<space>(?:[\s~]|\\[,;:! ])*)"
    r"(?:\\(?:text|mathrm|mbox|textrm|textbf|textnormal)\{(?P<text>[^{}]*)\}|(?P<word>[A-Za-z][A-Za-z ./]*))"
    r"(?P<power>\s*\^\s*\{?[23]\}?)?",
    re.DOTALL,
)
_WRAPPED = re.compile(r"\\(?:text|mathrm|mbox|textrm|textbf|textnormal|mathbf|mathit)\s*\{([^{}]*)\}")
_BLANKS = re.compile(r"(?<!\\)\\[!,;: ]|\\q?quad|~|\\(?:left|right|displaystyle|big|Big|bigl|bigr)(?![A-Za-z])")
_THOUSANDS = re.compile(r"(?<=[0-9])(?:\{,\}|\\,|,?\s?\\!\s?|[\u00a0\u2009\u202f])+(?=[0-9]{3}(?![0-9]))")
_SPACED = re.compile(r"\s*[-+]?[0-9]{1,3}(?: [0-9]{3})+(?:\.[0-9]+)?\s*")
_CLOSE = re.compile(r"\s*(?:\(|\[|\\\{)[^()\[\]]*(?:\)|\]|\\\})\s*")
_JOINED = re.compile(r"\s*,?\s+(?:and|or)\s+")
_REPEATED = re.compile(r"([0-9]{0,99})\.([0-9]{0,99})\\overline\s?\{?([0-9]{1,99})\}?")
_EITHER = re.compile(r"\\pm(?![A-Za-z])")
_NAMED = re.compile(r"\s*[A-Za-z](?:_\{?\w\}?)?(?:\([a-z]\))?\s*(?:=|\\in(?![a-z]))\s*(?=\S)")
_MIXED = re.compile(r"([-+]?)\s*([0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)")
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALE = re.compile(
    r"(?<=[0-9}])(?:[\s~]|\\[,;:! ]){0,8}(\\(?:text|mathrm|mbox|textrm|textbf|textnormal)\{\s{0,8})?"
    rf"({'|'.join(_SCALES)})s?(?![A-Za-z])"
)
_NO_UNITS = {
    "or", "and", "not", "is", "are", "was", "maybe", "perhaps", "possibly", "probably", "but", "plus", "minus", "over",
    "divided", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "twenty", "thirty", "fifty", "hundred", "infinity",
}  # fmt: skip
"""With one of these words anywhere, what follows a number is no unit: it may say another answer."""
_NO_FIRST = {
    "squared", "cubed", "factorial", "mod", "modulo", "choose", "sin", "cos", "tan", "cot", "log", "ln", "lg", "exp",
    "sqrt", "half", "halves", "thirds", "fourths", "fifths", "sixths", "sevenths", "eighths", "ninths", "tenths",
    "hundredths", "thousandths", "root", "raised", "to", "quadrillion", "lakh", "crore",
}  # fmt: skip
"""Right behind a number these change its value."""
_WORDS = re.compile(r"\s*(?![eiknxyzπ](?:\^.)?\s*\Z)(?:\(?[^\W\d_](?:[^\W\d_]|[\s.,'°/()-])*(?:\^[23]\s*)?)?")
"""A unit in \\text{}: no letter of mathematics, sign or further number."""
_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?)"
    r"|(?P<command>\\[A-Za-z]+)|(?P<word>[A-Za-z]+)|(?P<sign>\\[{}]|[-+*/^(){}\[\],])|(?P<other>\S))"
)
_REPLACED = str.maketrans(
    {
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-"),
        "¥": " ",
        "₹": " ",
        "²": "^2",
        "³": "^3",
        **{c: f"\\frac{over}{under}" for c, over, under in ("½12", "⅓13", "⅔23", "¼14", "¾34", "⅕15", "⅛18")},
        "\u2044": "/",
        "±": "\\pm",
        "×": "*",
        "·": "*",
        "⋅": "*",
        "÷": "/",
        "$": " ",
        "€": " ",
        "£": " ",
    }
)
_COMMANDS = {"\\cdot": "*", "\\times": "*", "\\div": "/", "\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\cfrac": "\\frac"}


class Unreadable(ValueError):
    """Not one of the forms that are read; such answers are compared as text."""


@dataclass(frozen=True)
class Answer:
    """What was read: values with their brackets, a unit, and the text in a normal form."""

    text: str
    values: tuple[Exact, ...] = ()
    """Empty where the answer is compared as text only."""
    brackets: str = ""
    """"" for one value, "{}" for a set or a list, else the two brackets as they were written."""
    percent: bool = False
    unit: str = ""


@lru_cache(maxsize=4096)
def read(text: str) -> Answer:
    """One answer: a number, an expression, a list, tuple, interval or set of them, or a word.

    >>> read("\\\\frac{3}{4}").values == read("0.75").values
    True
    """
    if len(text) > MAX_CHARS:
        # Not the beginning alone: a long number that ends otherwise is another one.
        rest = hashlib.blake2b(_plain(text).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        return Answer(f"{_plain(text[:MAX_CHARS])}...{rest}")
    plain = _plain(text)
    body = _THOUSANDS.sub("", text.replace("\\$", " ").translate(_REPLACED)).strip().rstrip(".").strip()
    if wrapped := _WRAPPED.fullmatch(body):  # \text{5 apples}
        body = wrapped[1].strip()
    for _ in range(2):  # "5 hundred thousand"
        body = _SCALE.sub(lambda m: f"*10^{_SCALES[m[2]]} {m[1] or ''}", body)
    body, unit = _split_unit(body)
    percent = body.endswith("%") or unit == "percent"
    body = _BLANKS.sub(" ", body.rstrip("%").rstrip("\\")) if percent else _BLANKS.sub(" ", body)
    body = _JOINED.sub(", ", _WRAPPED.sub(r" \1 ", body))
    body = body.replace(" ", "") if _SPACED.fullmatch(body) else _REPEATED.sub(_repeated, body)
    if named := _NAMED.match(body):  # x = 3, x = 4
        letter = re.escape(named[0].partition("=")[0].strip())
        body = re.sub(rf",\s*{letter}\s*=", ",", body[named.end() :])
    if _CLOSE.fullmatch(body) and not re.search(r",(?:\s|0[0-9]{2}(?![0-9]))", body):
        body = body.replace(",", ", ")  # (1,100) is a pair
    try:
        values, brackets = _parsed(body) if "=" not in body else _worked_out(body)
    except (Unreadable, Beyond):
        return Answer(plain)
    return Answer(plain, values, brackets, percent, "" if unit == "percent" else unit)


def equal(gold: str, answer: str, *, tolerance: float = 0.0) -> bool:
    """Whether two answers are the same: exactly, or as floats within tolerance * |gold|.

    A unit counts only where both have one. A percent sign that only one of them has means 1/100, or is left out where
    the bare number exceeds 1. What cannot be read as mathematics must be the same text, but for spaces, case and
    formatting.

    >>> equal("1,234.50", "$1234.5"), equal("\\\\frac{\\\\sqrt{8}}{2}", "\\\\sqrt 2"), equal("9**9", "387420489")
    (True, True, False)
    """
    a, b = read(gold), read(answer)
    if a.text and a.text == b.text:
        return True
    if not a.values or not b.values or a.brackets != b.brackets or (a.unit and b.unit and a.unit != b.unit):
        return False
    if a.percent == b.percent:
        return _same(a, b, 1, tolerance)
    bare, share = (b, a) if a.percent else (a, b)
    number = bare.values[0].rational if len(bare.values) == 1 else None
    over_one = number is not None and abs(number) > 1
    scale = Fraction(1) if over_one and _same(bare, share, 1, tolerance) else Fraction(1, 100)
    return _same(bare, share, scale, tolerance)


def _same(a: Answer, b: Answer, scale: Fraction | int, tolerance: float) -> bool:
    """Whether a = scale * b, in any order in sets."""
    factor = Exact.of(scale)
    try:
        scaled = tuple(value * factor for value in b.values)
        if a.brackets == "{}" and Counter(a.values) == Counter(scaled):
            return True
        if len(a.values) != len(scaled):
            return False
        near = lambda x, y: x == y or (tolerance > 0 and abs(float(x) - float(y)) <= tolerance * abs(float(x)))  # noqa: E731
        return all(near(x, y) for x, y in zip(a.values, scaled, strict=True))
    except Beyond:
        return False


def _repeated(match: re.Match[str]) -> str:
    """0.1\\overline{6} is (16 - 1)/90."""
    whole, once, again = match.groups()
    over = int(whole + once + again) - int("0" + whole + once)
    return f"({over}/{10 ** len(once) * (10 ** len(again) - 1)})"


def _worked_out(text: str) -> tuple[tuple[Exact, ...], str]:
    """The value of 5 + 3 = 8, whose sides all have it."""
    sides = [_parsed(side) for side in text.split("=")[:MAX_SIDES]]
    if text.count("=") >= MAX_SIDES or any(side != sides[0] or len(side[0]) > 1 for side in sides):
        raise Unreadable("an equation")
    return sides[0]


def _parsed(text: str) -> tuple[tuple[Exact, ...], str]:
    """Values and their brackets; a \\pm stands for two values."""
    if len(_EITHER.findall(text)) != 1:
        return _Parser(text).parse()
    both = [_Parser(_EITHER.sub(f" {sign} ", text)).parse() for sign in "+-"]
    if any(brackets not in ("", "{}") for _, brackets in both):
        raise Unreadable("\\pm between brackets")
    return tuple(dict.fromkeys(value for values, _ in both for value in values)), "{}"


def _plain(text: str) -> str:
    """Text in a normal form: no formatting, dollars, final stop, or spaces but between digits; lower case."""
    text = _WRAPPED.sub(r" \1 ", _BLANKS.sub(" ", text.replace("\\$", " ").translate(_REPLACED)))
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", text)
    text = re.sub(r"\\(?:([lgn]e)q|[dtc](frac))(?![A-Za-z])", lambda m: "\\" + (m[1] or m[2]), text)
    return re.sub(r"(?<![0-9]) | (?![0-9])", "", " ".join(text.split())).rstrip(".").casefold()


def _split_unit(text: str) -> tuple[str, str]:
    """("5", "cm") of "5 centimeters", "5\\text{ cm}" and so on; degrees are left out."""
    text = re.sub(r"(?:\^\s*\{?\s*\\circ\s*\}?|°|\\degree)\s*$", "", text).rstrip()
    text = re.sub(r"(?<=[0-9])\s{1,8}\(\s?([A-Za-z][A-Za-z ]+|[mgsh])\)$", r" \\text{\1}", text)
    found = _UNIT.fullmatch(text)
    if not found:
        return text, ""
    plain = found["text"] is None
    said = found["word"] if plain else found["text"]
    word = said.strip(" .").lower()
    words = word.split()
    if _NO_UNITS.intersection(words) or _NO_FIRST.intersection(words[:1]) or not (plain or _WORDS.fullmatch(said)):
        return text, ""
    if plain and not any(len(w) > 2 or w in _UNITS for w in words) and not (found["space"] and word in "mgsh"):
        return text, ""
    if not words:
        return found["value"].strip(), ""
    last = words[0].rstrip("s") if words[0] != "s" else "s"
    power = re.sub(r"[^23]", "", found["power"] or "")
    name = " ".join([_NAMES.get(last, last), *words[1:]])
    return found["value"].strip(), name + (f"^{power}" if power else "")


class _Parser:
    """Recursive descent over tokens (kind, text), with limits on length, depth and digits."""

    def __init__(self, text: str):
        if mixed := _MIXED.fullmatch(text.strip()):
            sign, whole, over, under = mixed.groups()
            text = f"{sign}({whole}+{over}/{under})"
        self.tokens: list[tuple[str, str]] = []
        for match in _TOKEN.finditer(text):
            kind, token = str(match.lastgroup), match[match.lastgroup or 0]
            if kind == "other" or len(token) > MAX_DIGITS or (kind == "word" and len(token) > 2 and token != "pi"):
                if token not in ("π", "√"):
                    raise Unreadable(token)
                kind, token = "command", {"π": "\\pi", "√": "\\sqrt"}[token]
            if kind == "word" and token != "pi":
                self.tokens += [("letter", letter) for letter in token]
            else:
                token = "\\pi" if token == "pi" else _COMMANDS.get(token, token)
                self.tokens.append(("sign" if token in "*/" else kind, token))
        self.at, self.depth = 0, 0

    def peek(self) -> tuple[str, str]:
        return self.tokens[self.at] if self.at < len(self.tokens) else ("end", "")

    def take(self, *wanted: str) -> str:
        """The next token if it is one of these, else ''."""
        kind, token = self.peek()
        if kind == "end" or token not in wanted:
            return ""
        self.at += 1
        return token

    def need(self, token: str) -> None:
        if not self.take(token):
            raise Unreadable(f"{token} is missing")

    def parse(self) -> tuple[tuple[Exact, ...], str]:
        """All values and their brackets."""
        first, last = (self.tokens[0][1], self.tokens[-1][1]) if self.tokens else ("", "")
        if first in ("(", "[", "\\{") and last in (")", "]", "\\}"):
            try:
                self.at = 1
                values = self.items()
                if self.take(last) and self.at == len(self.tokens) and (len(values) > 1 or first == "\\{"):
                    return values, "{}" if first == "\\{" else first + last
            except Unreadable:
                pass
            self.at, self.depth = 0, 0
        values = self.items()
        if self.at < len(self.tokens):
            raise Unreadable(f"{self.peek()[1]} is left over")
        return values, "" if len(values) == 1 else "{}"

    def items(self) -> tuple[Exact, ...]:
        values = [self.sum()]
        while self.take(","):
            values.append(self.sum())
        return tuple(values)

    def sum(self) -> Exact:
        value = self.product()
        while sign := self.take("+", "-"):
            other = self.product()
            value = value + other if sign == "+" else value - other
        return value

    def product(self) -> Exact:
        value = self.signed()
        while True:
            kind, token = self.peek()
            if self.take("*"):
                value = value * self.signed()
            elif self.take("/"):
                value = value / self.signed()
            elif kind in ("letter", "command") or token in ("(", "{"):
                value = value * self.power()
            else:
                return value

    def signed(self) -> Exact:
        negative = False
        while sign := self.take("-", "+"):
            negative ^= sign == "-"
        value = self.power()
        return -value if negative else value

    def power(self) -> Exact:
        value = self.atom()
        if not self.take("^"):
            return value
        exponent = (self.atom() if self.peek()[1] != "-" else self.signed()).rational
        if exponent is None:
            raise Unreadable("an exponent that is not a number")
        return value.power(exponent)

    def group(self, end: str) -> Exact:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable(f"more than {MAX_DEPTH} levels")
        value = self.sum()
        self.need(end)
        self.depth -= 1
        return value

    def atom(self) -> Exact:
        kind, token = self.peek()
        self.at += 1
        if kind == "number":
            return self.mixed(Fraction(token.replace(",", "")))
        if kind == "letter":
            return Exact.letter(token)
        if token in ("(", "{", "["):
            return self.group({"(": ")", "{": "}", "[": "]"}[token])
        if token == "\\pi" or token == "\\infty":
            return Exact.letter(token[1:])
        if token == "\\frac":
            return self.argument() / self.argument()
        if token == "\\sqrt":
            degree = Exact.of(2)
            if self.take("["):
                degree = self.sum()
                self.need("]")
            return self.argument().root(degree.rational)
        raise Unreadable(f"{token} is not read")

    def mixed(self, number: Fraction) -> Exact:
        """1\\frac{1}{2} is 1 + 1/2; elsewhere a number beside something is a product."""
        if self.peek()[1] != "\\frac" or number.denominator != 1:
            return Exact.of(number)
        at = self.at
        part = self.atom()
        rational = part.rational
        if rational is not None and 0 < rational < 1:
            return Exact.of(number + rational)
        self.at = at
        return Exact.of(number)

    def argument(self) -> Exact:
        """{...}, or one digit or symbol: \\frac12 is 1/2."""
        kind, token = self.peek()
        if kind == "number" and token.isdigit() and len(token) > 1:
            self.tokens[self.at : self.at + 1] = [("number", digit) for digit in token]
        if self.depth >= MAX_DEPTH:
            raise Unreadable(f"more than {MAX_DEPTH} levels")
        self.depth += 1
        value = Exact.of(int(self.tokens[self.at - 1][1])) if kind == "number" and self.digit() else self.atom()
        self.depth -= 1
        return value

    def digit(self) -> bool:
        """Steps over a number of one digit."""
        if self.peek()[1].isdigit():
            self.at += 1
            return True
        return False
