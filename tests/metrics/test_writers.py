"""Metrics on disk: valid JSON whatever the numbers, cut back exactly, drawn by the loggers that were chosen."""

from __future__ import annotations

import json
import math
import resource
import sys
import types
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxpost.metrics.writers import JsonlFile, open_writers, read_metrics, scalars, to_json


def strict_json(text: str) -> Any:
    """Parses JSON as the standard has it: a bare NaN or Infinity is an error."""

    def refuse(name: str) -> float:
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.1, -0.0, 1e-310, np.float32(0.1), np.int64(3)])
def test_every_number_is_valid_json_and_comes_back(tmp_path: Path, value: Any):
    record = {"step": 1, "kind": "train", "loss": value, "time": {"seconds": value}}
    strict_json(to_json(record))
    file = JsonlFile(tmp_path / "m.jsonl")
    file.write(record)
    file.close()
    (back,) = read_metrics(tmp_path / "m.jsonl")
    assert np.float64(back["loss"]).tobytes() == np.float64(value).tobytes() or math.isnan(value)
    assert math.isnan(back["loss"]) == math.isnan(value)


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("half a pair \ud83d", "half a pair \ud83d"), (Decimal("1.50"), "1.50"), (b"\xff", "b'\\xff'"), ({3}, [3]),
        (datetime(2020, 1, 2), "2020-01-02 00:00:00"), (np.arange(2), [0, 1]), (np.float32("nan"), "nan"),
    ],
)  # fmt: skip
def test_what_a_table_may_hold_is_written_too(tmp_path: Path, value: Any, wanted: Any):
    file = JsonlFile(tmp_path / "s.jsonl")
    file.write({"step": 1, "answer": value, "text": "né"})
    file.close()
    assert strict_json((tmp_path / "s.jsonl").read_bytes().decode()) == {"step": 1, "answer": wanted, "text": "né"}


def test_text_keeps_its_line_breaks_and_letters(tmp_path: Path):
    record = {"step": 1, "prompt": "what is\nnan?\u2028", "text": "né"}
    file = JsonlFile(tmp_path / "s.jsonl")
    file.write(record)
    file.close()
    lines = (tmp_path / "s.jsonl").read_bytes().split(b"\n")
    assert (len(lines), strict_json(lines[0].decode())) == (2, record)


def test_cuts_back_to_a_remembered_length(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    file = JsonlFile(path)
    file.write({"step": 1})
    kept = file.sync()
    file.write({"step": 2})
    file.close()
    again = JsonlFile(path, kept)
    again.write({"step": 3})
    again.close()
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'


@pytest.mark.parametrize("torn", ["", '{"step": 2', '{"step": 2}'])
def test_a_torn_last_line_goes(tmp_path: Path, torn: str):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n' + torn)
    assert list(read_metrics(path)) == [{"step": 1}]
    file = JsonlFile(path)
    file.write({"step": 9})
    file.close()
    assert path.read_text() == '{"step": 1}\n{"step": 9}\n'


def test_a_file_shorter_than_the_checkpoint_says_is_refused(tmp_path: Path):
    (tmp_path / "m.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"m\.jsonl has 3 bytes, but the checkpoint was saved when it had 10"):
        JsonlFile(tmp_path / "m.jsonl", 10)


def test_a_full_disk_names_the_file_and_spares_what_is_there(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    file = JsonlFile(path)
    file.write({"step": 1})
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, unlimited[1]))
    try:
        with pytest.raises(OSError, match=r"too large while writing .*m\.jsonl; .* run the same command to resume"):
            file.write({"step": 2, "loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    file.close()
    assert next(iter(read_metrics(path))) == {"step": 1}


def test_scalars_leave_out_text_and_the_step():
    record = {"step": 4, "kind": "eval", "loss": 1, "note": "x", "flag": True, "time": {"s": 2.0}}
    assert scalars(record) == {"eval/loss": 1.0, "eval/time/s": 2.0}


def test_tensorboard_shows_what_was_written(tmp_path: Path):
    pytest.importorskip("tensorboardX")
    (writer,) = open_writers(["tensorboard"], tmp_path, name="run", config={})
    for step in (1, 2):
        writer.write({"step": step, "kind": "train", "loss": 1.5 / step})
    writer.close()
    written = b"".join(p.read_bytes() for p in (tmp_path / "tensorboard").iterdir())
    assert written.count(b"train/loss") == 2
    assert np.float32(0.75).tobytes() in written, "the value of step 2, as the event format stores it"


class FakeTracker(types.ModuleType):
    """Stands for wandb or trackio: records what it is told."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[Any] = []

    def init(self, **options: Any) -> None:
        self.calls.append(options)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.calls.append((step, metrics))

    def finish(self) -> None:
        self.calls.append("finished")


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_trackers_get_the_config_the_scalars_and_one_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
):
    fake = FakeTracker(kind)
    monkeypatch.setitem(sys.modules, kind, fake)
    for _ in range(2):
        (writer,) = open_writers([kind], tmp_path, name="run", config={"optim": {"lr": 1e-5}})
        writer.write({"step": 7, "kind": "train", "loss": 2.0})
        writer.close()
    first, logged, finished, second = fake.calls[:4]
    assert first == second, "a resumed run goes on in the same chart"
    assert (first["name"], first["config"], first["resume"]) == ("run", {"optim": {"lr": 1e-5}}, "allow")
    assert (logged, finished) == ((7, {"train/loss": 2.0}), "finished")


@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "trackio"])
def test_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str):
    package = {"tensorboard": "tensorboardX"}.get(kind, kind)
    monkeypatch.setitem(sys.modules, package, None)  # what Python itself uses to forbid an import
    with pytest.raises(ModuleNotFoundError, match=rf"pip install 'jaxpost\[{kind}\]'"):
        open_writers([kind], tmp_path, name="run", config={})


def test_an_unknown_logger_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"run\.loggers has 'mlflow'"):
        open_writers(["mlflow"], tmp_path, name="run", config={})
