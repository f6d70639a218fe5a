"""Trees as training rows, in formats that `jaxpost.data` reads: answers, pairs, judged steps, weights of actions.

    sft      prompt_completion   good answers
    pairs    preference          a better answer above a worse one
    steps    stepwise            Monte-Carlo labels of steps, for a process reward model
    actions  ranking             what a search came to think of the next steps: their shares of visits

A prompt that is a text gives rows of text, one of messages rows of messages. Texts are data: they are written as JSON
strings, and nothing in them is read as a row, a role or a step.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxpost.search.contract import SearchOutput
from jaxpost.search.tree import Node

Row = dict[str, Any]
Kind = Literal["sft", "pairs", "steps", "actions"]
Right = Callable[[Node], float]


class Grown(NamedTuple):
    """One searched prompt.

    Attributes:
        prompt: a text or messages.
        root: of its tree.
        right: how good the answer that ends at a node is, in [0, 1]; NaN: not known.
    """

    prompt: Any
    root: Node
    right: Right

    @property
    def leaves(self) -> list[Node]:
        """Answers that ended and of which it is known whether they are right."""
        return _below(self, self.root)


def grown(output: SearchOutput, right: Callable[[str], float] | None = None) -> Grown:
    """A search's output, to export. `right` judges an answer's text; None: its score stands for it."""
    worth: Right = (lambda node: node.score) if right is None else lambda node: float(right(node.answer))
    return Grown(output.problem.prompt, output.tree, worth)


def sft_rows(trees: Iterable[Grown], *, most: int = 1, least: float = 0.5) -> Iterator[Row]:
    """Up to `most` different answers of each prompt that are right by at least `least`, the best first.

    Rejection-sampling fine-tuning's rows (2308.01825).
    """
    for tree in trees:
        good = [(tree.right(leaf), leaf.answer) for leaf in tree.leaves]
        texts = dict.fromkeys(text for value, text in sorted(good, key=lambda p: -p[0]) if value >= least)
        for text in [text for text in texts if text.strip()][:most]:
            yield {"prompt": prompt_of(tree.prompt), "completion": _said(tree.prompt, text)}


def pair_rows(
    trees: Iterable[Grown], *, where: Literal["answers", "siblings"] = "answers", gap: float = 0.0
) -> Iterator[Row]:
    """Whole answers as chosen and rejected.

    answers: of each prompt the best answer above the worst. siblings: at every node with children of different
    Monte-Carlo value (`values`) the best answer below the best child above the worst below the worst child: the two
    share all text up to the step that made the difference (as in step-wise preferences, 2406.18629).

    Args:
        gap: least difference of values, not counted itself.
    """
    for tree in trees:
        for better, worse in _answers(tree) if where == "answers" else _siblings(tree, gap):
            better, worse = ([leaf for leaf in side if leaf.answer.strip()] for side in (better, worse))
            if not better or not worse:
                continue
            least = gap if where == "answers" else 0.0
            chosen, rejected = max(better, key=tree.right), min(worse, key=tree.right)
            if tree.right(chosen) > tree.right(rejected) + least and chosen.answer != rejected.answer:
                yield {
                    "prompt": prompt_of(tree.prompt),
                    "chosen": _said(tree.prompt, chosen.answer),
                    "rejected": _said(tree.prompt, rejected.answer),
                }


def _answers(tree: Grown) -> Iterator[tuple[list[Node], list[Node]]]:
    if leaves := tree.leaves:
        yield leaves, leaves


def _siblings(tree: Grown, gap: float) -> Iterator[tuple[list[Node], list[Node]]]:
    """Answers below the best and below the worst child, wherever their values differ."""
    value = values(tree)
    for node in tree.root.walk():
        known = sorted((child for child in node.children if child.number in value), key=lambda n: value[n.number].share)
        if known and value[known[-1].number].share > value[known[0].number].share + gap:
            yield _below(tree, known[-1]), _below(tree, known[0])


class Value(NamedTuple):
    """Monte-Carlo value of a node."""

    share: float
    """Mean of `right` over the answers that ended at or below it."""
    leaves: int


def values(tree: Grown) -> dict[int, Value]:
    """V(s) = mean of right(y) over the answers y that ended at or below s; by number, of nodes that have any."""
    sums: dict[int, list[float]] = {}
    for leaf in tree.leaves:
        for node in leaf.lineage():
            sums.setdefault(node.number, []).append(tree.right(leaf))
    return {number: Value(math.fsum(found) / len(found), len(found)) for number, found in sums.items()}


def step_rows(
    trees: Iterable[Grown], *, separator: str = "\n\n", labels: Literal["soft", "hard"] = "soft", least: int = 1
) -> Iterator[Row]:
    """Every path from the root to an answer's end as steps with Math-Shepherd's labels (2312.08935).

    soft: the share of right answers among those that ended at or below the step. hard: 1 where any of them is right.
    Answers that did not end say nothing. A step that several paths share has its label on the first path only, so
    that none counts twice; one with fewer than `least` answers below has none (null).

    Args:
        separator: what ends a step; the data section that reads the rows needs the same `step_separator`.
    """
    for tree in trees:
        value = values(tree)
        seen: set[tuple[int, int]] = set()
        for leaf in tree.leaves:
            steps = _steps(leaf, separator)
            marks: list[float | None] = []
            for _, node, place in steps:
                known = value[node.number]
                share = known.share if labels == "soft" else float(known.share > 0)
                marks.append(share if (node.number, place) not in seen and known.leaves >= least else None)
                seen.add((node.number, place))
            if any(mark is not None for mark in marks):
                yield {"prompt": prompt_of(tree.prompt), "completions": [text for text, *_ in steps], "labels": marks}


def _steps(leaf: Node, separator: str) -> list[tuple[str, Node, int]]:
    """Steps of an answer that are not empty, each with the node in which it ends and its place among that node's."""
    out: list[tuple[str, Node, int]] = []
    rest = ""
    for node in leaf.path:
        *whole, rest = (rest + node.text).split(separator)
        out += [(text.strip(), node, place) for place, text in enumerate(whole) if text.strip()]
    return [*out, (rest.strip(), leaf, -1)] if rest.strip() else out


