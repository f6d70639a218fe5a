"""`jaxpost score`: reward models over a file of answers, pairs, rankings or steps; rows that resume, and a verdict."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxpost.assemble.answer import keep_programs
from jaxpost.assemble.answer_file import whole_lines
from jaxpost.assemble.reward_scores import Encoded, Reduce, RewardModel, judge, load_ensemble
from jaxpost.config import AnswerDataSection, SourceSection
from jaxpost.data.formats import Example, LanguageModeling, PromptCompletion
from jaxpost.data.groups import Answer, Group, Kind
from jaxpost.data.judged import Preference, Ranking, Scored, Stepwise, UnpairedPreference, strength_of
from jaxpost.data.reference import file_hash
from jaxpost.data.sources import Row, open_source
from jaxpost.data.tokenise import Counts, items_of, parse_item, read_chunks
from jaxpost.text.messages import DataError
from jaxpost.weights.resolve import cache_folder

TOGETHER = 512
"""Answers that are read, scored and written at a time."""


@dataclass
class Item:
    """One example of the file: its answers, and what is known of them."""

    index: int
    where: str
    prompt: Any
    answers: list[Any]
    """Texts, conversations, or tuples of steps."""
    ranks: tuple[int, ...] | None = None
    labels: list[list[float]] | None = None
    """Of each answer one label, or one of each step."""
    graded: bool = False
    strength: float = 1.0
    subset: str = ""
    fault: str | None = None
    """Why there are no answers to score."""

    @property
    def digest(self) -> str:
        """Changes with the prompt or an answer."""
        said = (self.prompt, self.answers, *([] if self.fault is None else [self.fault]))
        return hashlib.sha256(repr(said).encode()).hexdigest()[:16]


@dataclass
class Verdict:
    """What a scored file says of the model, filled as rows are scored."""

    rows: int = 0
    failed: int = 0
    known: list[tuple[Item, list[np.ndarray], list[int]]] = field(default_factory=list)
    """Labelled items with the scores [steps] of their answers, and their tokens."""

    def numbers(self) -> dict[str, float]:
        """Accuracy with its interval and more, where rows are labelled; see `eval.reward`.

        Of a file of both kinds each number's name begins with pairs/ (rankings too) or answers/ (labels of each).
        """
        kinds = {
            "pairs/": [known for known in self.known if known[0].ranks is not None],
            "answers/": [known for known in self.known if known[0].ranks is None],
        }
        there = {kind: known for kind, known in kinds.items() if known}
        return {
            (kind if len(there) > 1 else "") + name: value
            for kind, known in there.items()
            for name, value in _numbers(known).items()
        }


def _numbers(known: Sequence[tuple[Item, list[np.ndarray], list[int]]]) -> dict[str, float]:
    """Of items that are all ranked, or all labelled."""
    scored = [
        (_group(item, tokens), [_judged(item, n, x)[:, None, None] for n, x in enumerate(found)])
        for item, found, tokens in known
    ]
    graded = any(item.graded for item, _, _ in known)
    return judge(scored, graded=graded, questions=[repr(item.prompt) for item, _, _ in known])


def score(
    models: Sequence[str],
    source: SourceSection,
    *,
    kind: Kind | None = None,
    reduce: Reduce | None = None,
    out: Path | None = None,
    tokens: int = 16_384,
    on_bad_row: Literal["error", "skip"] = "error",
    verdict: Verdict | None = None,
    progress: Any = None,
) -> Iterator[dict[str, Any]]:
    """Scores every row: {"index", "where", "scores", "tokens", "digest", ...}, one number for each of its answers.

    "uncertainty" stands beside the scores of ensembles, "steps" beside those of process models, "objectives" where
    there are several. A row that cannot be scored has "error" in place of scores, and the others go on.

    Args:
      models: folders or hub ids; several are an ensemble.
      source: the file and how its rows are read: prompt and completion, messages, or any format of judged rows.
      kind: what public formats of several uses are read as; None: pairs where they can be.
      reduce: how members, objectives and steps become one number.
      out: a JSONL file; rows that it holds already are not scored again.
      tokens: most tokens of a batch.
      on_bad_row: skip: a row that cannot be read has "error" too, and the others go on.
      verdict: filled with what labelled rows say.
      progress: a text stream where to say how far it is.

    Raises:
      FileNotFoundError, ValueError: no reward model, no such file, an `out` of other rows or models, a bad row.
    """
    reduce = reduce or Reduce()
    verdict = Verdict() if verdict is None else verdict
    items = _items(source, kind, on_bad_row)
    by = "" if out is None else _maker(models, reduce)
    done = {} if out is None else _finished(out, by)
    keep_programs()
    loaded: list[RewardModel] = []
    meter = _Meter(progress)
    while chunk := list(islice(items, TOGETHER)):
        todo = [item for item in chunk if not _is_done(item, done, out)]
        if todo and not loaded:
            loaded = load_ensemble(models, tokens=tokens)
        new = dict(zip([i.index for i in todo], _rows(loaded, todo, reduce), strict=True)) if todo else {}
        for row in new.values() if by else ():
            row["by"] = by
        if out is not None and new:
            out.parent.mkdir(parents=True, exist_ok=True)
            with out.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in new.values())
        for item in chunk:
            row = new.get(item.index) or done[item.index]
            _count(verdict, item, row)
            yield row
        meter.count(len(chunk), sum(sum(row.get("tokens", ())) for row in new.values()))


def _count(verdict: Verdict, item: Item, row: dict[str, Any]) -> None:
    verdict.rows += 1
    if "error" in row:
        verdict.failed += 1
    elif item.ranks is not None or item.labels is not None:
        each = row["scores"]
        if item.labels and len(item.labels[0]) > 1:
            if "steps" in row:
                each = row["steps"]
            else:  # the model scores answers as wholes: right where no step is known to be wrong
                item = replace(item, labels=[[np.nanmin(labels)] for labels in item.labels])
        verdict.known.append((item, [np.atleast_1d(np.asarray(x, np.float64)) for x in each], row["tokens"]))


def _items(source: SourceSection, kind: Kind | None, on_bad_row: str) -> Iterator[Item]:
    """The file's examples. Raises: DataError for a row without an answer; names file and line."""
    numbers = count()
    for row in (row for chunk in read_chunks(open_source(source)) for row in chunk):
        for found in _of_row(row, source, kind):
            if not isinstance(found, DataError):
                yield _item(next(numbers), row.where, found)
            elif on_bad_row == "error":
                raise DataError(f"{row.where}: {found}", kind=found.kind)
            else:
                yield Item(next(numbers), row.where, None, [], fault=str(found))


