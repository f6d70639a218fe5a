"""The files of a search: results as prompts end, the trees behind them, and going on where it stopped."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxpost.assemble.search_prompts import Question
from jaxpost.search.contract import SearchOutput
from jaxpost.search.record import plain, tree_record
from jaxpost.search.tree import Node

RESULTS, TREES = "results.jsonl", "trees.jsonl"


class Book:
    """Results of a run's folder, one row a prompt: those that are there already, and new ones as they come.

    Raises:
      ValueError: the folder holds results of other prompts.
    """

    def __init__(self, folder: Path, questions: Sequence[Question], *, writes: bool = True):
        self.folder, self.writes = folder, writes
        self.questions = {question.number: question for question in questions}
        self.rows = {
            row["index"]: row for row in self._read(RESULTS) if "error" not in row and row["index"] in self.questions
        }
        self._trees = {row["index"]: row for row in self._read(TREES) if row["index"] in self.rows}
        if writes:
            self._write_all()

    @property
    def todo(self) -> list[Question]:
        """What has no result yet, or failed."""
        return [question for question in self.questions.values() if question.number not in self.rows]

    @property
    def spent(self) -> int:
        """Tokens of all results."""
        return sum(row["generated"] + row["verified"] for row in self.rows.values())

    def add(self, row: dict[str, Any], tree: Mapping[str, Any] | None) -> None:
        """Keeps a result, at once and for good."""
        self.rows[row["index"]] = row
        if tree is not None:
            # Before the row: a row that is there says that all of its prompt is.
            self._append(TREES, {"index": row["index"], "digest": row["digest"], **tree})
        self._append(RESULTS, row)

    def finish(self) -> list[dict[str, Any]]:
        """All rows in the order of the prompts; so is the file then."""
        order = [number for number in self.questions if number in self.rows]
        self.rows = {number: self.rows[number] for number in order}
        if self.writes:
            self._trees = {row["index"]: row for row in self._read(TREES)}
            self._write_all()
        return list(self.rows.values())

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        if self.writes:
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")

    def _write_all(self) -> None:
        for name, rows in ((RESULTS, self.rows), (TREES, self._trees)):
            kept = [rows[number] for number in self.questions if number in rows]
            part = self.folder / f".{name}.tmp"
            lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in kept)
            part.write_text("".join(lines), encoding="utf-8")
            os.replace(part, self.folder / name)

    def _read(self, name: str) -> list[dict[str, Any]]:
        """Rows of a file; a torn last line is left out."""
        path = self.folder / name
        if not path.exists():
            return []
        found = []
        for number, line in enumerate(path.read_bytes().rpartition(b"\n")[0].splitlines(), 1):
            try:
                row = json.loads(line)
                index, digest = row["index"], row["digest"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{path}, line {number}: not a row of `jaxpost search`; choose another --run.name"
                ) from None
            if index in self.questions and digest != digest_of(self.questions[index]):
                raise ValueError(
                    f"{path}, line {number}: prompt {index} was another one then; choose another --run.name"
                )
            found.append(row)
        return found


def digest_of(question: Question) -> str:
    """Changes with the prompt."""
    return hashlib.sha256(json.dumps(question.prompt, default=str).encode()).hexdigest()[:16]


def result_row(
    question: Question, output: SearchOutput | None, right: Sequence[bool | None], error: str | None = None
) -> dict[str, Any]:
    """One line of results.jsonl.

    Args:
      output: what the search found; None where it could not begin.
      right: whether each candidate is right, None where that is not known.
    """
    row: dict[str, Any] = {"index": question.number, "where": question.where, "digest": digest_of(question)}
    row["prompt"] = plain(question.prompt)
    error = error or (None if output is None else output.error)
    gold = question.example.get("answer")
    if gold is not None:
        row["gold"] = plain(gold)
    if output is None:
        return row | {"answer": None, "generated": 0, "verified": 0, "read": 0, "warnings": [], "error": error}
    candidates = [
        {
            "canonical": candidate.canonical,
            "score": plain(candidate.score),
            "right": verdict,
            "complete": candidate.node is None or candidate.node.complete,
            "node": None if candidate.node is None else candidate.node.number,
            "judged": _judged(candidate.node),
        }
        for candidate, verdict in zip(output.answers, right, strict=True)
    ]
    first, ledger = (output.answers[0] if output.answers else None), output.problem.ledger
    row |= {"answer": first.text if first else None, "canonical": first.canonical if first else None}
    row |= {"score": plain(first.score) if first else None, "right": right[0] if right else None}
    row |= {"generated": ledger.generated, "verified": ledger.verified, "read": ledger.read}
    row |= {"refused": ledger.refused, "budget": ledger.limit, "candidates": candidates}
    if output.votes:
        row["votes"] = {str(key): plain(value) for key, value in output.votes.items()}
    if "difficulty" in output.tree.facts:
        row["difficulty"] = plain(output.tree.facts["difficulty"])
        row["probe_tokens"] = sum(len(node.tokens) for node in output.tree.children if node.note == "probe")
    row["warnings"] = list(output.problem.warnings)
    return row if error is None else row | {"error": error}


def _judged(node: Node | None) -> dict[str, Any]:
    """What the verifier said of an answer, and what its parts said."""
    if node is None or math.isnan(node.score):
        return {}
    return {name: plain(x) for name, x in {"verifier": node.score, **node.facts.get("verifier", {})}.items()}


def record_of(output: SearchOutput) -> dict[str, Any]:
    """The tree of a result, as trees.jsonl holds it."""
    return tree_record(output)


def page_of(name: str, command: Sequence[str], told: Sequence[str]) -> str:
    """README.md of a search's folder."""
    lines = [f"# {name}", "", *told, "", "Started, and resumed after any interruption, with:", ""]
    lines += [f"    {shlex.join(command)}", ""]
    lines += [
        "| file | what |",
        "|---|---|",
        "| config.yaml | the resolved configuration; `jaxpost search config.yaml` repeats the search |",
        "| environment.json | versions, devices and command of each start |",
        "| results.jsonl | a row for each prompt: answer, score, right or wrong, tokens spent, warnings or an error |",
        "| trees.jsonl | every node of each prompt's tree |",
        "| metrics.jsonl | tokens and accuracy as prompts ended |",
        "| summary.json | accuracy with intervals, tokens |",
        "| verifiers.md | calibration, false accepts and rejects of the verifier, where right answers are known |",
        "| report.html | the run as a page, with trees |",
        "",
    ]
    return "\n".join(lines)
