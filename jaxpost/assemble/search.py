"""`jaxpost search`: a preset -> the policy, its verifier, the method and the prompts; results as they come."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxpost import config_io
from jaxpost.assemble.search_folder import Book, page_of, record_of, result_row
from jaxpost.assemble.search_gold import Gold
from jaxpost.assemble.search_methods import INDEPENDENT, make_method
from jaxpost.assemble.search_numbers import summarise, told, verifier_report
from jaxpost.assemble.search_policy import Engines, Loaded
from jaxpost.assemble.search_prompts import Question, make_canonical, make_questions
from jaxpost.config_search import SearchConfig
from jaxpost.search.contract import Method
from jaxpost.search.drive import Progress, stream
from jaxpost.train.folder import RunFolder, open_folder
from jaxpost.train.progress import duration, short_number


@dataclass(frozen=True)
class SearchResult:
    """What a search's folder holds at its end."""

    folder: Path
    rows: Sequence[Mapping[str, Any]]
    numbers: Mapping[str, Any]
    told: tuple[str, ...] = ()
    """What the numbers say, a line each."""
    faults: tuple[str, ...] = ()

    @property
    def failed(self) -> int:
        """Prompts without an answer."""
        return sum("error" in row for row in self.rows)


def search(
    config: SearchConfig,
    *,
    command: Sequence[str] = tuple(sys.argv),
    engines: Engines | None = None,
    progress: Any = None,
) -> SearchResult:
    """Searches every prompt of a configuration, or goes on with it where it stopped.

    Args:
      engines: loads policies and verifiers, and keeps them from call to call.
      progress: a text stream where to say how far it is.

    Raises:
      ValueError, FileNotFoundError: a model, verifier, file or folder that does not fit.
    """
    method, questions = make_method(config.search), make_questions(config)
    path, text = Path(config.run.dir.format(name=config.run.name)), config_io.dump(config)
    run = config.run
    with open_folder(
        path, config_text=text, resume=run.resume, allow_changed_config=run.allow_changed_config
    ) as folder:
        book = Book(folder.path, questions, writes=folder.writes)
        folder.record_start(command, len(book.rows))
        gold = Gold(config.gold)
        try:
            if todo := _askable(book):
                loaded = (engines or Engines()).load(config, questions)
                try:
                    _run(config, method, todo, loaded, book, gold, folder, progress)
                finally:
                    loaded.close()
        finally:
            gold.close()
        return _end(config, book, gold, folder, command)


def _askable(book: Book) -> list[Question]:
    """What can be asked; rows that cannot be read are results with an error."""
    todo = book.todo
    for question in todo:
        if question.error is not None:
            book.add(result_row(question, None, [], question.error), None)
    return [question for question in todo if question.error is None]


def _run(
    config: SearchConfig, method: Method, todo: Sequence[Question], loaded: Loaded, book: Book, gold: Gold,
    folder: RunFolder, progress: Any,
) -> None:  # fmt: skip
    meter = Meter(len(todo), config.budget, progress)
    found = stream(
        [question.prompt for question in todo],
        method,
        loaded.policy,
        budget=config.budget,
        verifiers=loaded.verifiers,
        canonical=make_canonical(config.answers),
        numbers=[question.number for question in todo],
        together=config.engine.together,
        progress=meter,
    )
    for place, output in found:
        question = todo[place]
        row = result_row(question, output, gold(question.example, output.answers))
        book.add(row, record_of(output))
        meter.note(row)
        _measure(folder, book, meter)


def _measure(folder: RunFolder, book: Book, meter: Meter) -> None:
    """One line of metrics.jsonl: tokens and accuracy so far."""
    rows = list(book.rows.values())
    known = [row["right"] for row in rows if row.get("right") is not None]
    record: dict[str, Any] = {"kind": "search", "step": len(rows), "failed": sum("error" in row for row in rows)}
    record |= {name: sum(row[name] for row in rows) for name in ("generated", "verified", "read")}
    if known:
        record["accuracy"] = sum(known) / len(known)
    record["time"] = {"seconds": round(meter.seconds, 3)}
    if folder.writes:
        with (folder.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _end(config: SearchConfig, book: Book, gold: Gold, folder: RunFolder, command: Sequence[str]) -> SearchResult:
    rows = book.finish()
    numbers = summarise(rows, independent=config.search.kind in INDEPENDENT)
    lines = tuple(told(numbers))
    folder.write("summary.json", json.dumps(numbers, indent=2) + "\n")
    if trusted := verifier_report(rows):
        folder.write("verifiers.md", trusted + "\n")
    folder.write("README.md", page_of(config.run.name, command, lines))
    return SearchResult(folder.path, rows, numbers, lines, tuple(dict.fromkeys(gold.faults)))


@dataclass
class Meter:
    """Says how far a search is: prompts, tokens spent by kind, speed, time left."""

    total: int
    budget: int | None
    stream: Any
    interval: float = 5.0
    """Seconds between lines where the stream is no terminal."""
    clock: Callable[[], float] = time.perf_counter
    _start: float = field(init=False)
    _said: float = field(init=False)
    right: int = 0
    known: int = 0

    def __post_init__(self) -> None:
        self._start = self._said = self.clock()

    @property
    def seconds(self) -> float:
        return self.clock() - self._start

    def note(self, row: Mapping[str, Any]) -> None:
        """One more result."""
        if row.get("right") is not None:
            self.known += 1
            self.right += bool(row["right"])

    def __call__(self, now: Progress) -> None:
        """After every round of requests."""
        if self.stream is None:
            return
        terminal, last = self.stream.isatty(), now.done == self.total
        if not terminal and not last and self.clock() - self._said < self.interval:
            return
        self._said = self.clock()
        line = self.line(now)
        print(line.ljust(100) if terminal else line, end="\n" if last or not terminal else "\r", file=self.stream,
              flush=True)  # fmt: skip

    def line(self, now: Progress) -> str:
        """What is said."""
        spent, seconds = now.generated + now.verified, max(self.seconds, 1e-9)
        parts = [f"{now.done}/{self.total} prompts", f"{now.live} under way"]
        parts.append(
            f"{short_number(spent)} tokens ({short_number(now.generated)} + {short_number(now.verified)} verifier)"
        )
        parts.append(f"{short_number(spent / seconds)} tok/s")
        if self.known:
            parts.append(f"right {self.right}/{self.known}")
        if (left := self._left(now, spent, seconds)) is not None:
            parts.append(f"eta {duration(left)}")
        return "  ".join(parts)

    def _left(self, now: Progress, spent: int, seconds: float) -> float | None:
        """By the prompts that have ended; before the first, by what all budgets can spend at most."""
        if now.done == self.total:
            return None
        if now.done:
            return seconds / now.done * (self.total - now.done)
        if self.budget and spent:
            return seconds * max(self.budget * self.total - spent, 0) / spent
        return None