def _of_row(row: Row, source: SourceSection, kind: Kind | None) -> Iterator[Example | DataError]:
    """The examples of a row, or what is wrong with each."""
    counts = Counts()
    try:
        items = items_of(row, source, counts, kind or "pairs")
    except DataError as error:
        yield error
        return
    for item in items:
        try:
            example = parse_item(item, source, counts)
            _item(0, row.where, example)
        except DataError as error:
            yield error
        else:
            yield example


def _item(index: int, where: str, example: Example) -> Item:
    subset = getattr(example, "subset", None) or ""
    if isinstance(example, PromptCompletion):
        return Item(index, where, example.prompt, [example.completion])
    if isinstance(example, LanguageModeling) and not isinstance(example.content, str):
        if len(example.content) < 2 or example.content[-1].role != "assistant":
            raise DataError("the conversation does not end with an answer (an assistant turn)", kind="role")
        return Item(index, where, example.content[:-1], [example.content[-1:]])
    if isinstance(example, Preference):
        ranks = None if example.tie else (0, 1)
        return Item(index, where, example.prompt, [example.chosen, example.rejected], ranks, None, False,
                    _strength(example.strength), subset)  # fmt: skip
    if isinstance(example, Ranking):
        return Item(index, where, example.prompt, list(example.completions), example.ranks, None, False,
                    _strength(example.strength), subset)  # fmt: skip
    if isinstance(example, UnpairedPreference):
        labels = [[float(example.label)]]
        return Item(index, where, example.prompt, [example.completion], None, labels, subset=subset)
    if isinstance(example, Scored):
        graded = not 0.0 <= example.score <= 1.0
        labels = [[float(example.score)]]
        return Item(index, where, example.prompt, [example.completion], None, labels, graded, subset=subset)
    if isinstance(example, Stepwise):
        known = [math.nan if label is None else float(label) for label in example.labels]
        answer = example.completions if example.split else example.completions[0]
        return Item(index, where, example.prompt, [answer], None, [known], subset=subset)
    raise DataError(
        "the row says no answer to a prompt; give prompt and completion, messages, or judged answers (chosen and "
        "rejected, completions, steps)"
    )


def _strength(given: float | str | None) -> float:
    """The number of a grade, by the table that data sections have; NaN: a grade of another table."""
    try:
        return strength_of(given, AnswerDataSection().grades)
    except DataError:
        return math.nan


def _encode(model: RewardModel, item: Item) -> list[Encoded]:
    out = []
    for answer in item.answers:
        is_steps = isinstance(answer, tuple) and all(isinstance(part, str) for part in answer)
        if is_steps and model.readout.steps:
            out.append(model.encode(item.prompt, "\n".join(answer), steps=answer))
        else:
            out.append(model.encode(item.prompt, "\n".join(answer) if is_steps else answer))
        labels = 1 if item.labels is None else len(item.labels[0])
        if model.readout.steps and labels > 1 and len(out[-1].places) != labels:
            raise DataError(
                f"the model's separator {model.readout.step_separator!r} splits the completion into "
                f"{len(out[-1].places)} steps, but the row has {labels} labels",
                kind="step_separator",
            )
    return out