def action_rows(trees: Iterable[Grown], *, temperature: float = 1.0, least: int = 2) -> Iterator[Row]:
    """At every node the next steps a with the weights that a search gave them: pi(a) = N(a)^(1/T) / sum N(b)^(1/T).

    N are visits (`back_up`); a policy that is trained towards pi plays as the search does (1712.01815). A completion
    is the answer up to and with the step; equal ones are one. Weights are the rows' `scores`.

    Args:
        temperature: T; below 1 sharper than the visits.
        least: visits of the children, in all, below which a node gives no row.
    """
    for tree in trees:
        for node in tree.root.walk():
            visits: dict[str, int] = {}
            for child in node.children:
                visits[child.answer] = visits.get(child.answer, 0) + child.visits
            texts = [text for text in visits if text.strip()]
            total = sum(visits[text] for text in texts)
            if len(texts) < 2 or total < max(1, least):
                continue
            top = max(visits[text] for text in texts)
            powers = [(visits[text] / top) ** (1 / temperature) for text in texts]
            yield {
                "prompt": prompt_of(tree.prompt),
                "completions": [_said(tree.prompt, text) for text in texts],
                "scores": [power / math.fsum(powers) for power in powers],
            }


def prompt_of(prompt: Any) -> Any:
    """A text as it is, messages as a list of objects."""
    return prompt if isinstance(prompt, str) else [dict(message) for message in prompt]


def _said(prompt: Any, text: str) -> Any:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _below(tree: Grown, top: Node) -> list[Node]:
    return [node for node in top.walk() if node.complete and not math.isnan(tree.right(node))]


