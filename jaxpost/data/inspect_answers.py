"""A report of judged rows as a model would learn from them: sides and what differs, steps, grades, lengths by side."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from difflib import SequenceMatcher
from itertools import groupby, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from jaxpost.config import AnswerDataSection, SourceSection
from jaxpost.data.answer_rows import make_answer_source
from jaxpost.data.answers import AnswerDataset, prepare_answers
from jaxpost.data.cache import Progress
from jaxpost.data.groups import Answer, AnswerOptions, Group, Kind
from jaxpost.data.inspect import heading, histogram, step_word, summary
from jaxpost.text.messages import DataError
from jaxpost.text.tokenizer import Tokenizer

_READ, _ONLY_BEST, _ONLY_OTHER, _END = "\x1b[2m", "\x1b[32m", "\x1b[31m", "\x1b[0m"


def inspect_answers(
    section: AnswerDataSection,
    tokenizer: Tokenizer,
    *,
    kind: Kind,
    cache_dir: str | Path,
    share_prompts: bool = True,
    batch_size: int = 8,
    rows: int = 3,
    color: bool = False,
    report: Callable[[Progress], None] | None = None,
) -> str:
    """What `section` gives: some groups with what differs between their answers, and all the counts.

    Args:
      kind: what the rows are read as.
      batch_size: rows of a batch, for the counts of batches.
      rows: how many groups of each source are shown.
      color: words that only the better side has in green, only the other in red; else {+so+} and [-so-].
    Raises: what `prepare_answers` raises.
    """
    parts = []
    for name, sources in (("train", section.train), ("eval", section.eval)):
        if not sources:
            continue
        with TemporaryDirectory() as folder:
            rejected = Path(folder, "rejected.jsonl")
            dataset = prepare_answers(
                section,
                sources,
                tokenizer,
                kind=kind,
                cache_dir=cache_dir,
                share_prompts=share_prompts,
                report=report,
                rejected=rejected,
            )
            left_out = list(_left_out(rejected))
        parts += _shown(name, sources, dataset, tokenizer, rows, color)
        source = make_answer_source(
            dataset,
            seq_len=section.seq_len,
            batch_size=batch_size,
            share_prompts=share_prompts,
            packing=section.packing,
            seed=section.seed,
            endless=name == "train",
        )
        parts += [heading(f"{name}: counts of groups ({kind})", color), *summary(dataset, source.plan)]
        parts += [*_counts(dataset), *left_out]
        parts += ["", heading(f"{name}: tokens of an answer", color), *_lengths(dataset)]
        parts += ["", heading(f"{name}: tokens of a row that a group takes", color)]
        parts += [*histogram(dataset.lengths, section.seq_len), ""]
    if not parts:
        raise DataError("no data: give at least one source (data.train)")
    return "\n".join(parts)


def _shown(
    name: str,
    sources: Sequence[SourceSection],
    dataset: AnswerDataset,
    tokenizer: Tokenizer,
    rows: int,
    color: bool,
) -> Iterator[str]:
    for number, source in enumerate(sources):
        yield heading(f"{name}: {source.path}", color)
        first = int(dataset.starts[number])
        for index in range(first, min(first + rows, int(dataset.starts[number + 1]))):
            group = dataset.group(index)
            yield f"--- group {index - first}" + (f" ({group.subset})" if group.subset else "")
            yield show_group(group, tokenizer, dataset.options, color)
        yield ""


def show_group(group: Group, tokenizer: Tokenizer, options: AnswerOptions, color: bool) -> str:
    """A group as text: its prompt, then every answer with its place, score or steps."""
    prompt = tokenizer.decode(group.prompt, skip_special_tokens=False)
    lines = [_painted(prompt, _READ) if color else prompt]
    texts = [tokenizer.decode(answer.tokens, skip_special_tokens=False) for answer in group.answers]
    best = min(range(len(texts)), key=lambda n: group.answers[n].rank)
    for n, answer in enumerate(group.answers):
        lines.append(_title(answer, n, group, options))
        if options.kind == "steps":
            lines += _steps(answer, tokenizer)
        elif len(texts) == 1:
            lines.append(texts[n])
        else:
            other = best if n != best else 1 if best == 0 else 0
            lines.append(_differences(texts[n], texts[other], n == best, color))
    return "\n".join(lines)


def _title(answer: Answer, number: int, group: Group, options: AnswerOptions) -> str:
    tokens, kind = f"{len(answer.tokens)} tokens", options.kind
    if kind == "unpaired":
        return f"[{'desirable' if answer.rank == 0 else 'undesirable'}, {tokens}]"
    if kind == "scores" and answer.labels is not None:
        names = options.objectives or ("score",)
        values = np.ravel(answer.labels[-1]).tolist()
        said = (f"{name} {'unknown' if np.isnan(v) else f'{v:g}'}" for name, v in zip(names, values, strict=True))
        return f"[{', '.join(said)}, {tokens}]"
    if kind == "steps" and answer.marks is not None:
        return f"[{int((answer.marks > 0).sum())} judged steps, {tokens}]"
    tied = sum(other.rank == answer.rank for other in group.answers) > 1
    if len(group.answers) == 2:
        name = "tied" if tied else ("chosen", "rejected")[answer.rank]
    else:
        name = f"rank {answer.rank}" + (", tied" if tied else "")
    strength = f", strength {group.strength:g}" if number == 0 else ""
    return f"[{name}, {tokens}{strength}]"


def _steps(answer: Answer, tokenizer: Tokenizer) -> Iterator[str]:
    """One line for each judged step: its label, then its text up to the mark."""
    if answer.marks is None or answer.labels is None:
        return
    begin = 0
    for at in np.flatnonzero(answer.marks > 0).tolist():
        text = tokenizer.decode(answer.tokens[begin : at + 1], skip_special_tokens=False)
        yield f"  [{step_word(float(answer.labels[at]))}] {text.strip()}"
        begin = at + 1
    rest = tokenizer.decode(answer.tokens[begin:], skip_special_tokens=False)
    if rest.strip():
        yield f"  [{step_word(None)}] {rest.strip()}"


def _differences(text: str, other: str, better: bool, color: bool) -> str:
    """The text with the words marked that the other text has not at that place.

    >>> _differences("It is 4.", "It is 5.", True, False)
    'It is {+4.+}'
    """
    words, others = (re.findall(r"\s+|\S+", value) for value in (text, other))
    parts: list[tuple[bool, str]] = []
    for operation, _, _, start, end in SequenceMatcher(None, others, words, autojunk=False).get_opcodes():
        part, equal = "".join(words[start:end]), operation == "equal"
        if part:
            parts.append((equal and bool(part.strip()), part))  # spaces between two changes belong to them
    out = []
    for equal, group in groupby(parts, key=lambda part: part[0]):
        whole = "".join(part for _, part in group)
        body = whole.strip()
        if equal or not body:
            out.append(whole)
            continue
        head, tail = whole[: len(whole) - len(whole.lstrip())], whole[len(whole.rstrip()) :]
        if color:
            marked = _painted(body, _ONLY_BEST if better else _ONLY_OTHER)
        else:
            marked = f"{{+{body}+}}" if better else f"[-{body}-]"
        out.append(head + marked + tail)
    return "".join(out)


def _painted(text: str, code: str) -> str:
    """Escape codes do not reach over line ends in pagers, so every line has its own."""
    return "\n".join(f"{code}{line}{_END}" if line else "" for line in text.split("\n"))


def _left_out(rejected: Path) -> Iterator[str]:
    """The first row left out for each kind of reason, with its place."""
    found: dict[str, tuple[str, str]] = {}
    lines = rejected.read_text(encoding="utf-8").split("\n") if rejected.is_file() else []
    for reject in (json.loads(line) for line in lines if line):
        kind = reject["reason"] if reject["kind"] == "dropped" else reject["kind"]
        found.setdefault(kind, (reject["where"], reject["reason"]))
    for kind, (where, reason) in found.items():
        yield f"left out ({kind}), the first: {where}" + (f": {reason}" if reason != kind else "")


def _counts(dataset: AnswerDataset) -> Iterator[str]:
    groups = [dataset.group(i) for i in range(len(dataset))]
    if dataset.kind in ("pairs", "rankings"):
        yield "answers of a group: " + _tally(Counter(len(group.answers) for group in groups))
        tied = sum(len({answer.rank for answer in group.answers}) < len(group.answers) for group in groups)
        yield f"groups with ties: {tied}"
        yield "strengths: " + _spread(dataset.strengths)
    elif dataset.kind == "unpaired":
        good = sum(group.answers[0].rank == 0 for group in groups)
        yield f"desirable: {good} of {len(groups)} ({good / len(groups):.1%})"
    elif dataset.kind == "scores":
        yield "answers of a group: " + _tally(Counter(len(group.answers) for group in groups))
        objectives, found = dataset.options.objectives, _labels(dataset)
        for n, name in enumerate(objectives or ("",)):
            values = found[:, n] if objectives else found
            known = values[~np.isnan(values)]
            yield f"scores{' of ' + name if name else ''}: " + (_spread(known) if known.size else "none")
    else:
        yield from _step_counts(dataset, groups)
    names = Counter(name for name in dataset.subsets.tolist() if name)
    if names:
        yield "subsets: " + _tally(names)


def _labels(dataset: AnswerDataset) -> np.ndarray:
    """Labels of all marked tokens."""
    found = zip(dataset.marks or (), dataset.labels or (), strict=True)
    return np.concatenate([labels[marks > 0] for marks, labels in found])


def _step_counts(dataset: AnswerDataset, groups: Sequence[Group]) -> Iterator[str]:
    labels = _labels(dataset)
    yield f"judged steps: {len(labels)}, {(labels >= 0.5).mean():.1%} right; labels: {_spread(labels)}"
    firsts: Counter[str] = Counter()
    for answer in (group.answers[0] for group in groups):
        if answer.marks is None or answer.labels is None:
            continue
        wrong = np.flatnonzero(answer.labels[answer.marks > 0] < 0.5)
        firsts["none" if wrong.size == 0 else f"step {wrong[0] + 1}" if wrong[0] < 9 else "later"] += 1
    yield "first wrong step among the judged: " + _tally(dict(sorted(firsts.items())))


def _tally(counts: dict | Counter) -> str:
    shown = counts.most_common() if isinstance(counts, Counter) else list(counts.items())
    more = f", ... ({len(shown) - 12} more)" if len(shown) > 12 else ""
    return ", ".join(f"{key} ({count})" for key, count in shown[:12]) + more


def _spread(values: np.ndarray) -> str:
    """Each value with its count, or, of many values, their range."""
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) <= 10:
        return _tally({f"{value:g}": int(count) for value, count in zip(distinct, counts, strict=True)})
    low, middle, high = np.percentile(values, [0, 50, 100])
    return f"{low:g} to {high:g}, median {middle:g}, mean {values.mean():.3g}"


def sides(dataset: AnswerDataset) -> dict[str, np.ndarray]:
    """Tokens of answers by side: the best and the other answers of pairs and rankings, good and bad ones, or all.

    Ties are on no side.
    """
    names = {"unpaired": ("desirable", "undesirable"), "pairs": ("chosen", "rejected")}.get(dataset.kind)
    names = names or (("best", "others") if dataset.kind == "rankings" else ("answers", "answers"))
    out: dict[str, list[int]] = {name: [] for name in names}
    for group in (dataset.group(i) for i in range(len(dataset))):
        tied = dataset.kind in ("pairs", "rankings") and len({answer.rank for answer in group.answers}) == 1
        for answer in () if tied else group.answers:
            if answer.rank >= 0:
                out[names[min(answer.rank, 1)]].append(len(answer.tokens))
    return {name: np.array(lengths, np.int64) for name, lengths in out.items() if lengths}


def _lengths(dataset: AnswerDataset, *, bars: int = 10, width: int = 24) -> Iterator[str]:
    """Lengths of each side in the same bins, side by side; of pairs also how often the chosen one is longer."""
    found = sides(dataset)
    if not found:
        return
    top = max(int(lengths.max()) for lengths in found.values())
    edges = np.unique(np.linspace(1, top + 1, min(bars, top) + 1).round().astype(int))
    counts = {name: np.histogram(lengths, bins=edges)[0] for name, lengths in found.items()}
    most = max(int(count.max()) for count in counts.values())
    yield (" " * 16 + "".join(f"{name:>9} {'':{width}}" for name in found)).rstrip()
    for n, (low, high) in enumerate(pairwise(edges.tolist())):
        bars_of = (f"{count[n]:>9} {'#' * int(np.ceil(width * count[n] / most)):{width}}" for count in counts.values())
        yield (f"{low:>6} - {high - 1:<6} " + "".join(bars_of)).rstrip()
    for name, lengths in found.items():
        median, p95 = np.percentile(lengths, [50, 95])
        yield f"{name}: median {median:.0f}, 95% {p95:.0f}, longest {lengths.max()}, mean {lengths.mean():.1f}"
    if dataset.kind == "pairs" and len(found) == 2:
        chosen, rejected = found.values()
        yield f"the chosen answer is longer in {(chosen > rejected).mean():.1%} of the pairs, as long in " + (
            f"{(chosen == rejected).mean():.1%}"
        )
    prompts = np.array([len(dataset.group(i).prompt) for i in range(len(dataset))])
    yield f"prompts: median {np.median(prompts):.0f}, longest {prompts.max()}"
