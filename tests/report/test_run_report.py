"""The page of a run: whole, safe, honest, and the same each time."""

import base64
import hashlib
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_run import jsonl, write_run

from jaxpost import cli
from jaxpost.eval.statistics import wilson
from jaxpost.report import write_comparison, write_report
from jaxpost.report.panels import evaluation_names
from jaxpost.report.read import read_run
from jaxpost.report.results import evaluations, gain, means


class Page(HTMLParser):
    """The elements of a page, its tables, its text, and what its scripts hold."""

    def __init__(self, path: Path):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self._raw = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._raw = tag in ("script", "style")
        if tag == "script":
            self.scripts.append("")
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        self._raw = False

    def handle_data(self, data):
        if self._raw:
            if self.elements[-1][0] == "script":
                self.scripts[-1] += data
            return
        self.text += data
        if self.tables and self.tables[-1] and self.tables[-1][-1] and self.elements[-1][0] in ("td", "th", "span"):
            self.tables[-1][-1][-1] += data

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])

    def rows(self, first: str) -> dict[str, list[str]]:
        """The rows of the table whose first heading this is, by their first cell."""
        (table,) = self.tables_by(first)
        return {row[0]: row[1:] for row in table[1:]}

    def tables_by(self, first: str) -> list[list[list[str]]]:
        """The tables whose first heading this is."""
        tables = [[[cell.strip() for cell in row] for row in table] for table in self.tables]
        return [table for table in tables if table[0][0] == first]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "demo", steps=12, eval_every=6, items=40, groups=2, speed=6.0)


@pytest.fixture(scope="module")
def made(folder) -> Page:
    return Page(write_report(folder))


def test_every_sample_of_the_file_is_in_the_page(folder, made):
    rows = lines(folder / "samples.jsonl")
    data = made.data
    assert len(data["samples"]) == len(rows)
    assert f"All {len(rows):,} samples." in made.text
    texts = data["texts"]
    for row, shown in zip(rows, data["samples"], strict=True):
        assert shown[0] == row["step"]
        assert data["sources"][shown[1]] == row.get("eval", "rollout")
        assert [texts[shown[i]] for i in (2, 4, 5, 6)] == [
            str(row["example"]), row["prompt"], row["text"], row["answer"]
        ]  # fmt: skip
        assert [data["columns"][i] for i, v in enumerate(shown[7]) if v is not None] == list(row["rewards"])
        assert shown[8] == row.get("score", row.get("reward"))
        assert shown[9] == pytest.approx(row["advantage"]) if "advantage" in row else shown[9] is None
        assert shown[11] == row["tokens"]


def scores(folder: Path, name: str, step: int) -> dict[Any, list[float]]:
    found: dict[Any, list[float]] = {}
    for row in lines(folder / "samples.jsonl"):
        if row.get("eval") == name and row["step"] == step:
            found.setdefault(row["example"], []).append(row["score"])
    return found


@pytest.mark.parametrize("name", ["strict", "lenient"])
def test_the_table_says_what_the_samples_say(folder, made, name):
    """Shares, intervals, paired counts and p, computed anew from samples.jsonl."""
    first, last = scores(folder, name, 0), scores(folder, name, 12)
    items, before, after, difference, changed, p = made.rows("evaluation")[name]
    assert int(items) == len(first) == 40
    for cell, found in ((before, first), (after, last)):
        value, low, high = wilson(int(sum(map(sum, found.values()))), 40)
        assert cell == f"{100 * value:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"
    gained = sum(last[e][0] > first[e][0] for e in first)
    lost = sum(last[e][0] < first[e][0] for e in first)
    assert changed == f"{gained} / {lost}"
    exact = min(1.0, 2 * sum(math.comb(gained + lost, i) for i in range(min(gained, lost) + 1)) / 2 ** (gained + lost))
    assert float(p.removeprefix("p = ")) == pytest.approx(exact, rel=0.5 if exact < 1e-3 else 0.06)
    value, low, high = map(float, re.findall(r"[-+][\d.]+", difference))
    assert value == pytest.approx(100 * (gained - lost) / 40, abs=0.051)
    half = 1.96 * 100 * np.std([last[e][0] - first[e][0] for e in first]) / math.sqrt(40)
    assert [low, high] == pytest.approx([value - half, value + half], abs=0.3 * half)


