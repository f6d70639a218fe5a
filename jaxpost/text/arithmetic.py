"""Arithmetic that models write, worked out exactly and safely: own tokens, recursive descent, fractions, limits."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

MAX_CHARS = 512
MAX_DEPTH = 32
MAX_DIGITS = 30
"""Of one number."""

_TOKEN = re.compile(r"\s*(?:([0-9]+(?:\.[0-9]+)?)|([-+*/()])|(\S))")
_SIGNS = str.maketrans({"×": "*", "·": "*", "⋅": "*", "÷": "/", "−": "-", "–": "-", "∕": "/", "[": "(", "]": ")"})


class BadExpression(ValueError):
    """Not an arithmetic expression, or one beyond the limits."""


class Evaluated(NamedTuple):
    """An expression's exact value, and the numbers that were written in it, in order."""

    value: Fraction
    numbers: tuple[Fraction, ...]


def evaluate(text: str) -> Evaluated:
    """The value of + - * / and parentheses over decimal numbers (also × · ÷ − and brackets).

    Nothing is run as Python; there are no powers, names or calls, so the time is linear in the text and no value
    grows beyond the digits that were written.

    >>> evaluate("(8 / (3 - 8/3))")
    Evaluated(value=Fraction(24, 1), numbers=(Fraction(8, 1), Fraction(3, 1), Fraction(8, 1), Fraction(3, 1)))

    Raises:
      BadExpression: anything else than such an expression, a division by zero, more than MAX_CHARS characters,
        MAX_DEPTH levels or MAX_DIGITS digits.
    """
    if len(text) > MAX_CHARS:
        raise BadExpression(f"an expression of {len(text)} characters; at most {MAX_CHARS} are read")
    return _Parser(text.translate(_SIGNS)).parse()


class _Parser:
    """expression = term (+- term)*; term = factor (*/ factor)*; factor = - factor | number | ( expression )."""

    def __init__(self, text: str):
        self.tokens: list[str] = []
        for number, sign, other in _TOKEN.findall(text):
            if other:
                raise BadExpression(f"{other!r} is not arithmetic")
            if len(number) > MAX_DIGITS:
                raise BadExpression(f"a number of {len(number)} digits; at most {MAX_DIGITS} are read")
            self.tokens.append(number or sign)
        self.at, self.depth = 0, 0
        self.numbers: list[Fraction] = []

    def parse(self) -> Evaluated:
        value = self.expression()
        if self.at < len(self.tokens):
            raise BadExpression(f"{self.tokens[self.at]!r} is left over")
        return Evaluated(value, tuple(self.numbers))

    def next(self, *wanted: str) -> str:
        """The next token if it is one of these (any, if none are named), else ''."""
        if self.at < len(self.tokens) and (not wanted or self.tokens[self.at] in wanted):
            self.at += 1
            return self.tokens[self.at - 1]
        return ""

    def expression(self) -> Fraction:
        value = self.term()
        while sign := self.next("+", "-"):
            other = self.term()
            value = value + other if sign == "+" else value - other
        return value

    def term(self) -> Fraction:
        value = self.factor()
        while sign := self.next("*", "/"):
            other = self.factor()
            if sign == "/" and not other:
                raise BadExpression("a division by zero")
            value = value * other if sign == "*" else value / other
        return value

    def factor(self) -> Fraction:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise BadExpression(f"more than {MAX_DEPTH} levels")
        token = self.next()
        if token in ("-", "+"):
            inner = self.factor()
            value = -inner if token == "-" else inner
        elif token == "(":
            value = self.expression()
            if not self.next(")"):
                raise BadExpression("a parenthesis is not closed")
        elif token and token[0] in "0123456789":
            value = Fraction(token)
            self.numbers.append(value)
        else:
            raise BadExpression(f"a number is missing before {token!r}" if token else "the expression breaks off")
        self.depth -= 1
        return value
