"""Public files of answers judged step by step, turned into stepwise rows. Each converter says what its labels mean.

prm800k           question {problem}, label {steps [{completions [{text, rating}], chosen_completion}]}
                  (2305.20050); rating 1 and 0 (neutral) are right, -1 is wrong
math_shepherd     input, in which every step ends with the mark "ки", and label, the same text with + or - there
                  (2312.08935)
omega_prm         question, reasoning_steps: a tree {text, mc_value, children}, or a list of {solution_prefix,
                  mc_value} (2406.06592); mc_value is the share of rollouts from there that are right
prmbench          original_process (all right), modified_process, error_steps counted from 1 (2501.03124)
big_bench_mistake input, steps, mistake_index, the first wrong step counted from 0, or null (2311.08516)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxpost.data.convert_judged import JudgedConverter, keys, rest
from jaxpost.text.messages import DataError

MARK = "ки"
"""What ends a step in Math-Shepherd's files."""


def from_prm800k(row: Mapping[str, Any], ignored: Counter[str], kind: str) -> list[dict[str, Any]]:
    """The solution as it was continued, and a row for each other step that was judged in its place.

    There only that last step has a label. Steps that people wrote are not judged. Where no step was chosen to go on
    with, the first candidate ends the solution.
    """
    question, label = keys(row, "question", "label")
    left = rest(row, "question", "label") | {"prompt": question["problem"]}
    path: list[str] = []
    labels: list[float | None] = []
    others: list[dict[str, Any]] = []
    for number, step in enumerate(label["steps"]):
        candidates = [c for c in step.get("completions") or () if c.get("text")]
        chosen, human = step.get("chosen_completion"), step.get("human_completion")
        goes_on: Mapping[str, Any] | None = None
        if chosen is not None:
            goes_on = step["completions"][chosen]
        elif human is not None:
            goes_on = human if isinstance(human, Mapping) else {"text": human}
        elif candidates:
            goes_on = candidates[0]
        for candidate in candidates:
            rating = _rating(candidate, number)
            if candidate is not goes_on and rating is not None:
                steps = [*path, candidate["text"]]
                others.append({**left, "completions": steps, "labels": [None] * len(path) + [rating]})
        if goes_on is None:
            break
        path.append(goes_on["text"])
        labels.append(_rating(goes_on, number))
    main = [{**left, "completions": path, "labels": labels}] if any(x is not None for x in labels) else []
    if not main and not others:
        raise DataError("no step of the row is judged", kind="empty_mask")
    return main + others


def _rating(candidate: Mapping[str, Any], number: int) -> float | None:
    rating = candidate.get("rating")
    if rating not in (None, -1, 0, 1):
        raise DataError(f"the rating of step {number} must be -1, 0, 1 or null, not {rating!r:.80}", kind="score")
    return None if rating is None else float(rating >= 0)


def from_math_shepherd(row: Mapping[str, Any], ignored: Counter[str], kind: str) -> list[dict[str, Any]]:
    """Steps between the marks; the question ends where "Step 1:" begins."""
    text, marked = keys(row, "input", "label")
    parts = text.split(MARK)
    if len(parts) < 2 or parts[-1].strip():
        raise DataError(f"input must end every step with the step separator {MARK!r}", kind="step_separator")
    labels, at = [], 0
    for number, part in enumerate(parts[:-1]):
        at += len(part)
        if marked[at - len(part) : at] != part or marked[at : at + 1] not in ("+", "-"):
            message = f"label must be the text of input with + or - in place of each mark; step {number} differs"
            raise DataError(message, kind="length")
        labels.append(float(marked[at] == "+"))
        at += 1
    question, first, steps = parts[0].partition("Step 1:")
    if not first:
        raise DataError('input must have "Step 1:" where the question ends', kind="step_separator")
    steps = [first + steps, *parts[1:-1]]
    left = rest(row, "input", "label", "task") | {"subset": row.get("task")}
    return [{**left, "prompt": question.strip(), "completions": [s.strip() for s in steps], "labels": labels}]