def test_pass_at_k_is_in_the_table(folder, made):
    for k in (2, 4):
        cells = made.rows("evaluation")[f"sampled: pass@{k}"]
        for cell, step in ((cells[1], 0), (cells[2], 12)):
            counts = [int(sum(found)) for found in scores(folder, "sampled", step).values()]
            expected = np.mean([1 - math.comb(4 - c, k) / math.comb(4, k) for c in counts])
            assert float(cell.partition("%")[0]) == pytest.approx(100 * expected, abs=0.051)
        assert cells[4] == "–"


HOSTILE = (
    "</script><canary onload=alert(1)>",
    "\"><img src=x onerror=canary()> ' onmouseover=canary() ",
    "<!-- <script>canary</script> ]]> &lt;canary&gt; ${canary} `",
    "\x00\x1b[2J\x07\u202egnp.exe\u2066\u2028\x85",
    "\ud800 lone \udfff",
    "é漢字👩\u200d🚀 \t\n ok",
)


def hostile_run(folder: Path) -> Path:
    """Every text that a file can hold is hostile, names of columns and evaluations too."""
    folder.mkdir()
    every = " ".join(HOSTILE)
    metrics = [{"step": 0, "kind": "eval"}, {"step": 1, "kind": "train", "reward": 0.5}, {"step": 2, "kind": "eval"}]
    for record in metrics:
        if record["kind"] == "eval":
            record |= {f"{every}/accuracy": 0.5, f"{every}/items": 2, f"{every}/reward/{every}": 1.0}
        else:
            record |= {f"reward/{every}": 0.2, every: 1.0, "time": {every: 1.0, "rollout": every}}
    samples = [
        {"step": step, "kind": "eval", "eval": every, "example": text, "sample": 0, "prompt": text, "text": text,
         "answer": text, "rewards": {every: 1.0, "x": every}, "score": float(number % 2 == step // 2), "finish": text,
         "tokens": every}
        for step in (0, 2)
        for number, text in enumerate(HOSTILE)
    ]  # fmt: skip
    rollout = {"step": 1, "kind": "rollout", "prompt": [{"role": every, "content": every}], "text": "x" * 100_000}
    jsonl(folder / "metrics.jsonl", metrics)
    jsonl(folder / "samples.jsonl", [*samples, rollout])
    jsonl(folder / "alarms.jsonl", [{"step": 1, "alarm": every, "message": every}])
    (folder / "config.yaml").write_text(json.dumps({"method": every, "model": {"path": every}, "evals": [every]}))
    (folder / "environment.json").write_text(json.dumps([{"started": every, "devices": every, every: every}]))
    return folder


def test_nothing_that_a_model_wrote_becomes_markup(tmp_path, made):
    page = Page(write_report(hostile_run(tmp_path / "<b>canary")))
    comparison = Page(write_comparison([tmp_path / "<b>canary"] * 2, tmp_path / "both.html"))
    harmless = {tag for tag, _ in made.elements}
    for found in (page, comparison):
        assert {tag for tag, _ in found.elements} <= harmless
        assert len(found.scripts) == 2
        for _, attributes in found.elements:
            assert not any(name.startswith("on") or name in ("src", "canary", "srcdoc") for name in attributes)
            assert attributes.get("href", "#").startswith("#")
        assert "canary onload=alert(1)" in found.text
        seen = found.text + "".join(found.data["texts"])
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", seen)
    assert "\u241b[2J" in page.text
    assert "⟨U+202E⟩gnp.exe" in page.text
    assert HOSTILE[-1] in page.data["texts"], "what is harmless stays as it is"


def test_huge_texts_are_cut_and_the_rest_is_counted(tmp_path):
    page = Page(write_report(hostile_run(tmp_path / "run")))
    (long,) = [text for text in page.data["texts"] if text.startswith("xxx")]
    assert len(long) < 4100
    assert long.endswith("(96,000 more characters)")


def test_the_page_asks_for_nothing_from_outside(folder, made):
    text = (folder / "report.html").read_text()
    assert not re.search(r"(?i)https?:|//[a-z]|url\(|@import|\bsrc=|<link|<iframe|fetch\(|XMLHttp|import\(", text)
    (policy,) = [a["content"] for tag, a in made.elements if a.get("http-equiv") == "Content-Security-Policy"]
    seal = base64.b64encode(hashlib.sha256(made.scripts[1].encode()).digest()).decode()
    assert policy.startswith("default-src 'none'")
    assert f"script-src 'sha256-{seal}'" in policy
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|Function\(", made.scripts[1])


def test_the_same_folder_gives_the_same_bytes(folder, tmp_path):
    shutil.copytree(folder, tmp_path / folder.name)
    first = write_report(folder).read_bytes()
    assert write_report(tmp_path / folder.name).read_bytes() == first


def test_a_run_in_progress_with_torn_and_broken_lines(folder, tmp_path):
    run = tmp_path / "torn"
    shutil.copytree(folder, run)
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + '{"step": 13, "kind": "tr')
    rows = lines(run / "samples.jsonl")
    right = next(i for i, r in enumerate(rows) if r.get("eval") == "strict" and r["step"] == 12 and r["score"] == 1)
    samples = (run / "samples.jsonl").read_bytes().splitlines(keepends=True)
    samples[3], samples[right] = b"not json\n", b"\xff\xfe\n"
    (run / "samples.jsonl").write_bytes(b"".join(samples) + b'{"step": 13')
    (run / "alarms.jsonl").write_text("[" * 100_000 + "\n")
    (run / "environment.json").write_text("{")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("steps: 12", "steps: 50"))
    page = Page(write_report(run))
    assert len(page.data["samples"]) == len(samples) - 2
    assert "12 of 50 steps (in progress, or stopped)" in page.text
    for notice in (
        "metrics.jsonl ends in the middle of line",
        "samples.jsonl ends in the middle of line",
        f"samples.jsonl: 2 lines cannot be read and are left out (line 4, {right + 1}).",
        "alarms.jsonl: 1 lines cannot be read",
        "environment.json cannot be read",
        "the table counts samples",  # a right answer of the last evaluation is gone
    ):
        assert notice in page.text, notice


