"""Searches from a preset: on a toy policy and on a tiny model, through the command line; what bad input leads to."""

import json
from pathlib import Path

import pytest

from jaxpost import cli

TINY = """
method: search
model: {path: MODEL}
prompts: {kind: arithmetic, high: 9}
count: 3
search: {kind: best_of_n, n: 3, max_tokens: 6}
verifier: {parts: [{kind: rule, reward: {parts: [{kind: script}], workers: 1}}]}
engine: {rows: 8, together: 2}
run: {dir: DIR}
"""


@pytest.fixture
def preset(tiny_model, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("JAXPOST_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "p.yaml"
    path.write_text(TINY.replace("MODEL", str(tiny_model)).replace("DIR", str(tmp_path / "run")))
    return path


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_best_of_n_with_a_rule_through_the_command_line(preset, tmp_path, capsys):
    assert cli.main(["search", str(preset), "--budget", "40"]) == 0
    folder = tmp_path / "run"
    rows = rows_of(folder)
    assert [row["index"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert row["score"] == max(c["score"] for c in row["candidates"] if c["complete"] or True)
        assert row["generated"] + row["verified"] <= 40
    told = capsys.readouterr()
    assert "right:" in told.out
    assert (folder / "report.html").is_file()
