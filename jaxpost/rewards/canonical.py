"""The answer that a text gives, in a form that votes can compare: equal answers are equal strings."""

from __future__ import annotations

import re
from collections.abc import Sequence

from jaxpost.rewards.answers import SOURCES, MultipleChoice, Source, final_answer
from jaxpost.rewards.exact import Exact
from jaxpost.rewards.latex import read
from jaxpost.rewards.puzzles import stated


def math_answer(text: str, *, sources: Sequence[Source] = SOURCES) -> str | None:
    """The final answer (`answers.final_answer`): exact values in a normal form, without units; other text as it is.

    >>> [math_answer(text) for text in ("It is 0.5.", "so \\\\boxed{\\\\frac12}", "1,000 apples", "(2, 1)", "no idea")]
    ['1/2', '1/2', '1000', '1', None]
    """
    found = final_answer(text, sources=sources)
    if found is None:
        return None
    answer = read(found)
    if not answer.values:
        return answer.text or None
    values = [_written(value) for value in answer.values]
    if answer.brackets == "{}":
        values.sort()
    return answer.brackets[:1] + ",".join(values) + answer.brackets[1:] + "%" * answer.percent


def _written(value: Exact) -> str:
    number = value.rational
    if number is not None:
        return str(number)
    return "+".join(f"{q}*r{n}" + "".join(f"*{name}^{power}" for name, power in rest) for (n, rest), q in value.terms)


def choice_answer(text: str, *, letters: str = "ABCDE") -> str | None:
    """The letter that a text chooses (`answers.MultipleChoice`).

    >>> choice_answer("So the answer is (B).")
    'B'
    """
    return MultipleChoice(letters=letters).choice(text)


def expression_answer(text: str) -> str | None:
    """The expression that a text states last (`puzzles.stated`), left of any "=", without spaces.

    >>> expression_answer("(8 - 4) = 4\\nAnswer: (8 - 4) * 6 = 24")
    '(8-4)*6'
    """
    return re.sub(r"\s+", "", stated(text).partition("=")[0]) or None


def text_answer(text: str) -> str | None:
    """All of a text, without case and with single spaces.

    >>> text_answer("  Not   so ")
    'not so'
    """
    return " ".join(text.casefold().split()) or None