def test_a_run_that_has_hardly_begun(tmp_path):
    run = tmp_path / "new"
    run.mkdir()
    (run / "metrics.jsonl").write_text("")
    assert "0 steps" in Page(write_report(run)).text
    write_run(tmp_path / "first", steps=0, items=5)
    page = Page(write_report(tmp_path / "first"))
    assert page.rows("evaluation")["strict"][2:] == ["–"] * 4
    (tmp_path / "first" / "samples.jsonl").unlink()
    page = Page(write_report(tmp_path / "first"))
    assert "%" in page.rows("evaluation")["strict"][1], "from metrics.jsonl alone"


def test_a_supervised_run(tmp_path):
    run = tmp_path / "sft"
    run.mkdir()
    records = [{"step": s, "kind": "train", "loss": 3 / s, "grad_norm": 1.0, "lr": 1e-5, "odd": 7.0,
                "time": {"seconds_per_update": 2.0, "tokens_per_second": 50.0}} for s in range(1, 9)]  # fmt: skip
    evals = [{"step": s, "kind": "eval", "loss": 4.0 - s / 4, "accuracy": 0.5, "best/loss": 9.9} for s in (0, 4, 8)]
    jsonl(run / "metrics.jsonl", [evals[0], *records[:4], evals[1], *records[4:], evals[2]])
    jsonl(run / "samples.jsonl", [{"step": s, "prompt": "Hi", "text": f"Ho {s}"} for s in (0, 4, 8)])
    (run / "config.yaml").write_text("method: sft\nmodel: {path: m}\ndata: {train: [{path: a.jsonl}]}\n")
    page = Page(write_report(run))
    assert page.rows("held out")["loss"] == ["4.0000", "2.0000", "-2.0000"]
    assert "sft of m on a.jsonl in 16s" in page.text
    assert [page.data["texts"][row[5]] for row in page.data["samples"]] == ["Ho 0", "Ho 4", "Ho 8"]
    titles = {a["aria-label"] for tag, a in page.elements if tag == "svg"}
    assert titles == {"loss", "gradient norm", "learning rate", "odd", "seconds per update", "tokens per second",
                      "held-out accuracy"}  # fmt: skip