def write_rows(rows: Iterable[Row], path: str | Path, *, leave_out: Callable[[str], bool] | None = None) -> int:
    """Writes JSON lines, all or nothing; how many.

    Args:
        leave_out: whether a text that the policy wrote must not be trained on: `Tokenizer.holds_special` keeps out rows
            in which it spelled a control token, that would be read as one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part, count = path.with_name(f".{path.name}.tmp"), 0
    with part.open("w", encoding="utf-8") as file:
        for row in rows:
            if leave_out is not None and any(leave_out(text) for text in _written(row)):
                continue
            file.write(json.dumps(row, allow_nan=False) + "\n")
            count += 1
    os.replace(part, path)
    return count


def _written(row: Row) -> Iterator[str]:
    """What the policy wrote of a row."""
    for key in ("completion", "chosen", "rejected", "completions"):
        values = row.get(key, ())
        for value in [values] if isinstance(values, str) else values:
            for part in value if isinstance(value, list) else [value]:
                yield part if isinstance(part, str) else part["content"]


def read_run(folder: str | Path) -> Iterator[Grown]:
    """The trees of a folder of `jaxpost search`, with what it knows of its candidates: right or wrong.

    Where a run did not know what is right, scores stand for it.

    Raises:
        FileNotFoundError: no such run. ValueError: a line that is no row of one.
    """
    folder = Path(folder)
    for name in ("results.jsonl", "trees.jsonl"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} does not exist: name the folder of a run of `jaxpost search`")
    results = {row["index"]: row for row in _read(folder / "results.jsonl")}
    for row in _read(folder / "trees.jsonl"):
        if (result := results.get(row["index"])) is None or not row["nodes"]:
            continue
        judged = {c["node"]: c["right"] for c in result.get("candidates", ()) if c["right"] is not None}
        yield Grown(result["prompt"], tree_of(row["nodes"]), _verdicts(judged))


def _verdicts(judged: Mapping[int, bool]) -> Right:
    return (lambda node: float(judged.get(node.number, math.nan))) if judged else lambda node: node.score


def _read(path: Path) -> Iterator[Row]:
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
                row["index"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}, line {number}: not a row of `jaxpost search`") from None
            yield row


def tree_of(records: Sequence[Mapping[str, Any]]) -> Node:
    """The root of a recorded tree: numbers, texts, ends, scores, values, visits and notes as they were; no tokens.

    Raises:
        ValueError: a node whose parent is not among those before it.
    """
    nodes: dict[int, Node] = {}
    for record in records:
        parent = record["parent"]
        if parent is not None and parent not in nodes:
            raise ValueError(f"node {record['number']} has the parent {parent}, which is not there")
        node = Node(
            record["number"], None if parent is None else nodes[parent], (), record["text"], end=record.get("end"),
            score=float(record.get("score", math.nan)), value=float(record.get("value", 0.0)),
            visits=record.get("visits", 0), note=record.get("note", ""),
        )  # fmt: skip
        nodes[node.number] = node
        if node.parent is not None:
            node.parent.children.append(node)
    return nodes[records[0]["number"]]


def export(
    trees: Iterable[Grown], kind: Kind, path: str | Path, *, leave_out: Callable[[str], bool] | None = None,
    **options: Any,
) -> int:  # fmt: skip
    """Writes rows of a kind; `options` are those of its function, `leave_out` is of `write_rows`. How many rows.

    Raises:
        ValueError: trees that give no row of this kind.
    """
    rows = {"sft": sft_rows, "pairs": pair_rows, "steps": step_rows, "actions": action_rows}[kind]
    count = write_rows(rows(trees, **options), path, leave_out=leave_out)
    if not count:
        Path(path).unlink()
        raise ValueError(f"the trees give no rows of kind {kind!r}: {_WHY[kind]}")
    return count


_WHY: dict[str, str] = {
    "sft": "no answer that ended is right",
    "pairs": "no prompt has answers of different worth",
    "steps": "no answer that ended is known to be right or wrong",
    "actions": "no node has two different next steps that were visited; only tree searches (mcts) count visits",
}