def _rows(models: Sequence[RewardModel], items: Sequence[Item], reduce: Reduce) -> list[dict[str, Any]]:
    """Scores of some items by all models."""
    faults: dict[int, str] = {}
    found: dict[int, list[list[np.ndarray]]] = {item.index: [[] for _ in item.answers] for item in items}
    sizes: dict[int, list[int]] = {}
    for model in models:
        encoded: list[tuple[int, int, Encoded]] = []
        for item in items:
            try:
                each = _encode(model, item)
                if item.fault is not None:
                    raise DataError(item.fault)
            except DataError as error:
                faults[item.index] = str(error)
                continue
            sizes[item.index] = [len(e.tokens) - e.start for e in each]
            encoded += [(item.index, n, e) for n, e in enumerate(each)]
        for (index, n, _), scores in zip(encoded, model.scores([e for _, _, e in encoded]), strict=True):
            found[index][n].append(scores)
    return [_row(item, found[item.index], sizes.get(item.index, []), reduce, models[0], faults) for item in items]


def _row(
    item: Item, found: list[list[np.ndarray]], sizes: list[int], reduce: Reduce, model: RewardModel, faults: Any
) -> dict[str, Any]:
    row: dict[str, Any] = {"index": item.index, "where": item.where, "digest": item.digest}
    if item.index in faults:
        return row | {"error": faults[item.index]}
    whole = [np.concatenate(parts, axis=1) for parts in found]  # members of all models
    pairs = [reduce(scores) for scores in whole]
    row |= {"scores": [_short(value) for value, _ in pairs], "tokens": sizes}
    if whole[0].shape[1] > 1:
        row["uncertainty"] = [_short(spread) for _, spread in pairs]
    if model.readout.steps:
        row["steps"] = [[_short(x) for x in reduce.by_step(scores)[0]] for scores in whole]
    if len(model.readout.objectives) > 1:
        names = model.readout.objectives
        row["objectives"] = [
            {name: _short(x) for name, x in zip(names, scores.mean(axis=(0, 1)), strict=True)} for scores in whole
        ]
    return row


def _short(value: float) -> float:
    return float(f"{float(value):.7g}")


def _judged(item: Item, answer: int, scores: np.ndarray) -> np.ndarray:
    """Scores of what is labelled."""
    return scores if item.labels is None else scores[~np.isnan(item.labels[answer])]


def _group(item: Item, tokens: Sequence[int]) -> Group:
    """An item as the evaluation's functions take it."""
    answers = []
    for n, size in enumerate(tokens):
        body = np.zeros(size, np.int32)
        marks = labels = None
        if item.labels is not None:
            known = np.array(item.labels[n], np.float32)
            known = known[~np.isnan(known)]
            labels, marks = np.zeros(max(size, len(known)), np.float32), np.zeros(max(size, len(known)), np.float32)
            labels[: len(known)], marks[: len(known)] = known, 1.0
        answers.append(Answer(body, np.ones(size, np.float32), item.ranks[n] if item.ranks else 0, marks, labels))
    return Group(np.zeros(0, np.int32), tuple(answers), item.strength, item.subset)


def _maker(models: Sequence[str], reduce: Reduce) -> str:
    """Changes with the models' files and with how their numbers become one."""
    memory, found = cache_folder() / "reference" / "hashes", []
    for path in models:
        folder = Path(path).expanduser()
        files = sorted(f for f in folder.iterdir() if f.suffix in (".json", ".safetensors")) if folder.is_dir() else []
        found.append([file_hash(file, memory) for file in files] or path)
    return hashlib.sha256(repr((found, reduce)).encode()).hexdigest()[:16]


def _finished(out: Path, by: str) -> dict[int, dict[str, Any]]:
    """Rows that a file holds already; a torn last line is cut off. Raises: ValueError where others wrote them."""
    whole = whole_lines(out, b'{"index": ', "jaxpost score")
    found = {}
    for number, line in enumerate(whole, 1):
        try:
            row = json.loads(line)
            found[int(row["index"])] = row
            row["digest"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{out}, line {number}: not a row of `jaxpost score`; name another file") from None
        if row.get("by") != by:
            raise ValueError(f"{out} holds scores by another model, or combined in another way; name another file")
    if out.exists():
        out.write_bytes(b"".join(line + b"\n" for line in whole))
    return found


def _is_done(item: Item, done: dict[int, dict[str, Any]], out: Path | None) -> bool:
    if item.index not in done:
        return False
    if done[item.index]["digest"] != item.digest:
        raise ValueError(f"{out} holds scores of other rows (row {item.index} differs); name another file")
    return True


class _Meter:
    """Says how many rows are done and how fast."""

    def __init__(self, stream: Any):
        self._stream, self._start = stream, time.perf_counter()
        self._rows = self._tokens = 0

    def count(self, rows: int, tokens: int) -> None:
        self._rows, self._tokens = self._rows + rows, self._tokens + tokens
        if self._stream is not None:
            seconds = time.perf_counter() - self._start
            speed = f"  {self._tokens / seconds:.0f} answer tokens/s" if self._tokens else ""
            print(f"{self._rows} rows scored{speed}", file=self._stream, flush=True)
