"""Statistics over seeds against tables and hand computation; the comparison's book-keeping on made-up runs."""

import json
import math
from pathlib import Path

import pytest
from scipy import stats

from jaxpost.recipes.lab import comparison as lab
from jaxpost.recipes.lab.statistics import over_seeds, paired, t_inside, t_quantile


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 10, 29, 120])
def test_student_against_scipy(freedom):
    for inside in (0.5, 0.9, 0.95, 0.999):
        assert t_quantile(freedom, inside=inside) == pytest.approx(stats.t.ppf((1 + inside) / 2, freedom), rel=1e-9)
    for t in (0.0, 0.3, 2.0, 30.0):
        assert t_inside(t, freedom) == pytest.approx(1 - 2 * stats.t.sf(t, freedom), abs=1e-12)


def test_mean_over_seeds_by_hand():
    # mean 3, s^2 = (4 + 1 + 0 + 1 + 4) / 4 = 2.5, t(4) = 2.776445 (any table): half = 2.776445 * sqrt(2.5 / 5)
    found = over_seeds([1, 2, 3, 4, 5])
    assert found.mean == 3
    assert found.count == 5
    assert found.half == pytest.approx(2.776445 * math.sqrt(0.5), rel=1e-6)
    assert (found.low + found.high) / 2 == pytest.approx(3)
    one = over_seeds([0.25])
    assert one.mean == 0.25
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    with pytest.raises(ValueError, match="no values"):
        over_seeds([])


def test_paired_differences_by_hand():
    # Differences 0.1 and 0.3 over the seeds 1 and 2 that both have: mean 0.2, s = 0.1 sqrt 2, t(1) = 12.7062.
    found = paired({0: 9.0, 1: 0.4, 2: 0.2}, {1: 0.5, 2: 0.5, 3: 9.0})
    assert found.mean == pytest.approx(0.2)
    assert found.count == 2
    assert found.half == pytest.approx(12.7062 * 0.1, rel=1e-5)
    assert paired({0: 1.0}, {1: 1.0}) is None


AFTER = {("grpo", 0): 0.5, ("grpo", 1): 0.7, ("rloo", 0): 0.6, ("rloo", 1): 0.8}


def cell(method: str, seed: int, folder: Path | None = None) -> lab.Cell:
    after = AFTER[method, seed]
    return lab.Cell(method, seed, {"greedy": 0.4}, {"greedy": after}, 100, 1000 + seed, 7, 2.0, {"sum": after})


def cells(methods=("grpo", "rloo"), seeds=(0, 1)) -> list[lab.Cell]:
    return [cell(method, seed) for seed in seeds for method in methods]


def test_rows_by_hand():
    first, second = lab.summarise(cells(), "greedy")
    assert (first.method, first.seeds, second.method) == ("grpo", (0, 1), "rloo")
    assert first.after.mean == pytest.approx(0.6)
    # s = 0.1 sqrt 2 over two seeds: half = 12.7062 * 0.1.
    assert first.after.half == pytest.approx(1.27062, rel=1e-5)
    assert first.against_first is None
    # Seed by seed the difference is 0.1 each time, so that its interval is a point although the seeds differ by 0.2.
    assert second.against_first.mean == pytest.approx(0.1)
    assert second.against_first.half == pytest.approx(0, abs=1e-9)
    assert second.gain.mean == pytest.approx(0.3)
    assert second.tokens.mean == 1000.5
    assert second.tasks == {"sum": pytest.approx(0.7)}


def test_the_table_is_markdown_with_every_method(tmp_path):
    rows = lab.summarise(cells(), "greedy")
    text = lab.table(rows, title="Two methods")
    lines = text.splitlines()
    assert lines[0] == "Two methods"
    head, rule, *body = lines[2:]
    assert head.startswith("| method | seeds | before | after | gain | against grpo |")
    assert len(body) == 2
    assert {line.count("|") for line in (head, rule, *body)} == {head.count("|")}
    assert "| rloo | 2 | 40.0% | 70.0% ± 127.1 | +30.0 ± 127.1 | +10.0 ± 0.0 | 100 |" in body[1]
    lab.write_table(tmp_path, lab.summarise(cells(seeds=(0,)), "greedy"), text, {"model": "m"})
    kept = json.loads((tmp_path / "table.json").read_text())
    assert kept["rows"][1]["after"] == {"mean": 0.6, "low": None, "high": None, "count": 1}
    assert (tmp_path / "table.md").read_text() == text + "\n"


def test_finished_cells_are_not_run_again(tmp_path):
    identity = {"model": "m", "methods": {"grpo": {"lr": 1}, "rloo": {"lr": 1}}}
    ran: list[tuple[str, int]] = []

    def run(method: str, seed: int, folder: Path) -> lab.Cell:
        if (method, seed) == ("rloo", 1) and len(ran) < 4:
            ran.append(("killed", seed))
            raise KeyboardInterrupt
        ran.append((method, seed))
        return cell(method, seed)

    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        lab.run_cells(["grpo", "rloo"], [0, 1], run, tmp_path, identity=identity, say=said.append)
    found = lab.run_cells(["grpo", "rloo"], [0, 1], run, tmp_path, identity=identity, say=said.append)
    assert ran == [("grpo", 0), ("rloo", 0), ("grpo", 1), ("killed", 1), ("rloo", 1)]
    assert found == cells()
    assert said[0] == "grpo, seed 0: cell 1 of 4"
    assert "left" in said[1]
    assert said[-1] == "rloo, seed 1: cell 1 of 1"


def test_cells_of_another_comparison_are_refused(tmp_path):
    run = lambda method, seed, folder: cell(method, seed)  # noqa: E731
    identity = {"model": "m", "methods": {"grpo": {"lr": 1}, "rloo": {"lr": 1}}}
    lab.run_cells(["grpo"], [0], run, tmp_path, identity=identity, say=lambda text: None)
    other = {"model": "m", "methods": {"grpo": {"lr": 2}}}
    with pytest.raises(ValueError, match=r"result.json is of another comparison \(methods differ\)"):
        lab.run_cells(["grpo"], [0], run, tmp_path, identity=other, say=lambda text: None)
    # Another method's settings do not matter to this one's cells.
    more = {"model": "m", "methods": {"grpo": {"lr": 1}, "rloo": {"lr": 5}}}
    assert lab.run_cells(["grpo"], [0], run, tmp_path, identity=more, say=lambda text: None) == [cell("grpo", 0)]
