"""Reward models end to end on a tiny model: trained, judged, exported, read back with the same scores, used as rewards."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxpost import assemble
from jaxpost.assemble.reward_model import make_job
from jaxpost.assemble.reward_scores import load_reward_model, score_groups
from jaxpost.config import (
    AdamWSection,
    AnswerDataSection,
    LoRASection,
    MeshSection,
    ModelSection,
    RunSection,
    ScheduleSection,
    SourceSection,
    TrainSection,
)
from jaxpost.config_reward import (
    BradleyTerryLoss,
    HeadSection,
    OutcomeLoss,
    PlackettLuceLoss,
    ProcessLoss,
    RewardConfig,
)


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


PAIRS = [
    {"prompt": f"say {i}", "chosen": "yes " * (1 + i % 3), "rejected": "no " * (1 + i % 4), "subset": "ab"[i % 2]}
    for i in range(24)
]
RANKINGS = [{"prompt": f"say {i}", "completions": ["yes", "no", "what"], "ranks": [0, 2, 1 + i % 2]} for i in range(16)]
STEPS = [
    {"prompt": f"add {i}", "completions": ["good", "bad" if i % 2 else "good", "good"],
     "labels": [True, i % 2 == 0, i % 2 == 0]} for i in range(16)
]  # fmt: skip
LABELS = [{"prompt": f"say {i}", "completion": "yes" if i % 2 else "no", "label": bool(i % 2)} for i in range(16)]


@pytest.fixture
def config(tiny_model, tmp_path, monkeypatch) -> RewardConfig:
    monkeypatch.setenv("JAXPOST_CACHE", str(tmp_path / "cache"))
    data = written(tmp_path / "pairs.jsonl", PAIRS)
    return RewardConfig(
        model=ModelSection(path=str(tiny_model)),
        data=AnswerDataSection(
            train=(SourceSection(path=data, skip=8),), eval=(SourceSection(path=data, limit=8),), seq_len=96
        ),
        optim=AdamWSection(lr=1e-2, schedule=ScheduleSection(kind="constant", warmup=0.0)),
        mesh=MeshSection(data=2, fsdp=4),
        train=TrainSection(steps=12, batch_size=8),
        run=RunSection(dir=str(tmp_path / "{name}"), name="run"),
    )


def on(config, tmp_path, rows, **changes):
    data = written(tmp_path / "rows.jsonl", rows)
    sources = {"train": (SourceSection(path=data, skip=4),), "eval": (SourceSection(path=data, limit=4),)}
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **sources), **changes)


def records(result, kind="eval"):
    lines = (result.folder / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def test_bradley_terry_learns_the_order_and_its_export_scores_alike(config):
    config = dataclasses.replace(config, loss=BradleyTerryLoss(margin=0.5, centre=0.01))
    result = assemble.train(config)
    first, last = (records(result)[i] for i in (0, -1))
    assert last["accuracy"] == 1.0 > first["accuracy"]
    assert last["items"] == 8
    assert last["low"] == pytest.approx(0.6756, abs=1e-3), "Wilson's interval of 8 of 8"
    assert {"subset/a/accuracy", "calibration_error", "length_correlation", "longer_is_worse/accuracy"} <= last.keys()
    assert last["rewards/chosen"] > last["rewards/rejected"]
    job = make_job(config)
    dataset = job.evals["pairs"].dataset
    model = load_reward_model(str(result.folder / "export"))
    groups = [dataset.group(i) for i in range(8)]
    scored = score_groups(model.scorer, model.params, groups, model.readout)
    gaps = [float(scores[0][-1].mean() - scores[1][-1].mean()) for _, scores in scored]
    assert np.mean(gaps) == pytest.approx(last["rewards/margin"], rel=1e-4)
    texts = model([row["prompt"] for row in PAIRS[:8]], [row["chosen"] for row in PAIRS[:8]])
    np.testing.assert_allclose([x.item() for x in texts], [s[0].item() for _, s in scored], rtol=1e-5)


def test_a_process_model_by_an_adapter_finds_the_first_error_and_its_export_scores_alike(config, tmp_path):
    config = on(
        config, tmp_path, STEPS, loss=ProcessLoss(), adapter=LoRASection(rank=2, alpha=4.0),
        head=HeadSection(classes=2, members=3, lr=5e-2),
    )  # fmt: skip
    result = assemble.train(config)
    last = records(result)[-1]
    assert last["first_error/f1"] == 1.0
    assert last["uncertainty"] > 0
    model = load_reward_model(str(result.folder / "export"))
    (scores,) = model(["add 1"], ["good\nbad\ngood\n"])
    assert scores.shape == (3, 3, 1)
    assert scores[0].mean() > 0.5 > scores[1].mean()
    source = make_job(config).evals["rows"]
    scored = score_groups(model.scorer, model.params, [source.dataset.group(i) for i in range(4)], model.readout)
    assert np.mean([x.mean() for _, s in scored for x in s]) == pytest.approx(last["score"], rel=1e-4)
    again = load_reward_model(str(result.folder / "export"), base=model)
    shared = lambda m: jax.tree.leaves(m.params["policy"]["embed"])[0]  # noqa: E731
    assert shared(again) is shared(model), "the base's weights are there once"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "loss"),
    [(RANKINGS, PlackettLuceLoss(centre=0.01)), (RANKINGS, BradleyTerryLoss(rows="rankings")),
     (LABELS, OutcomeLoss()), (LABELS, OutcomeLoss(at="tokens"))],
    ids=["plackett_luce", "all_pairs", "outcome", "outcome_tokens"],
)  # fmt: skip
def test_other_objectives_learn(config, tmp_path, rows, loss):
    result = assemble.train(on(config, tmp_path, rows, loss=loss))
    assert records(result)[-1]["accuracy"] > 0.9


def test_a_folder_without_a_head_is_no_reward_model(tiny_model):
    with pytest.raises(ValueError, match="is no reward model: its config.json names LlamaForCausalLM"):
        load_reward_model(str(tiny_model))
