"""What people look at: the console, the curves, the meters."""

from __future__ import annotations

import io
import itertools
import math
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from jaxpost.metrics.charts import ticks
from jaxpost.train.curves import draw_curves
from jaxpost.train.meters import PEAK_FLOPS, Meter, peak_flops, peak_memory_gib
from jaxpost.train.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def record(step: int, **more: Any) -> dict[str, Any]:
    spent = {"tokens_per_second": 1234.5, "mfu_percent": 31.4159, "data_wait_percent": 0.2}
    return {"step": step, "kind": "train", "loss": 2.25, "lr": 1e-5, "grad_norm": 0.5, "time": spent, **more}


def test_a_terminal_has_one_moving_line_and_permanent_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "120")
    screen = Terminal()
    progress = Progress(100, stream=screen, log=tmp_path / "log.txt")
    progress.busy("compiling ...")
    progress.update(record(5), 90.0)
    progress.update(record(6), 89.0)
    progress.say("held out: loss 2.1")
    progress.close()
    text = screen.getvalue()
    assert text.count("\n") == 1, "only the permanent line ends"
    line = "step   6/100  eta 1m29s  loss 2.2500  grad 0.5  lr 1e-05  1.23k tok/s  mfu 31%"
    assert f"█░░░░░░░░░░░  {line}\r" in text
    kept = (tmp_path / "log.txt").read_text()
    assert "held out: loss 2.1" in kept
    assert "compiling" not in kept
    assert "\x1b" not in kept


def test_a_narrow_terminal_loses_the_bar_first_and_never_wraps(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    screen = Terminal()
    Progress(10_000, stream=screen).update(record(10, skipped=123), 100_000.0)
    line = screen.getvalue().removeprefix("\r\x1b[K")
    assert line.startswith("step    10/10000  eta 1d03h  loss 2.2500")
    assert len(line) < 80


def test_elsewhere_plain_lines_come_at_intervals_and_at_the_end():
    out = io.StringIO()
    progress = Progress(9, stream=out, interval=3600.0)
    for step in range(1, 10):
        progress.update(record(step, skipped=3), 1.0)
    assert [line.split("  ")[0] for line in out.getvalue().splitlines()] == ["step 1/9", "step 9/9"]
    assert "SKIPPED 3" in out.getvalue()
    assert "\r" not in out.getvalue()
    assert "eta" not in out.getvalue().splitlines()[-1]


def test_other_processes_say_nothing(tmp_path: Path):
    out = Terminal()
    progress = Progress(9, stream=out, enabled=False, log=tmp_path / "log.txt")
    progress.say("a")
    progress.busy("b")
    progress.update(record(9), None)
    progress.close()
    assert out.getvalue() == ""
    assert not (tmp_path / "log.txt").exists()


def curve(svg: str) -> list[list[tuple[float, float]]]:
    lines = [e for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("polyline")]
    return [[tuple(map(float, p.split(","))) for p in e.attrib["points"].split()] for e in lines]


def test_curves_put_points_where_they_belong():
    """A straight line stays straight, falls on the page as it rises in value, and spans the panel."""
    svg = draw_curves([{"step": s, "kind": "train", "loss": 2.0 * s} for s in range(0, 11)], title="a <b> & c")
    (line,) = curve(svg)
    assert (line[0][0], line[-1][0]) == (58.0, 446.0)
    slopes = [(y1 - y0) / (x1 - x0) for (x0, y0), (x1, y1) in itertools.pairwise(line)]
    assert all(s == pytest.approx(slopes[0], abs=0.01) and s < 0 for s in slopes)
    assert "a &lt;b&gt; &amp; c" in svg


def test_curves_leave_out_what_is_not_finite_and_thin_out_long_runs():
    records = [{"step": s, "kind": "train", "loss": math.nan if s % 2 else 1.0, "time": {}} for s in range(9000)]
    lines = curve(draw_curves(records))
    assert 1000 <= len(lines[0]) <= 1500
    assert "nan" not in draw_curves(records)
    ElementTree.fromstring(draw_curves([]))
    one = draw_curves([{"step": 3, "kind": "eval", "held_out/loss": 0.0, "best/held_out/loss": 0.0}])
    assert sum(e.tag.endswith("circle") for e in ElementTree.fromstring(one).iter()) == 2, "the dot and its legend"


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1e-6, 3e-6), (-5, 5), (1234, 1240), (2.0, 2.0)])
def test_ticks_are_few_round_and_inside(low: float, high: float):
    found = ticks(low, high)
    assert len(found) <= 8
    assert all(low - 1e-9 <= t <= high + 1e-9 for t in found)


def test_peaks_are_known_by_the_longest_name():
    def device(kind: str) -> Any:
        return SimpleNamespace(platform="tpu", device_kind=kind, process_index=0)

    # Published per-chip peaks (bfloat16, dense): v5e 197, v5p 459, v6e 918 TFLOP/s.
    assert peak_flops([device("TPU v5 lite")] * 16) == 16 * 197e12
    assert peak_flops([device("TPU v5p")]) == 459e12
    assert peak_flops([device("TPU v6 lite")]) == 918e12
    assert peak_flops([device("NVIDIA H100 80GB HBM3")]) == PEAK_FLOPS["NVIDIA H100"]
    assert peak_flops([device("Abacus")]) is None
    measured = peak_flops(jax.devices())
    assert measured is not None
    assert 1e9 < measured < 1e14


def test_memory_is_the_fullest_devices_peak():
    def device(peak: int) -> Any:
        return SimpleNamespace(process_index=0, memory_stats=lambda: {"peak_bytes_in_use": peak})

    assert peak_memory_gib([device(2**30), device(3 * 2**30)]) == 3.0
    assert 0.05 < peak_memory_gib(jax.devices()) < 100


def test_the_meter_counts_training_time_only(monkeypatch: pytest.MonkeyPatch):
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    meter = Meter(flops_per_token=6.0, peak=120.0)
    with meter.pause():
        clock[0] += 50.0
    clock[0] += 9.0  # the loop hears of an update later than it ended, and of two at once
    meter.add(ended=154.0, waited=1.0, tokens=40, trained=10)
    assert meter.read() == {
        "seconds_per_update": 4.0,
        "tokens_per_second": 10.0,
        "trained_tokens_per_second": 2.5,
        "data_wait_percent": 25.0,
        "mfu_percent": 50.0,
    }
    meter.add(ended=156.0, waited=0.0, tokens=10, trained=10)
    meter.add(ended=158.0, waited=0.0, tokens=30, trained=10)
    assert (meter.read()["tokens_per_second"], meter.seconds_per_update) == (10.0, 8.0 / 3)
