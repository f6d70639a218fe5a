"""Samples at evaluation on a mesh other than training's: the same texts, of plain weights and of adapters."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from jaxpost import assemble
from jaxpost.assemble.sft import make_job
from jaxpost.config import (
    DataSection,
    FullSection,
    LoRASection,
    MeshSection,
    ModelSection,
    RunSection,
    SampleSection,
    SFTConfig,
    SourceSection,
    TrainSection,
)

PROMPTS = ("hello there", "what is it?")
ADAPTERS = [
    LoRASection(rank=2, alpha=4.0),
    pytest.param(FullSection(), marks=pytest.mark.slow),
    pytest.param(FullSection(trainable=("*norm*", "stacks/0/0/q_proj/*")), marks=pytest.mark.slow),
]


@pytest.fixture
def config(tiny_model, tmp_path, monkeypatch) -> SFTConfig:
    monkeypatch.setenv("JAXPOST_CACHE", str(tmp_path / "cache"))
    turns = [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "it it"}]
    data = tmp_path / "chat.jsonl"
    data.write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    samples = SampleSection(prompts=PROMPTS, max_tokens=6, tensor=2)
    return SFTConfig(
        model=ModelSection(path=str(tiny_model)),
        data=DataSection(train=(SourceSection(path=str(data)),), seq_len=64),
        mesh=MeshSection(data=2, fsdp=4),
        train=TrainSection(steps=2, batch_size=8, samples=samples),
        run=RunSection(dir=str(tmp_path / "{name}"), name="run"),
    )


def on_the_mesh_of_training(config):
    samples = dataclasses.replace(config.train.samples, tensor=None)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, samples=samples))


def moved(params, shift):
    """Parameters off their start, where an adapter changes nothing."""

    def one(x):
        waves = jnp.sin(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
        return jax.device_put(x + shift * waves.astype(x.dtype), x.sharding)

    return jax.tree.map(one, params)


def sampled(config, shift):
    job = make_job(config)
    return [sample["text"] for sample in job.sample(moved(job.init_state().params, shift), job.frozen)]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_texts_do_not_depend_on_the_sampling_mesh(config, adapter):
    config = dataclasses.replace(config, adapter=adapter)
    found = sampled(config, 0.3)
    assert found == sampled(on_the_mesh_of_training(config), 0.3)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [LoRASection(rank=2, alpha=4.0), FullSection()])
def test_a_run_samples_what_its_export_answers(config, adapter):
    result = assemble.train(dataclasses.replace(config, adapter=adapter))
    rows = [json.loads(line) for line in (result.folder / "samples.jsonl").read_text().splitlines()]
    answers = assemble.generate(str(result.folder / "export"), PROMPTS, sampling={"max_tokens": 6})
    assert [row["text"] for row in rows[-2:]] == [answer["text"] for answer in answers]
