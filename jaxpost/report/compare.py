"""Several runs on one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxpost.eval.statistics import mcnemar, paired_difference
from jaxpost.report import page
from jaxpost.report.panels import compared
from jaxpost.report.read import Run, read_run
from jaxpost.report.results import Evaluation, evaluations
from jaxpost.report.summary import method_of, model_of, seconds_of, status
from jaxpost.report.text import html
from jaxpost.train.folder import flatten_config
from jaxpost.train.progress import duration


def write_comparison(folders: Sequence[Path | str], out: Path | str) -> Path:
    """Write several runs on one page: a table, the settings in which they differ, their curves together.

    Raises:
      FileNotFoundError: a folder is no run.
    """
    runs: dict[str, Run] = {}
    for folder in folders:
        run = read_run(Path(folder))
        runs[run.name if run.name not in runs else f"{run.name} ({len(runs) + 1})"] = run
    found = {name: evaluations(run) for name, run in runs.items()}
    charts, chart_data = page.all_figures(compared(runs))
    notices = [f"{name}: {notice}" for name, run in runs.items() for notice in run.notices]
    parts = {
        "runs": ("Runs", _runs(runs)),
        "results": ("Before and after", _results_of(found)),
        "paired": ("The last evaluations, item by item", _paired(found)),
        "settings": ("Settings that differ", _differences(runs)),
        "curves": ("Curves", charts),
    }
    title = " · ".join(runs)
    body = page.framed((f"{len(runs)} runs", title), parts, notices=notices)
    data = {"charts": chart_data, "texts": []}
    return page.write(Path(out), page.page(f"{title}: comparison", body, data))


def _results_of(found: Mapping[str, Sequence[Evaluation]]) -> str:
    rows = [
        [html(name), *page.result_row(one.accuracy, items=one.items, name=one.name)]
        for name, every in found.items()
        for one in every
    ]
    return page.table(("run", *page.RESULT_HEAD), rows) if rows else ""


def _runs(runs: Mapping[str, Run]) -> str:
    rows = [
        [html(name), html(method_of(run)), html(model_of(run)), html(status(run)), duration(seconds_of(run)),
         str(len(run.alarms))]
        for name, run in runs.items()
    ]  # fmt: skip
    return page.table(("run", "method", "model", "steps", "time", "alarms"), rows)


def _paired(found: Mapping[str, Sequence[Evaluation]]) -> str:
    """Each run against the first, on the items that both answered once at the end."""
    (first, ours), *others = found.items()
    rows = []
    for name, theirs in others:
        for one in ours:
            other = next((o for o in theirs if o.name == one.name), None)
            last = {which: e.after or e.before for which, e in (("a", one), ("b", other)) if e}
            shared = [e for e, s in last.get("a", {}).items() if len(s) == 1 == len(last.get("b", {}).get(e, ()))]
            if shared:
                right = [[float(last[which][e][0].right) for e in shared] for which in ("a", "b")]
                cells = page.points_of(paired_difference(*right)), *page.tested(mcnemar(*right))
                rows.append([html(f"{name} against {first}"), html(one.name), str(len(shared)), *cells])
    head = ("runs", "evaluation", "items", "difference, points", "right only in it / only in the first", "paired test")
    return page.table(head, rows) if rows else ""


def _differences(runs: Mapping[str, Run]) -> str:
    flat = {name: flatten_config(run.config) for name, run in runs.items()}
    keys = dict.fromkeys(key for found in flat.values() for key in found if not key.startswith("run."))
    rows = [
        [html(key), *(html(found.get(key, "–"), 200) for found in flat.values())]
        for key in keys
        if len({str(found.get(key)) for found in flat.values()}) > 1
    ]
    return page.table(("setting", *flat), rows, "") if rows else ""
