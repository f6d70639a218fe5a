"""Searches from a preset: on a toy policy and on a tiny model, through the command line; what bad input leads to."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from jaxpost import cli, config_io
from jaxpost.assemble import search_policy
from jaxpost.assemble.search import search
from jaxpost.assemble.search_folder import Book
from jaxpost.assemble.search_policy import Engines, Loaded
from jaxpost.assemble.search_prompts import make_questions
from jaxpost.cli_search import prompt_flags
from jaxpost.config_check_search import check_search
from jaxpost.config_flags import apply_flags
from jaxpost.report.search import write_search
from jaxpost.search.contract import Verdict
from tests.search.toy import ToyPolicy, ToyVerifier

TINY = """
method: search
prompts: {kind: arithmetic, high: 9}
count: 3
search: {kind: best_of_n, n: 3, max_tokens: 6}
"""


def digits(text):
    """After a prompt one digit, then the end: the answer is 4 or 7."""
    return {"4": 0.5, "7": 0.5} if not text[-1:].isdigit() or text.endswith("+9") else {"$": 1.0}


class Toys(Engines):
    """A toy policy in the place of the models."""

    def __init__(self, table=digits, judge=lambda text: float(text == "7"), verifier=None, price=0):
        super().__init__()
        self.policy_, self.verifier = ToyPolicy(table), verifier or ToyVerifier(judge, price=price)
        self.loads = 0

    def load(self, config, questions):
        self.loads += 1
        return Loaded(self.policy_, {"verifier": self.verifier})


def config_of(tmp_path, *flags, text=TINY):
    flags = [*prompt_flags(flags), "--run.dir", str(tmp_path / "run")]
    return check_search(apply_flags(config_io.loads(text), flags))


def prompts_file(tmp_path, rows, name="prompts.jsonl"):
    path = tmp_path / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def rows_of(folder: Path, name="results.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


ROWS = [{"prompt": "1+1?", "answer": "7"}, {"prompt": "1+2?", "answer": "4"}, {"prompt": "1+3?", "answer": "7"}]


def test_results_say_what_was_found_what_it_cost_and_whether_it_is_right(tmp_path):
    config = config_of(tmp_path, "--prompts", prompts_file(tmp_path, ROWS), "--search.n", "8", "--count", "null")
    result = search(config, engines=Toys(price=1), command=["jaxpost", "search", "p.yaml"])
    rows = rows_of(result.folder)
    assert [row["answer"] for row in rows] == ["7", "7", "7"]
    assert [row["right"] for row in rows] == [True, False, True]
    assert [row["gold"] for row in rows] == ["7", "4", "7"]
    for row in rows:
        assert (row["generated"], row["verified"]) == (16, 16)
        assert row["score"] == 1.0
        assert len(row["candidates"]) == 8
        assert row["warnings"] == []
    assert result.numbers["top1"][0] == pytest.approx(2 / 3, abs=1e-6)
    assert result.numbers["any"][0] == 1.0
    assert {"pass@1", "pass@8"} <= set(result.numbers)
    assert result.numbers["spent"] == 96
    assert result.told[0].startswith("right: 66.7%")
    folder = {path.name for path in result.folder.iterdir()}
    wanted = {"config.yaml", "environment.json", "results.jsonl", "trees.jsonl", "metrics.jsonl", "summary.json"}
    assert wanted | {"README.md"} <= folder
    measured = rows_of(result.folder, "metrics.jsonl")
    assert [record["step"] for record in measured] == [1, 2, 3]
    assert measured[-1]["generated"] == 48
    assert config_io.load(result.folder / "config.yaml") == config


def test_a_search_goes_on_where_it_stopped_and_ends_with_the_same_files(tmp_path):
    path = prompts_file(tmp_path, ROWS)
    whole = search(config_of(tmp_path / "a", "--prompts", path), engines=Toys())
    config = config_of(tmp_path / "b", "--prompts", path)
    engines = Toys()
    part = search(config, engines=engines)
    results = part.folder / "results.jsonl"
    lines = results.read_text().splitlines(keepends=True)
    results.write_text(lines[1] + lines[0][:20])  # one result, and a torn line
    again = search(config, engines=engines)
    assert (again.folder / "results.jsonl").read_text() == (whole.folder / "results.jsonl").read_text()
    assert (again.folder / "trees.jsonl").read_text() == (whole.folder / "trees.jsonl").read_text()
    assert again.numbers == whole.numbers
    loads = engines.loads
    search(config, engines=engines)
    assert engines.loads == loads, "nothing is loaded where everything is there"


def test_another_prompt_in_the_same_folder_is_told(tmp_path):
    search(config_of(tmp_path, "--prompts", prompts_file(tmp_path, ROWS)), engines=Toys())
    changed = prompts_file(tmp_path, [{"prompt": "3+3?"}, *ROWS[1:]])
    with pytest.raises(ValueError, match="prompt 0 was another one then; choose another"):
        search(config_of(tmp_path, "--prompts", changed), engines=Toys())


def test_rows_that_cannot_be_asked_are_told_and_the_others_go_on(tmp_path):
    bad = ['{"prompt": 3}', "{torn"]
    bad += ['{"prompt": "a", "sampling": {"temprature": 1}}', '{"prompt": "a", "sampling": {"max_new_tokens": 9}}']
    bad += ['{"prompt": "a", "prompt": "b"}', '{"prompt": "a", "more": ' + "[" * 9999 + "]" * 9999 + "}"]
    config = config_of(
        tmp_path, "--prompts", prompts_file(tmp_path, [*bad, *ROWS]), "--search.n", "9", "--count", "null"
    )
    result = search(config, engines=Toys())
    rows = rows_of(result.folder)
    said = ['a row needs "prompt"', "not JSON", "temprature", "max_tokens: the search decides that"]
    said += ["twice", "not JSON"]
    assert all(words in row["error"] and f"prompts.jsonl:{i + 1}" in row["error"]
               for i, (words, row) in enumerate(zip(said, rows[:6], strict=True)))  # fmt: skip
    assert [row["answer"] for row in rows[6:]] == ["7", "7", "7"]
    assert result.failed == 6


FAULTS = {
    "NaN": (lambda text: float("nan") if text else 1.0, "it said NaN"),
    "says too little": (lambda cases: [], "gave 0 verdicts on"),
    "raises": (lambda cases: 1 // 0, "'verifier' raised ZeroDivisionError: "),
    "infinite": (lambda text: float("inf") if text else 1.0, "it said inf"),
    "NaN of a step": (lambda cases: [Verdict(0.5, steps=(0.5, float("nan"))) for _ in cases], "it said NaN"),
    "words": (lambda cases: ["I cannot say" for _ in cases], "I cannot say"),
    "lists": (lambda cases: [[1.0] for _ in cases], "it gave a list, which is no verdict"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_verifier_that_fails_is_a_sentence_in_the_row(tmp_path, fault):
    judge, said = FAULTS[fault]
    whole = fault not in ("NaN", "infinite")
    engines = Toys(judge=(lambda text: 0.0) if whole else judge)
    if whole:
        engines.verifier.__class__ = type("Bad", (ToyVerifier,), {"__call__": lambda self, cases: judge(cases)})
    result = search(config_of(tmp_path, "--prompts", prompts_file(tmp_path, ROWS)), engines=engines)
    assert all(said in row["error"] for row in result.rows)
    assert all(row["answer"] in ("4", "7") for row in result.rows), "what was drawn stays"


@pytest.mark.parametrize("fault", ["NaN", "raises", "short"])
def test_a_verifier_that_fails_on_one_prompt_leaves_the_others(tmp_path, fault):
    """Those have its plain numbers as their scores."""

    class Picky(ToyVerifier):
        def __call__(self, cases):
            bad = [c.problem.number == 1 for c in cases]
            if fault == "raises" and any(bad):
                raise RuntimeError("no")
            return [float("nan") if b else 1 for b in bad if not (b and fault == "short")]

    path = prompts_file(tmp_path, ROWS)
    result = search(config_of(tmp_path, "--prompts", path), engines=Toys(verifier=Picky(lambda text: 0.0)))
    assert ["error" in row for row in result.rows] == [False, True, False]
    assert [row["score"] for row in result.rows if "error" not in row] == [1.0, 1.0]


def test_answers_that_the_methods_own_limit_cut_are_not_blamed_on_the_budget(tmp_path):
    config = config_of(tmp_path, "--prompts", prompts_file(tmp_path, ROWS), "--search.max_tokens", "2", "--budget", "5")
    result = search(config, engines=Toys(table=lambda text: {"4": 1.0}))
    assert [row.get("error") for row in result.rows] == [None] * 3
    assert all(row["answer"] == "44" and row["refused"] for row in result.rows)
    few = config_of(tmp_path / "few", "--prompts", prompts_file(tmp_path, ROWS), "--budget", "5")
    result = search(few, engines=Toys(table=lambda text: {"4": 1.0}))
    assert all("too small for one whole answer" in row["error"] for row in result.rows)


def test_a_kill_between_a_tree_and_its_row_loses_neither(tmp_path, monkeypatch):
    path = prompts_file(tmp_path, ROWS)
    whole = search(config_of(tmp_path / "a", "--prompts", path), engines=Toys())
    append, calls = Book._append, []

    def killed(self, name, row):
        calls.append(name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        append(self, name, row)

    config = config_of(tmp_path / "b", "--prompts", path)
    monkeypatch.setattr(Book, "_append", killed)
    with pytest.raises(KeyboardInterrupt):
        search(config, engines=Toys())
    monkeypatch.undo()
    again = search(config, engines=Toys())
    for name in ("results.jsonl", "trees.jsonl"):
        assert (again.folder / name).read_text() == (whole.folder / name).read_text()


def test_separators_of_lines_within_a_row_and_a_byte_order_mark_are_text(tmp_path):
    path = tmp_path / "q.jsonl"
    rows = [json.dumps({"prompt": "1+1?\u2028\u0085 ok"}, ensure_ascii=False), json.dumps({"prompt": "1+2?"})]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode())
    questions = make_questions(config_of(tmp_path, "--prompts", str(path)))
    assert [(q.error, q.prompt) for q in questions] == [(None, "1+1?\u2028\u0085 ok"), (None, "1+2?")]
    path.write_bytes(b"1+1?\xff")
    with pytest.raises(ValueError, match=r"q.jsonl is no text in UTF-8 \(byte 4\)"):
        make_questions(config_of(tmp_path, "--prompts", str(path)))


def test_a_budget_too_small_is_a_sentence(tmp_path):
    config = config_of(tmp_path, "--prompts", prompts_file(tmp_path, ROWS), "--budget", "1")
    result = search(config, engines=Toys())
    assert all("a budget of 1 tokens is too small" in row["error"] for row in result.rows)
    assert result.numbers["spent"] <= 3


def test_an_empty_tree_is_a_sentence(tmp_path):
    config = config_of(tmp_path, "--prompts", prompts_file(tmp_path, ROWS), "--budget", "1")
    result = search(config, engines=Toys(price=9))
    assert all(row["answer"] is None and row["error"] for row in result.rows)
    page = write_search(result.folder).read_text()
    assert "too small" in page


def test_a_separator_that_never_appears_ends_in_whole_answers(tmp_path):
    flags = ["--search.kind", "step_beam", "--search.width", "4", "--search.factor", "2", "--search.separator", "zzz"]
    result = search(config_of(tmp_path, "--prompts", prompts_file(tmp_path, ROWS), *flags), engines=Toys())
    assert [row["answer"] for row in result.rows] == ["7", "7", "7"]
    said = "the separator 'zzz' never appeared"
    assert all(said in row["warnings"][0] for row in result.rows)
    assert result.told[-1].startswith(f"3 of 3 prompts: {said}")


COMMANDS = {
    "missing file": (["--prompts", "none.txt"], "none.txt does not exist: --prompts names a file of prompts"),
    "empty file": (["--prompts", "empty.txt"], "empty.txt holds no prompt"),
    "unknown key": (["--serch.n", "3"], "did you mean search?"),
    "unknown method": (["--search.kind", "bestofn"], "did you mean best_of_n?"),
    "unknown verifier": (["--verifier.parts", "[{kind: moddel}]"], "did you mean model?"),
    "no reward model": (
        ["--verifier.parts", "[{kind: model, path: nowhere/at/all}]", "--count", "1"],
        "verifier.parts.0 (model)",
    ),
    "no corpus": (["--verifier.parts", "[{kind: fact, path: none.txt}]", "--count", "1"], "none.txt: no such corpus"),
    "nothing at a time": (
        ["--search.kind", "mcts", "--search.leaves", "0"],
        "search.leaves is 0; it must be at least 1",
    ),
    "letters of a line break": (
        ["--search.kind", "dvts", "--search.separator", "\\n\\n"],
        "a backslash and a letter where a line break is meant",
    ),
    "a share": (["--search.kind", "rstar", "--search.given", "2"], "search.given is 2; it is a share"),
    "within a method": (
        ["--search", "{kind: metacognition, dear: {kind: step_beam, width: 3}}"],
        "search: width is 3 and factor is 4",
    ),
    "contradiction": (["--search.kind", "self_consistency", "--search.keep", "0"], "search: keep is 0"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_what_the_user_gave_wrong_is_one_sentence_and_exit_code_2(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "p.yaml").write_text(TINY)
    monkeypatch.setattr(search_policy.Engines, "_policy", lambda self, config: ToyPolicy(digits))
    flags, said = COMMANDS[name]
    assert cli.main(["search", "p.yaml", *flags]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "Traceback" not in told


def test_commands_for_other_methods_presets_say_where_to_go(tmp_path, capsys):
    (tmp_path / "s.yaml").write_text(TINY)
    (tmp_path / "t.yaml").write_text("method: sft\ndata: {train: [{path: a.jsonl}]}\n")
    assert cli.main(["train", str(tmp_path / "s.yaml")]) == 2
    assert "jaxpost search PRESET" in capsys.readouterr().err
    assert cli.main(["search", str(tmp_path / "t.yaml")]) == 2
    assert "`jaxpost train` runs it" in capsys.readouterr().err
    assert cli.main(["search"]) == 2
    assert "search needs a preset" in capsys.readouterr().err


def test_a_search_of_a_real_engine_through_the_command_line(tiny_model, tmp_path, monkeypatch, capsys):
    """A rule judges what a tiny model draws; a row's own sampling parameters count; the exit code tells of failures."""
    monkeypatch.setenv("JAXPOST_CACHE", str(tmp_path / "cache"))
    preset = tmp_path / "p.yaml"
    preset.write_text(TINY)
    rows = [{"prompt": "1+1?", "answer": "2"}, {"prompt": "2+2?", "answer": "4", "sampling": {"temperature": 0}}]
    rule = "[{kind: rule, reward: {parts: [{kind: script}], workers: 1}}]"
    flags = ["--model.path", str(tiny_model), "--prompts", prompts_file(tmp_path, [*rows, "{torn"])]
    flags += ["--verifier.parts", rule, "--engine", "{rows: 8}", "--run.dir", str(tmp_path / "run"), "--budget", "40"]
    assert cli.main(["search", str(preset), *flags]) == 1
    found = rows_of(tmp_path / "run")
    assert [("error" in row) for row in found] == [False, False, True]
    for row in found[:2]:
        scores = [c["score"] for c in row["candidates"]]
        assert row["score"] == max(scores)
        assert row["generated"] + row["verified"] <= 40
    texts = [
        {n["text"] for n in tree["nodes"] if n["parent"] is not None}
        for tree in rows_of(tmp_path / "run", "trees.jsonl")
    ]
    assert len(texts[0]) > 1
    assert len(texts[1]) == 1, "at temperature 0 all answers are one"
    told = capsys.readouterr()
    assert "right:" in told.out
    assert "1 of 3 prompts failed" in told.out
    assert "tok/s" in told.err
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count('<svg xmlns="http://www.w3.org/2000/svg" class="tree"') == 2
    for part in page.split('<div class="forest">')[1:]:
        ET.fromstring(part.split("</svg>")[0] + "</svg>")


