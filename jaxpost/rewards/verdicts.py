"""What a judging model is asked, and what counts as its verdict: strictly, so that what cannot be read is counted.

A verdict is read from the last line alone, in one form; anything else is unreadable (None), never a guess.

| mode | asked for | last line |
|---|---|---|
| point | one rating | `Rating: 7` |
| pair | which of two answers is better, in both orders (2306.05685) | `Better: A`, `Better: B` or `Better: tie` |
| rubric | a rating for each criterion | `Ratings: clarity=4, truth=5` |
| verifier | reasoning, then right or wrong (2408.15240) | `Correct: yes` or `Correct: no` |
| critic | its faults, one a line (2407.00215) | `Faults: 2`, and so many lines `- ...` above it |
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

_NUMBER = "[0-9]{1,9}"
"""Python refuses to read numbers of thousands of digits, which a judge that repeats itself writes."""
_MARK = re.compile(r"<(?=\s*/?\s*(answer|question)\b)", re.IGNORECASE)
"""Begins a mark of ours: an answer that holds one must not end itself and go on as somebody else."""
Mode = Literal["point", "pair", "rubric", "verifier", "critic"]

_ASK: dict[str, str] = {
    "point": (
        "Judge how good the answer to the question is. Think it through in a few sentences. End with one line of the "
        "form `Rating: N`, N being a whole number from {low} (useless) to {high} (could not be better)."
    ),
    "pair": (
        "Judge which of the two answers to the question is better. Their order means nothing, and neither does their "
        "length. Think it through in a few sentences. End with one line: `Better: A`, `Better: B` or `Better: tie`."
    ),
    "rubric": (
        "Judge the answer to the question by each of these criteria:\n{criteria}\nThink them through one by one. End "
        "with one line of the form `Ratings: {form}`, each N a whole number from {low} (not at all) to {high} (fully)."
    ),
    "verifier": (
        "Check whether the answer to the question is correct. Go through it step by step and say what is wrong, if "
        "anything is. End with one line: `Correct: yes` or `Correct: no`."
    ),
    "critic": (
        "Find the faults of the answer to the question: what is false, missing, unsafe or badly put. Write each fault "
        "on a line of its own that begins with `- `; do not invent any. End with one line of the form `Faults: N`, N "
        "being their number."
    ),
}


def question(
    mode: Mode, prompt: str, answers: Sequence[str], *, low: int = 1, high: int = 10, criteria: Sequence[str] = ()
) -> str:
    """What the judge is asked about one answer, or of `pair` about two.

    >>> print(question("verifier", "2+2?", ["5"]).splitlines()[-1])
    </answer>
    """
    prompt, *answers = (_MARK.sub("&lt;", text) for text in (prompt, *answers))
    listed, form = "\n".join(f"- {name}" for name in criteria), ", ".join(f"{name}=N" for name in criteria)
    # What is filled in is not a format itself: an answer's braces must stand as they are.
    ask = _ASK[mode].replace("{low}", str(low)).replace("{high}", str(high))
    ask = ask.replace("{criteria}", listed).replace("{form}", form)
    if mode == "pair":
        shown = "\n\n".join(
            f"<answer {name}>\n{text}\n</answer {name}>" for name, text in zip("AB", answers, strict=True)
        )
    else:
        shown = f"<answer>\n{answers[0]}\n</answer>"
    return f"{ask}\n\n<question>\n{prompt}\n</question>\n\n{shown}"


def _last(text: str) -> str:
    lines = [line.strip().strip("*`") for line in text.strip().splitlines()]
    return lines[-1] if lines else ""


def rating(text: str, *, low: int = 1, high: int = 10) -> float | None:
    """The rating as a share of the scale, from 0 to 1; None: unreadable or off the scale.

    >>> rating("Fine.\\nRating: 10"), rating("Rating: 11"), rating("I rate it 7")
    (1.0, None, None)
    """
    found = re.fullmatch(rf"Rating: ({_NUMBER})", _last(text))
    value = int(found[1]) if found else None
    return None if value is None or not low <= value <= high else (value - low) / (high - low)


def preferred(text: str) -> float | None:
    """1 if A is better, 0 if B is, 1/2 for a tie; None: unreadable.

    >>> preferred("Better: A"), preferred("Better: tie"), preferred("A, clearly")
    (1.0, 0.5, None)
    """
    found = re.fullmatch(r"Better: (A|B|tie)", _last(text))
    return None if found is None else {"A": 1.0, "B": 0.0, "tie": 0.5}[found[1]]


def in_both_orders(first: float | None, swapped: float | None) -> float | None:
    """How the answer that was A first and B then fares: a verdict that the order decides is a tie (2306.05685).

    >>> in_both_orders(1.0, 0.0), in_both_orders(1.0, 1.0), in_both_orders(1.0, None)
    (1.0, 0.5, None)
    """
    if first is None or swapped is None:
        return None
    return first if first == 1.0 - swapped else 0.5


def ratings(text: str, criteria: Sequence[str], *, low: int = 1, high: int = 10) -> Mapping[str, float] | None:
    """A share of the scale for every criterion, none missing and none more; None: unreadable.

    >>> ratings("Ratings: truth=1, clarity=3", ["clarity", "truth"], low=1, high=5)
    {'clarity': 0.5, 'truth': 0.0}
    """
    line = _last(text)
    if not line.startswith("Ratings: "):
        return None
    parts = [re.fullmatch(rf"(.+?)=({_NUMBER})", part.strip()) for part in line.removeprefix("Ratings: ").split(",")]
    found = {part[1].strip(): int(part[2]) for part in parts if part}
    whole = len(parts) == len(found) == len(criteria) and found.keys() == set(criteria)
    if not whole or not all(low <= value <= high for value in found.values()):
        return None
    return {name: (found[name] - low) / (high - low) for name in criteria}


def correct(text: str) -> float | None:
    """1 for yes, 0 for no; None: unreadable.

    >>> correct("So it holds.\\nCorrect: yes"), correct("yes")
    (1.0, None)
    """
    found = re.fullmatch(r"Correct: (yes|no)", _last(text), re.IGNORECASE)
    return None if found is None else float(found[1].lower() == "yes")


def faults(text: str) -> list[str] | None:
    """The faults that a critic names; None: unreadable, or another number than it says.

    >>> faults("- It is 4, not 5.\\nFaults: 1"), faults("Faults: 0"), faults("Faults: 2")
    (['It is 4, not 5.'], [], None)
    """
    said = re.fullmatch(rf"Faults: ({_NUMBER})", _last(text))
    named = [line.strip()[2:].strip() for line in text.splitlines() if line.strip().startswith("- ")]
    return named if said and int(said[1]) == len(named) else None


def value_of(
    mode: Mode, text: str, *, low: int, high: int, criteria: Sequence[str]
) -> tuple[float | None, dict[str, float]]:
    """A verdict as a number, more being better, and by criterion; None: unreadable.

    point, rubric: a share of the scale (of a rubric the mean); pair, verifier: 0 to 1; critic: minus the faults.
    """
    if mode == "rubric":
        found = ratings(text, criteria, low=low, high=high)
        return (None, {}) if found is None else (sum(found.values()) / len(found), dict(found))
    if mode == "critic":
        named = faults(text)
        return (None if named is None else -float(len(named))), {}
    if mode == "point":
        return rating(text, low=low, high=high), {}
    return (preferred(text) if mode == "pair" else correct(text)), {}
