"""A run's folder as one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxpost.report import page
from jaxpost.report.data import Texts, chosen, sample_table
from jaxpost.report.panels import sections
from jaxpost.report.read import Run, read_run
from jaxpost.report.results import KINDS, Change, Evaluation, Gain, evaluations, gain, means
from jaxpost.report.summary import headline, status, tiles
from jaxpost.report.text import clean, html, percent
from jaxpost.train.folder import flatten_config

BUDGET = 8_000_000
"""Characters of samples that a page holds: a few seconds to load on a phone."""


def write_report(folder: Path | str, out: Path | str = "report.html", *, budget: int = BUDGET) -> Path:
    """Write a run as one self-contained HTML page; the same folder gives the same bytes.

    Args:
      folder: of a run that has ended, was killed, or is still going on.
      out: the file, relative to the folder.
      budget: characters of samples that the page holds (`data.chosen`).

    Returns: the file.

    Raises:
      FileNotFoundError: no such run.
    """
    run = read_run(Path(folder))
    found = evaluations(run)
    texts = Texts()
    kept = chosen(run.samples, found, budget)
    apart = _most_telling(found)
    charts, chart_data = page.all_figures(sections(run))
    changes = [
        [texts.place(t) for t in (c.before.example, _said(c.kind, apart), c.before.prompt, c.before.answer, *_texts(c))]
        for c in (apart.changes if apart else ())
    ]
    parts = {
        "results": ("Before and after", _results(found) + _means(means(run, found))),
        "gain": ("Where the gain comes from", _gain(apart, found)),
        "alarms": ("Alarms", _alarms(run)),
        "curves": ("Curves", charts),
        "changes": ("Items that changed", '<div class="browser" id="changes"></div>' if changes else ""),
        "samples": ("Samples", _samples(run, len(kept))),
        "settings": ("Settings and machine", _settings(run)),
    }
    body = page.framed(headline(run), parts, state=status(run), tiles=tiles(run, found), notices=run.notices)
    data = sample_table(kept, texts) | {"charts": chart_data, "changes": changes}
    return page.write(Path(folder) / out, page.page(f"{run.name}: report", body, data | {"texts": texts.all}))


def _results(found: Sequence[Evaluation]) -> str:
    rows = []
    for one in found:
        rows.append(page.result_row(one.accuracy, items=one.items, name=one.name))
        rows += [page.result_row(row, items=one.items, name=f"{one.name}: {row.label}") for row in one.pass_at]
    if not rows:
        return ""
    steps = sorted({one.steps for one in found})
    when = "; ".join(f"step {first} and step {last}" for first, last in steps)
    note = (
        f'<p class="dim">First and last evaluation: {when}. In brackets 95% intervals: Wilson\'s where all samples of '
        "an item are right or wrong, else a bootstrap over items; of differences a paired bootstrap. The test is "
        "McNemar's exact one, two-sided.</p>"
    )
    return page.table(page.RESULT_HEAD, rows) + note


def _means(found: Sequence[tuple[str, float, float]]) -> str:
    rows = [[html(name), f"{first:.4f}", f"{last:.4f}", f"{last - first:+.4f}"] for name, first, last in found]
    return page.table(("held out", "before", "after", "difference"), rows) if rows else ""


def _most_telling(found: Sequence[Evaluation]) -> Gain | None:
    """The gain of the evaluation that most others are laxer than; of equal ones the first."""
    gains = [g for one in found if (g := gain(one, found)) is not None]
    return max(gains, key=lambda g: len(g.laxer), default=None)


def _said(kind: str, apart: Gain | None) -> str:
    return KINDS[kind].format(laxer=" or ".join(apart.laxer) if apart else "")


def _texts(change: Change) -> list[str]:
    return [f"{s.text}\n[{s.finish}]" if s.finish else s.text for s in (change.before, change.after)]


def _gain(apart: Gain | None, found: Sequence[Evaluation]) -> str:
    if apart is None or not apart.changes:
        return ""
    name = html(apart.evaluation.name)
    parts = [f"<p>On {name} ({apart.items} items, paired): {page.points_of(apart.total)} points.</p>"]
    if apart.being_right and apart.in_time:
        laxest = html(apart.laxer[0])
        parts.append(
            f"<p><b>Being right:</b> {page.points_of(apart.being_right)} points: what accuracy under {laxest} gained, "
            f"which asks less of the same items. <b>Finishing in time and in form:</b> {page.points_of(apart.in_time)} "
            f"points: the rest, by which the answers that are right under {laxest} but do not count on {name} became "
            "fewer.</p>"
        )
    else:
        parts.append(
            '<p class="dim">No evaluation of the same items asks less (a lenient parser, a longer limit), so it is '
            "unknown how many of the answers that were cut off would have been right.</p>"
        )
    for text, kinds in (
        ("became right. Before, of these:", ("there, not counted", "cut off", "wrong")),
        ("became wrong. Now, of these:", ("lost: form", "lost: cut off", "lost: wrong")),
    ):
        counts = [(apart.count(kind), _said(kind, apart)) for kind in kinds if apart.laxer or kind not in _NEED_LAXER]
        if total := sum(count for count, _ in counts):
            parts.append(f"<h3>{total} items {text}</h3>{page.bar(counts)}")
    return "\n".join([*parts, *_within_reach(apart, found)])


_NEED_LAXER = ("there, not counted", "lost: form")


def _within_reach(apart: Gain, found: Sequence[Evaluation]) -> list[str]:
    """Of the items gained, how many had a right answer among several samples before training."""
    gained = [c.item for c in apart.changes if not c.kind.startswith("lost")]
    lines = []
    for other in found:
        shared = [e for e in gained if len(other.before.get(e, ())) > 1]
        if shared:
            reached = sum(any(s.right for s in other.before[e]) for e in shared)
            lines.append(
                f"<p><b>Within reach:</b> {reached} of {len(shared)} items that became right had a right answer among "
                f"the samples of {html(other.name)} before training ({percent(reached / len(shared), 0)}).</p>"
            )
    return lines


def _alarms(run: Run) -> str:
    return "\n".join(
        f'<p class="alarm"><b>step {alarm["step"]}: {html(alarm.get("alarm"))}</b><br>{html(alarm.get("message"))}</p>'
        for alarm in run.alarms
    )


def _samples(run: Run, kept: int) -> str:
    if not run.samples:
        return ""
    count = (
        f"{kept:,} of {len(run.samples):,} samples; the others are in samples.jsonl."
        if kept < len(run.samples)
        else f"All {kept:,} samples."
    )
    return (
        f"<p>{count}</p><noscript><p>Looking through them needs JavaScript.</p></noscript>"
        '<div class="browser" id="samples"></div>'
    )


def _settings(run: Run) -> str:
    parts = []
    if run.config_text:
        parts.append(page.folded("config.yaml", f"<pre>{html(run.config_text, None)}</pre>"))
    for number, start in enumerate(run.starts, 1):
        rows = [[html(key), html(value)] for key, value in flatten_config(start).items() if value not in (None, {}, [])]
        parts.append(page.folded(f"start {number}: {clean(start.get('started'), 40)}", page.table(("", ""), rows, "")))
    return "\n".join(parts)