def test_curves_hold_every_record(folder, made):
    records = [r for r in lines(folder / "metrics.jsonl") if r["kind"] == "train"]
    titles = [a["aria-label"] for tag, a in made.elements if tag == "svg"]
    charts = dict(zip(titles, made.data["charts"], strict=True))
    for title, label, key in (
        ("reward", "reward", "reward"),
        ("KL, nats a token", "from the reference", "kl"),
        ("reward by component", "ended", "reward/ended"),
        ("groups", "without variance", "zero_variance_groups"),
        ("clipped tokens", "high", "clip_high"),
    ):
        (points,) = [points for name, points in charts[title]["series"] if name == label]
        assert [p[0] for p in points] == [r["step"] for r in records]
        np.testing.assert_allclose([p[1] for p in points], [r[key] for r in records], rtol=1e-5)
    areas = dict(charts["seconds of a step"]["series"])
    assert list(areas) == ["rollout", "reward", "reference", "learner", "other"]
    named = {s[0] for c in charts.values() for s in c["series"]}
    assert {"strict", "lenient", "sampled"} <= named


def row(step: int, name: str, example: int, score: float, finish: str = "stop", **more: Any) -> dict[str, Any]:
    text = {"prompt": f"Q{example}", "text": "t", "answer": "a", "rewards": {}, "tokens": 1, "sample": 0}
    head = {"step": step, "kind": "eval", "eval": name, "example": example, "score": score, "finish": finish}
    return head | text | more


def test_a_gain_is_taken_apart_item_by_item(tmp_path):
    """Six items by hand: there but cut off, cut off and wrong, wrong, kept, lost in form, lost."""
    strict = [(0, 1), (0, 1), (0, 1), (1, 1), (1, 0), (1, 0)]
    lenient = [(1, 1), (0, 1), (0, 1), (1, 1), (1, 1), (1, 0)]
    cut = [("length", "stop"), ("length", "stop"), ("stop", "stop"), ("stop",) * 2, ("stop", "length"), ("stop",) * 2]
    samples, records = [], []
    for when, step in enumerate((0, 9)):
        record: dict[str, Any] = {"step": step, "kind": "eval"}
        for name, found in (("strict", strict), ("lenient", lenient), ("elsewhere", lenient), ("four", strict)):
            record |= {f"{name}/accuracy": sum(f[when] for f in found) / 6, f"{name}/items": 6}
        records.append(record)
        for e in range(6):
            samples.append(row(step, "strict", e, strict[e][when], cut[e][when]))
            samples.append(row(step, "lenient", e, lenient[e][when], cut[e][when]))
            samples.append(row(step, "elsewhere", e, lenient[e][when], prompt="another problem of that number"))
            samples += [row(step, "four", e, float(e == 1 and s == 3), sample=s) for s in range(4)]
    jsonl(tmp_path / "metrics.jsonl", records)
    jsonl(tmp_path / "samples.jsonl", samples)
    found = evaluations(read_run(tmp_path))
    apart = gain(found[0], found)
    assert apart.laxer == ["lenient"], "items are told apart by their prompts too"
    assert {c.before.example: c.kind for c in apart.changes} == {
        "0": "there, not counted", "1": "cut off", "2": "wrong", "4": "lost: form", "5": "lost: wrong"
    }  # fmt: skip
    assert apart.total.value == pytest.approx(1 / 6)
    assert apart.being_right.value == pytest.approx(1 / 6)
    assert apart.in_time.value == pytest.approx(0.0)
    page = Page(write_report(tmp_path))
    assert "1 of 3 items that became right had a right answer among the samples of four" in page.text
    assert len(page.data["changes"]) == 5
    assert gain(found[1], found).laxer == [], "the stricter one is not laxer"
    assert gain(found[3], found) is None, "several samples an item are not paired"


