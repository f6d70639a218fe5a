"""A report of what a preset would train on: rows as the model reads them, lengths, counts, packing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxpost.config import DataSection, SourceSection
from jaxpost.data.answers import AnswerDataset
from jaxpost.data.cache import Progress, SourceStats
from jaxpost.data.dataset import TokenDataset, encode_options, prepare
from jaxpost.data.encode import EncodeOptions, encode_batch, to_pieces
from jaxpost.data.formats import Example, LanguageModeling, PromptCompletion, Text
from jaxpost.data.loader import make_source
from jaxpost.data.packing import Plan
from jaxpost.data.sources import open_source
from jaxpost.data.tokenise import Counts, examples_of, read_chunks
from jaxpost.text.messages import ODD, DataError, as_data_error
from jaxpost.text.tokenizer import Tokenizer

_TRAINED, _READ, _LABEL, _END = "\x1b[32m", "\x1b[2m", "\x1b[1m", "\x1b[0m"
TRAINABLE = (LanguageModeling, PromptCompletion)


def inspect(
    section: DataSection,
    tokenizer: Tokenizer,
    *,
    cache_dir: str | Path,
    batch_size: int = 8,
    rows: int = 3,
    color: bool = False,
    report: Callable[[Progress], None] | None = None,
) -> str:
    """What `section` gives: some rows with the trained tokens marked, and all the counts.

    Args:
      batch_size: rows of a batch, for the counts of batches.
      rows: how many rows of each source are shown.
      color: trained tokens in green (terminals); else between [[ and ]].
    Raises: what `prepare` raises.
    """
    parts = []
    for name, sources in (("train", section.train), ("eval", section.eval)):
        if sources:
            parts.append(_part(name, sources, section, tokenizer, cache_dir, batch_size, rows, color, report))
    if not parts:
        raise DataError("no data: give at least one source (data.train)")
    return "\n".join(parts)


def _part(
    name: str,
    sources: Sequence[SourceSection],
    section: DataSection,
    tokenizer: Tokenizer,
    cache_dir: str | Path,
    batch_size: int,
    rows: int,
    color: bool,
    report: Callable[[Progress], None] | None,
) -> str:
    out, trainable = [], []
    options = encode_options(section)
    for source in sources:
        out.append(heading(f"{name}: {source.path}", color))
        examples, counts, total = _sample(source, section, rows)
        for where, example in examples:
            out += [f"--- {where}", show_example(example, tokenizer, options, color)]
        if examples and not isinstance(examples[0][1], TRAINABLE):
            out += ["", *_plain_counts(counts, total)]
        else:
            trainable.append(source)
        out.append("")
    if trainable:
        dataset = prepare(section, trainable, tokenizer, cache_dir=cache_dir, report=report)
        batches = make_source(
            dataset,
            seq_len=section.seq_len,
            batch_size=batch_size,
            packing=section.packing,
            seed=section.seed,
            endless=name == "train",
            pad_id=tokenizer.pad_id,
        )
        out += [heading(f"{name}: counts", color), *summary(dataset, batches.plan)]
        out += ["", heading(f"{name}: tokens of an example", color), *histogram(dataset.lengths, section.seq_len), ""]
    return "\n".join(out)


def heading(text: str, color: bool) -> str:
    return f"{_LABEL}{text}{_END}" if color else f"== {text}"


def _sample(source: SourceSection, section: DataSection, rows: int) -> tuple[list[tuple[str, Example]], Counts, int]:
    """The first examples that can be read; of formats that are not trained here also the counts of all rows."""
    counts, shown, total = Counts(), [], 0
    for row in (row for chunk in read_chunks(open_source(source)) for row in chunk):
        total += 1
        try:
            examples = examples_of(row, source, counts)
        except ODD as found:
            error = as_data_error(found)
            counts.bad[error.kind] += 1
            if section.on_bad_row == "error":
                raise DataError(f"{row.where}: {error}", kind=error.kind) from error.__cause__
            continue
        shown += [(row.where, example) for example in examples[: rows - len(shown)]]
        if len(shown) >= rows and isinstance(examples[0], TRAINABLE):
            break
    return shown, counts, total


def _plain_counts(counts: Counts, total: int) -> Iterator[str]:
    formats = ", ".join(f"{n} {name}" for name, n in counts.formats.items())
    yield f"{total} rows: {formats}; no rows for supervised training, so they are checked and shown only"
    yield from _named("bad rows", dict(counts.bad))
    yield from _named("not read", dict(+counts.ignored))


def show_example(example: Example, tokenizer: Tokenizer, options: EncodeOptions, color: bool) -> str:
    """An example as text: trained formats as the model reads them, the others part by part with their labels."""
    if isinstance(example, TRAINABLE):
        try:
            pieced = to_pieces(example, tokenizer, options, Counter())
        except ODD as error:
            return f"(cannot be trained on: {as_data_error(error)})"
        encoded = encode_batch([pieced], tokenizer, options)[0]
        if encoded is None or isinstance(encoded, DataError):
            return f"(left out: {encoded or 'longer than the window'})"
        shown = show_tokens(encoded.tokens, encoded.weights, tokenizer, color)
        cut = encoded.full_length - len(encoded.tokens)
        return shown + (f"\n(cut: {cut} of {encoded.full_length} tokens lie beyond the window)" if cut else "")
    lines = [f"({type(example).__name__})"]
    for key, value in vars(example).items():
        if key == "completions" and "labels" in vars(example):
            labels = vars(example)["labels"]
            words = [step_word(label) for label in labels]
            texts = value if len(value) == len(words) else (*value, *[""] * (len(words) - len(value)))
            lines += [f"  [{word}] {step}" for step, word in zip(texts, words, strict=True)]
        elif key == "completions":
            ranks = vars(example).get("ranks", ())
            lines += [f"  [rank {rank}] {_plain(text)}" for text, rank in zip(value, ranks, strict=True)]
        elif value not in (None, ()) and key not in ("labels", "split", "ranks", "scores", "tools"):
            lines.append(f"{key}: {_plain(value)}")
    return "\n".join(lines)


def step_word(label: float | None) -> str:
    """A step's label as a word.

    >>> step_word(1.0), step_word(0.25), step_word(None)
    ('right', '0.25', 'not judged')
    """
    if label is None:
        return "not judged"
    return {1.0: "right", 0.0: "wrong"}.get(label, f"{label:.2f}")


def _plain(value: Text | bool | tuple) -> str:
    if isinstance(value, tuple):
        return "".join(f"\n  {getattr(v, 'role', '')}: {getattr(v, 'content', v)}" for v in value)
    return str(value)


def show_tokens(tokens: np.ndarray, weights: np.ndarray, tokenizer: Tokenizer, color: bool) -> str:
    """The text of tokens, with the trained ones marked; a weight other than 1 stands before its part."""
    out = []
    edges = np.flatnonzero(np.diff(weights)) + 1
    for ids, part in zip(np.split(tokens, edges), np.split(weights, edges), strict=True):
        text, weight = tokenizer.decode(ids.tolist(), skip_special_tokens=False), float(part[0]) if len(part) else 0.0
        label = "" if weight in (0.0, 1.0) else f"(x{weight:g})"
        if color:
            # Escape codes do not reach over line ends in pagers, so every line has its own.
            code = _TRAINED if weight else _READ
            out.append(label + "\n".join(f"{code}{line}{_END}" if line else "" for line in text.split("\n")))
        else:
            out.append(f"[[{label}{text}]]" if weight else text)
    return "".join(out)


def summary(dataset: TokenDataset | AnswerDataset, plan: Plan) -> Iterator[str]:
    """Counts of every source, what was left out and why, and how the rows pack."""
    columns = ("rows", "examples", "tokens", "trained", "cut", "dropped", "bad", "share")
    width = max(len("source"), *(len(_short(stats.name)) for stats in dataset.stats))
    yield f"{'source':{width}}" + "".join(f"{name:>10}" for name in columns)
    shares = dataset.shares or [stats.examples for stats in dataset.stats]
    for stats, share in zip(dataset.stats, shares, strict=True):
        trained = stats.trained_tokens / max(1, stats.tokens)
        numbers = (stats.rows, stats.examples, stats.tokens, f"{trained:.1%}", stats.truncated)
        left = (sum(stats.dropped.values()), sum(stats.bad.values()), f"{share / sum(shares):.1%}")
        yield f"{_short(stats.name):{width}}" + "".join(f"{value:>10}" for value in numbers + left)
    for stats in dataset.stats:
        yield from _details(stats)
    kind = "packed" if plan.packing else "one example a row"
    yield (
        f"{plan.rows_per_epoch} rows of {plan.seq_len} tokens an epoch ({kind}), {plan.efficiency:.1%} filled; "
        f"{plan.num_batches_per_epoch} batches of {plan.batch_size}"
    )


def _short(name: str) -> str:
    return name if len(name) <= 40 else "..." + name[-37:]


def _details(stats: SourceStats) -> Iterator[str]:
    name = _short(stats.name)
    if stats.truncated:
        yield f"{name}: {stats.truncated_tokens} tokens cut off"
    for label, counts in (
        ("dropped", stats.dropped),
        ("bad rows", stats.bad),
        ("note", stats.notes),
        ("not read", stats.ignored),
    ):
        for line in _named(label, counts):
            yield f"{name}: {line}"


def _named(label: str, counts: dict[str, int]) -> Iterator[str]:
    if counts:
        yield f"{label}: " + ", ".join(f"{key} ({n})" for key, n in counts.items())


def histogram(lengths: np.ndarray, seq_len: int, *, bars: int = 12, width: int = 40) -> Iterator[str]:
    """Lengths in up to `bars` equal bins, from 1 to the longest (the last bin holds those of the whole window)."""
    top = int(lengths.max())
    counts, edges = np.histogram(lengths, bins=min(bars, top), range=(1, top + 1))
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        bar = "#" * int(np.ceil(width * count / counts.max()))
        yield f"{int(np.ceil(low)):>6} - {int(np.ceil(high)) - 1:<6} {count:>8} {bar}"
    median, p95 = np.percentile(lengths, [50, 95])
    yield f"median {median:.0f}, 95% {p95:.0f}, longest {top}, window {seq_len}"