def from_omega_prm(row: Mapping[str, Any], ignored: Counter[str], kind: str) -> list[dict[str, Any]]:
    """A row for each path from the question to a leaf; a step that several paths share is judged in the first only."""
    question, tree = keys(row, "question", "reasoning_steps")
    if isinstance(tree, Sequence):
        tree = _tree(tree)
    left = rest(row, "question", "reasoning_steps") | {"prompt": question}
    seen: set[int] = set()
    out = []
    for path in _paths(tree, ()):
        labels = [None if id(node) in seen else node["mc_value"] for node in path]
        seen.update(id(node) for node in path)
        out.append({**left, "completions": [node["text"] for node in path], "labels": labels})
    if not out:
        raise DataError("the tree has no step below the question", kind="empty")
    return out


def _tree(prefixes: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Prefixes of solutions as a tree: each hangs on the longest other one that it begins with."""
    nodes: list[tuple[str, dict[str, Any]]] = []
    for item in sorted(prefixes, key=lambda item: len(item["solution_prefix"])):
        text = item["solution_prefix"]
        above = [node for node in nodes if text.startswith(node[0])]
        start = len(above[-1][0]) if above else 0
        step = {"text": text[start:].strip(), "mc_value": item["mc_value"], "children": []}
        if not nodes or (above and step["text"]):
            if above:
                above[-1][1]["children"].append(step)
            nodes.append((text, step))
        elif not above:
            raise DataError(f"a solution_prefix does not begin with the question: {text[:60]!r}")
    if not nodes:
        raise DataError("reasoning_steps is empty", kind="empty")
    return nodes[0][1]


def _paths(node: Mapping[str, Any], above: tuple[Mapping[str, Any], ...]) -> Iterator[tuple[Mapping[str, Any], ...]]:
    for child in node.get("children") or ():
        path = (*above, child)
        if child.get("children"):
            yield from _paths(child, path)
        else:
            yield path


def from_prmbench(row: Mapping[str, Any], ignored: Counter[str], kind: str) -> list[dict[str, Any]]:
    """The process with errors in it, by class of error, and the original one, all right (subset "original").

    Rows of several classes share originals. In the classes circular and redundency the marked steps are needless
    rather than wrong.
    """
    steps, wrong, original = keys(row, "modified_process", "error_steps", "original_process")
    outside = [number for number in wrong if not isinstance(number, int) or not 1 <= number <= len(steps)]
    if outside:
        message = f"error_steps names {outside[0]!r}, but the process has the steps 1 to {len(steps)}"
        raise DataError(message, kind="length")
    questions = ("question", "modified_question", "original_question")
    left = rest(row, "modified_process", "error_steps", "original_process", "classification", *questions)
    first, second = (row.get(f"{which}_question") or row["question"] for which in ("modified", "original"))
    labels = [float(number not in wrong) for number in range(1, len(steps) + 1)]
    return [
        {**left, "prompt": first, "completions": steps, "labels": labels, "subset": row.get("classification")},
        {**left, "prompt": second, "completions": original, "labels": [1.0] * len(original), "subset": "original"},
    ]


def from_big_bench_mistake(row: Mapping[str, Any], ignored: Counter[str], kind: str) -> list[dict[str, Any]]:
    """Right up to the first mistake; what follows it is not judged."""
    prompt, steps, first = keys(row, "input", "steps", "mistake_index")
    left = rest(row, "input", "steps", "mistake_index", "task")
    return [{**left, "prompt": prompt, "completions": steps, "first_error": first, "subset": row.get("task")}]


STEP_CONVERTERS: dict[str, JudgedConverter] = {
    "prm800k": from_prm800k,
    "math_shepherd": from_math_shepherd,
    "omega_prm": from_omega_prm,
    "prmbench": from_prmbench,
    "big_bench_mistake": from_big_bench_mistake,
}


def detect_steps(row: Mapping[str, Any]) -> str | None:
    """The converter of this module that a row needs, by its keys.

    >>> detect_steps({"input": "1+1+1", "steps": ["1+1=2", "2+1=4"], "mistake_index": 1})
    'big_bench_mistake'
    """
    label = row.get("label")
    if isinstance(label, Mapping) and "steps" in label and isinstance(row.get("question"), Mapping):
        return "prm800k"
    if isinstance(label, str) and MARK in str(row.get("input")):
        return "math_shepherd"
    for name, shape in (
        ("omega_prm", {"question", "reasoning_steps"}),
        ("prmbench", {"modified_process", "error_steps"}),
        ("big_bench_mistake", {"steps", "mistake_index"}),
    ):
        if shape <= row.keys():
            return name
    return None