def test_runs_side_by_side(folder, tmp_path, capsys):
    other = write_run(tmp_path / "other", seed=5, steps=6, total=12, eval_every=6, items=40, groups=2, lr=3e-6)
    out = tmp_path / "both.html"
    assert cli.main(["report", str(folder), str(other), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    page = Page(out)
    runs, results = page.tables_by("run")
    assert [row[3] for row in runs[1:]] == ["12 of 12 steps", "6 of 12 steps (in progress, or stopped)"]
    assert [row[:2] for row in results[1:]] == [
        [name, e] for name in ("demo", "other") for e in ("strict", "lenient", "sampled")
    ]
    (paired,) = page.tables_by("runs")
    mine, theirs = scores(folder, "strict", 12), scores(other, "strict", 6)
    gained = sum(theirs[e][0] > mine[e][0] for e in mine)
    lost = sum(theirs[e][0] < mine[e][0] for e in mine)
    assert [paired[1][i] for i in (0, 1, 2, 4)] == ["other against demo", "strict", "40", f"{gained} / {lost}"]
    (settings,) = page.tables_by("setting")
    assert settings[1:] == [["optim.lr", "1e-05", "3e-06"]]
    reward = page.data["charts"][[a["aria-label"] for t, a in page.elements if t == "svg"].index("reward: reward")]
    assert [(label, len(points)) for label, points in reward["series"]] == [("demo", 12), ("other", 6)]


def test_the_command_writes_into_the_run(folder, tmp_path, capsys):
    assert cli.main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"wrote {folder / 'report.html'}\n"
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "holds no metrics.jsonl" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_a_page_too_large_keeps_ends_and_says_so(folder):
    page = Page(write_report(folder, "small.html", budget=90_000))
    total = len(lines(folder / "samples.jsonl"))
    kept = page.data["samples"]
    assert 0 < len(kept) < total
    assert f"{len(kept):,} of {total:,} samples; the others are in samples.jsonl." in page.text
    steps = {(page.data["sources"][k[1]], k[0]) for k in kept}
    assert {("strict", 0), ("strict", 12), ("rollout", 1), ("rollout", 12)} <= steps
    tiny = Page(write_report(folder, "small.html", budget=2000))
    assert 0 < len(tiny.data["samples"]) < 20


def test_an_answer_that_used_up_its_turns_was_cut_off(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    ends = ("stop", "length", "turns")
    jsonl(tmp_path / "samples.jsonl", [{"step": 1, "kind": "rollout", "finish": end} for end in ends])
    assert [sample.truncated for sample in read_run(tmp_path).samples] == [False, True, True]


def test_columns_of_a_reward_are_no_evaluations(tmp_path):
    """Whatever they are called."""
    columns = {f"held_out/reward/{name}": 0.3 for name in ("accuracy", "loss", "items", "brief/accuracy")}
    found = {"held_out/accuracy": 0.5, "held_out/low": 0.4, "held_out/high": 0.6, "held_out/items": 9.0, **columns}
    jsonl(tmp_path / "metrics.jsonl", [{"step": step, "kind": "eval", **found} for step in (0, 5)])
    run = read_run(tmp_path)
    assert [one.name for one in evaluations(run)] == evaluation_names(run.evals) == ["held_out"]
    assert means(run, evaluations(run)) == []
