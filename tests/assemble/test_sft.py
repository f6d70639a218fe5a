"""Whole runs through `assemble`, on a tiny model: what is trained, exported, answered and resumed."""

import dataclasses
import json

import numpy as np
import pytest

from jaxpost import assemble
from jaxpost.config import (
    AdamWSection,
    DataSection,
    FullSection,
    LoRASection,
    MeshSection,
    ModelSection,
    RunSection,
    SampleSection,
    ScheduleSection,
    SFTConfig,
    SourceSection,
    TrainSection,
)
from jaxpost.models.table import flatten
from jaxpost.weights import huggingface

PROMPTS = ("hello there", "what is it?")


@pytest.fixture
def config(tiny_model, tmp_path, monkeypatch) -> SFTConfig:
    monkeypatch.setenv("JAXPOST_CACHE", str(tmp_path / "cache"))
    rows = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i} {i}"}]}
        for i in range(24)
    ]
    data = tmp_path / "chat.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return SFTConfig(
        model=ModelSection(path=str(tiny_model)),
        data=DataSection(
            train=(SourceSection(path=str(data), skip=4),), eval=(SourceSection(path=str(data), limit=4),), seq_len=64
        ),
        optim=AdamWSection(lr=1e-2, schedule=ScheduleSection(kind="constant", warmup=0.0)),
        mesh=MeshSection(data=2, fsdp=4),
        train=TrainSection(steps=3, batch_size=8, samples=SampleSection(prompts=PROMPTS, max_tokens=4)),
        run=RunSection(dir=str(tmp_path / "{name}"), name="run"),
    )


def weights(folder, config=None) -> dict:
    config = config or huggingface.read_config(folder)
    return {path: np.asarray(leaf) for path, leaf in flatten(huggingface.load(folder, config)).items()}


def test_full_fine_tuning_lowers_the_held_out_loss_and_exports_what_it_sampled_from(config, tmp_path):
    result = assemble.train(config)
    records = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    held_out = [r["loss"] for r in records if r["kind"] == "eval"]
    assert held_out[-1] < held_out[0]
    last = [json.loads(line) for line in (result.folder / "samples.jsonl").read_text().splitlines()][-len(PROMPTS) :]
    answers = list(assemble.generate(str(result.folder / "export"), PROMPTS, sampling={"max_tokens": 4}))
    assert [a["text"] for a in answers] == [s["text"] for s in last]


@pytest.mark.slow
def test_only_what_the_patterns_select_changes(config, tiny_model):
    config = dataclasses.replace(config, adapter=FullSection(trainable=("*norm*", "stacks/0/0/q_proj/*")))
    result = assemble.train(config)
    before, after = weights(tiny_model), weights(result.folder / "export")
    for path in before:
        chosen = any("norm" in part for part in path) or path[:4] == ("stacks", "0", "0", "q_proj")
        assert np.array_equal(before[path], after[path]) != chosen, path


@pytest.mark.slow
def test_an_adapter_run_exports_a_peft_folder_that_generates_and_merges_alike(config, tmp_path):
    config = dataclasses.replace(config, adapter=LoRASection(rank=2, alpha=4.0))
    result = assemble.train(config)
    adapter = result.folder / "export"
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 2
    last = [json.loads(line) for line in (result.folder / "samples.jsonl").read_text().splitlines()][-len(PROMPTS) :]
    assert [a["text"] for a in assemble.generate(str(adapter), PROMPTS, sampling={"max_tokens": 4})] == [
        s["text"] for s in last
    ]
    assemble.convert(str(adapter), tmp_path / "merged")
    assert [a["text"] for a in assemble.generate(str(tmp_path / "merged"), PROMPTS, sampling={"max_tokens": 4})] == [
        s["text"] for s in last
    ]
    go_on = dataclasses.replace(
        config,
        adapter=LoRASection(rank=2, alpha=4.0, init_from=str(adapter)),
        run=dataclasses.replace(config.run, name="second"),
    )
    records = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    second = assemble.train(go_on)
    first_record = json.loads((second.folder / "metrics.jsonl").read_text().splitlines()[0])
    assert first_record["kind"] == "eval"
    assert first_record["loss"] == pytest.approx([r for r in records if r["kind"] == "eval"][-1]["loss"], rel=1e-5)


@pytest.mark.slow
def test_a_moving_average_is_what_gets_exported(config):
    optim = dataclasses.replace(config.optim, ema_decay=0.5)
    result = assemble.train(dataclasses.replace(config, optim=optim))
    exported = weights(result.folder / "export")
    ema = {path: np.asarray(x) for path, x in flatten(result.state.extra["ema"]["policy"]).items()}
    params = {path: np.asarray(x) for path, x in flatten(result.state.params["policy"]).items()}
    assert all(np.array_equal(exported[path], ema[path]) for path in ema)
    assert not any(np.array_equal(exported[path], params[path]) for path in ema)


@pytest.mark.slow
def test_another_mesh_trains_alike(config):
    many = assemble.train(config)
    losses = [json.loads(line)["loss"] for line in (many.folder / "metrics.jsonl").read_text().splitlines()]
    tensor = dataclasses.replace(
        config, run=dataclasses.replace(config.run, name="tensor"), mesh=MeshSection(data=1, fsdp=4, tensor=2)
    )
    other = assemble.train(tensor)
    other_losses = [json.loads(line)["loss"] for line in (other.folder / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(losses, other_losses, rtol=1e-4)


def test_a_row_longer_than_the_context_window_is_refused_before_anything_is_loaded(config):
    too_long = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=10**6))
    with pytest.raises(ValueError, match="exceeds the model's context"):
        assemble.make_job(too_long)
