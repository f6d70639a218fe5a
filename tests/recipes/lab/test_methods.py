"""Methods of the lab as configurations, and a comparison whose runs are made up: what it keeps, reads and writes."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxpost import config_policy_losses
from jaxpost.config_check_rl import check_rl
from jaxpost.config_io import ConfigError
from jaxpost.recipes.lab import methods, model, runner
from jaxpost.train.online import _OnlineRun

SIX = ["dapo", "dr_grpo", "grpo", "ppo", "reinforce_plus_plus", "rloo"]
TINY = model.Recipe(rows=10, prompts=12, held_out=6)


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """Files of problems, without a model."""
    monkeypatch.setenv("JAXPOST_CACHE", str(tmp_path / "cache"))
    lab = model.find_lab(TINY)
    model.write_problems(lab)
    return lab


@pytest.mark.parametrize("name", SIX)
def test_a_method_keeps_what_makes_it_and_takes_the_rest_from_the_lab(name, lab, tmp_path):
    preset = methods.load_method(name)
    budget = methods.Budget(samples=1000, prompts=16, group=8, lr=3e-4)
    config = check_rl(methods.lab_config(preset, lab, budget, name=name, seed=7, folder=tmp_path))
    for section in ("advantage", "loss", "kl", "correction", "critic", "adapter"):
        assert getattr(config, section) == getattr(preset, section)
    assert config.rollout.max_refills == preset.rollout.max_refills
    assert config.learner.epochs == preset.learner.epochs
    assert config.model.path == str(lab.model)
    assert config.train.samples == 1000
    assert config.train.steps == 8  # 16 * 8 * 8 = 1024 is the first multiple of 128 from 1000
    assert config.optim.lr == 3e-4
    assert (config.run.seed, config.prompts.seed) == (7, 7)
    assert config.reward.parts[0].kind == "math"
    assert config.evals[0].reward.parts == methods.RIGHT.parts, "accuracy has no penalty in it"


def test_the_lab_has_the_six_methods_and_names_them():
    assert methods.names() == SIX
    kinds = {name: methods.load_method(name).advantage.kind for name in SIX}
    assert kinds["ppo"] == "gae"
    assert kinds["rloo"] == "rloo"
    assert kinds["grpo"] == kinds["dapo"] == kinds["dr_grpo"] == "grpo"
    with pytest.raises(ConfigError, match=r"qrpo is no method of the lab \(dapo, dr_grpo, grpo"):
        methods.load_method("qrpo")


def test_penalties_of_a_preset_stay_and_its_task_goes(lab, tmp_path):
    other = tmp_path / "mine.yaml"
    other.write_text(
        "method: rl\nreward: {parts: [{kind: math, key: solution}, {kind: overlong, max_tokens: 30, buffer: 5}]}\n"
        "model: {path: a/b}\nloss: {kind: cispo}\n"
    )
    config = methods.lab_config(
        methods.load_method(str(other)), lab, methods.Budget(), name="mine", seed=0, folder=tmp_path,
        flags=["--learner.minibatches", "4"],
    )  # fmt: skip
    assert [part.kind for part in config.reward.parts] == ["math", "overlong"]
    assert config.reward.parts[0].key == "answer"
    assert isinstance(config.loss, config_policy_losses.CISPOLoss)
    assert config.learner.minibatches == 4
    sft = tmp_path / "sft.yaml"
    sft.write_text("method: sft\n")
    with pytest.raises(ConfigError, match="the lab compares presets of `method: rl`"):
        methods.load_method(str(sft))


@pytest.mark.parametrize(
    ("step", "cursor", "waiting", "samples", "ended"),
    [
        (3, 12, None, 100, False),  # 12 problems x 8 samples = 96
        (3, 13, None, 100, True),
        (3, 15, 4, 100, False),  # 4 problems wait for the next step: 11 x 8 = 88
        (5, 1, None, 100, True),
        (4, 99, None, None, False),
    ],
)
def test_a_run_ends_by_its_steps_or_its_samples(step, cursor, waiting, samples, ended):
    train, rollout = SimpleNamespace(samples=samples), SimpleNamespace(samples=8)
    run = SimpleNamespace(
        job=SimpleNamespace(num_steps=5, train=train, rollout=rollout),
        position=SimpleNamespace(step=step),
        cursor=cursor,
        waiting=None if waiting is None else ([None] * waiting, []),
    )
    assert _OnlineRun._ended(run) is ended


def made_up(config, *, command):
    """A run's folder: 2 of 6 right before, more after, by method and seed; two steps of 8 samples."""
    place = Path(config.run.dir)
    place.mkdir(parents=True)
    right = 3 + (config.run.name == "rloo") + config.run.seed
    rows = model.read_rows(Path(config.evals[0].prompts.sources[0].path))
    records = [
        {"step": 0, "kind": "eval", "greedy/accuracy": 2 / 6},
        {"step": 1, "kind": "train", "samples": 8, "answer_tokens": 10.0},
        {"step": 2, "kind": "train", "samples": 16, "answer_tokens": 5.5},
        {"step": 2, "kind": "eval", "greedy/accuracy": right / 6},
    ]
    answers = [
        {"step": step, "kind": kind, "eval": "greedy", "prompt": row["prompt"], "score": float(i < right)}
        for step, kind in ((0, "eval"), (2, "rollout"), (2, "eval"))
        for i, row in enumerate(rows)
    ]
    for name, lines in (("metrics", records), ("samples", answers)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return SimpleNamespace(stopped=None)


def test_a_comparison_of_made_up_runs(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "make_lab", lambda recipe, say: lab)
    monkeypatch.setattr(runner, "keep_programs", lambda: None)
    monkeypatch.setattr(runner, "train", made_up)
    out, said = tmp_path / "out", []
    text = runner.compare(["grpo", "rloo"], seeds=2, folder=out, say=said.append)
    # grpo 3 and 4 of 6, rloo 4 and 5: one problem more with each seed, so the paired interval is a point.
    assert "| grpo | 2 | 33.3% | 58.3% ± " in text
    assert "| +16.7 ± 0.0 | 24 | 168 | 2 |" in text
    assert len(said) == 4
    cell = json.loads((out / "rloo" / "seed1" / "result.json").read_text())["cell"]
    tasks = [row["task"] for row in model.read_rows(lab.held_out)]
    assert cell["tasks"] == {
        task: sum(name == task and i < 5 for i, name in enumerate(tasks)) / 2 for task in TINY.tasks
    }
    monkeypatch.setattr(runner, "train", None)  # nothing is run again
    assert runner.compare(["grpo", "rloo"], seeds=2, folder=out, say=said.append) == text
    with pytest.raises(ValueError, match="another comparison"):
        runner.compare(["grpo"], seeds=1, budget=methods.Budget(lr=1.0), folder=out, say=said.append)
    with pytest.raises(ConfigError, match="two of the methods have one name"):
        runner.compare(["grpo", "grpo"], folder=out)