def test_curves_of_methods_and_allocators_with_intervals(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(search_policy.Engines, "_policy", lambda self, config: ToyPolicy(digits, seed=config.run.seed))
    path = prompts_file(tmp_path, [{"prompt": f"1+{i}?", "answer": "47"[i % 2]} for i in range(8)])
    presets = []
    for name, kind in (("greedy", "greedy"), ("vote", "self_consistency"), ("plain", "allocate")):
        presets.append(str(tmp_path / f"{name}.yaml"))
        Path(presets[-1]).write_text(f"method: search\nsearch: {{kind: {kind}}}\nrun: {{name: {name}}}\n")
    rule = "[{kind: rule, reward: {parts: [{kind: math}], workers: 1}}]"
    out = str(tmp_path / "curve")
    flags = ["--prompts", path, "--verifier.parts", rule, "--out", out, "--budgets", "4", "300", "--seeds", "2"]
    code = cli.main(["search-curve", *presets, *flags])
    lines = rows_of(tmp_path / "curve", "curve.jsonl")
    by_kind = {kind: [line for line in lines if line["kind"] == kind] for kind in ("method", "optimal", "allocator")}
    assert {line["method"] for line in by_kind["method"]} == {"greedy", "vote", "plain"}
    assert [len(found) for found in by_kind.values()] == [6, 2, 2]
    for line in lines:
        value, low, high = line["accuracy"]
        assert 0 <= low <= value <= high <= 1
        assert line["tokens"][0] <= line["budget"]
    assert code == int(any(line.get("failed") for line in lines))
    told = capsys.readouterr().out
    assert "| vote | 300 |" in told
    assert "compute-optimal at 300" in told
    svg = ET.fromstring((tmp_path / "curve" / "curve.svg").read_text())
    assert len(svg.findall(".//{*}polyline")) == 5, "three methods, compute-optimal, the allocator"
    assert "compute-optimal" in (tmp_path / "curve" / "report.html").read_text()


CURVES = {
    "no budget": ([], "has no budget"),
    "bad budget": (["--budgets", "0"], "a budget is at least 1 token"),
    "same name": (["--budgets", "9", "--run.name", "x"], "each needs a run.name of its own"),
}


@pytest.mark.parametrize("name", CURVES)
def test_curves_that_cannot_be_drawn(name, tmp_path, capsys):
    flags, said = CURVES[name]
    paths = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    for path in paths:
        path.write_text(TINY + f"run: {{name: {path.stem}}}\n")
    assert cli.main(["search-curve", *map(str, paths), "--out", str(tmp_path / "out"), *flags]) == 2
    assert said in capsys.readouterr().err
