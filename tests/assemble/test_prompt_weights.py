"""BCO's weights by prompt: the regression against scipy's minimiser, the weights on a model and in its batches."""

import json

import numpy as np
import pytest
from scipy.optimize import minimize

from jaxpost.assemble.preference import make_job
from jaxpost.assemble.prompt_weights import density_ratios, logistic_regression
from jaxpost.config import AnswerDataSection, MeshSection, ModelSection, RunSection, SourceSection, TrainSection
from jaxpost.config_check_preference import check_preference
from jaxpost.config_io import ConfigError
from jaxpost.config_preference import LiveReference, PreferenceConfig
from jaxpost.config_preference_losses import BCOLoss


def test_the_regression_is_the_minimum_and_its_ratio_the_densities():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 3)), rng.random(40) < 0.3
    balance = np.where(y, 20 / y.sum(), 20 / (~y).sum())
    sign = np.where(y, 1, -1)
    loss = lambda w: balance @ np.log1p(np.exp(-sign * (x @ w[:-1] + w[-1]))) + 0.7 * w[:-1] @ w[:-1] / 2  # noqa: E731
    expected = minimize(loss, np.zeros(4), options={"gtol": 1e-9}).x
    np.testing.assert_allclose(logistic_regression(x, y, ridge=0.7), expected, atol=1e-5)
    # Two normals one apart: the ratio of their densities at x is exp(x - 1/2), whatever their numbers.
    many = np.concatenate([rng.normal(1, 1, 4000), rng.normal(0, 1, 12000)])[:, None]
    w = logistic_regression(many, np.arange(16000) < 4000, ridge=1e-6)
    np.testing.assert_allclose(w, [1.0, -0.5], atol=0.08)
    assert density_ratios(np.zeros((1, 1)), np.array([1.0, -9.0]), least=0.5, most=10.0).tolist() == [0.5]


def config_of(tiny_model, tmp_path, rows, **loss):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return PreferenceConfig(
        model=ModelSection(path=str(tiny_model)),
        data=AnswerDataSection(train=(SourceSection(path=str(path)),), seq_len=64, packing=False),
        losses=(BCOLoss(prompt_weights="density_ratio", **loss),),
        reference=LiveReference(),
        mesh=MeshSection(data=2, fsdp=4),
        train=TrainSection(steps=1, batch_size=8),
        run=RunSection(dir=str(tmp_path / "run"), export=False),
    )


def test_undesirable_answers_to_prompts_like_the_desirable_ones_count_more(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXPOST_CACHE", str(tmp_path / "cache"))
    # Good answers are all to "say", bad ones half to "say" and half to "add".
    rows = [{"prompt": f"say {i % 4}", "completion": "yes", "label": True} for i in range(8)]
    rows += [{"prompt": f"{'say' if i % 2 else 'add'} {i % 4}", "completion": "no", "label": False} for i in range(8)]
    source = make_job(config_of(tiny_model, tmp_path, rows)).source
    dataset = source.dataset
    assert dataset.strengths[:8].tolist() == [1.0] * 8
    like, unlike = dataset.strengths[9::2], dataset.strengths[8::2]
    assert like.min() > 1.0 > unlike.max()
    assert dataset.strengths.min() >= 0.5
    batch = source.batch(0)
    here = {(int(batch.ranks[r, s]), float(batch.strengths[r, s])) for r, s in np.argwhere(batch.groups > 0)}
    assert {strength for rank, strength in here if rank == 0} <= {1.0}
    assert {strength for rank, strength in here if rank > 0} <= set(dataset.strengths[8:].tolist())


def test_what_cannot_be_weighted(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXPOST_CACHE", str(tmp_path / "cache"))
    one = [{"prompt": f"say {i}", "completion": "yes", "label": True} for i in range(4)]
    with pytest.raises(ValueError, match="one of them alone"):
        make_job(config_of(tiny_model, tmp_path, one))
    with pytest.raises(ConfigError, match="least_prompt_weight 3 must be above 0 and at most"):
        check_preference(config_of(tiny_model, tmp_path, one, least_prompt_weight=3.0, most_prompt_weight=2.0))
