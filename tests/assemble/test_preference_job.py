"""Preference runs through `assemble` on a tiny model: references, resuming, rows, alarms."""

import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import pytest

from jaxpost import assemble
from jaxpost.assemble import preference, reference_policy
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
from jaxpost.config_preference import (
    CachedReference,
    LiveReference,
    NoReference,
    PreferenceConfig,
    RefreshedReference,
)
from jaxpost.config_preference_losses import CPOLoss, DPOLoss, KTOLoss
from jaxpost.config_watch import PreferenceWatchSection
from jaxpost.metrics.terms import add, to_host
from jaxpost.models.table import flatten
from jaxpost.weights import huggingface


@pytest.fixture(scope="module")
def world(tiny_model, tmp_path_factory):
    """One cache and one file of pairs for all tests of this module."""
    folder = tmp_path_factory.mktemp("preference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXPOST_CACHE", str(folder / "cache"))
        rows = [
            {"prompt": f"say {i}", "chosen": "good " * (1 + i % 3) + str(i), "rejected": "bad " * (1 + i % 4)}
            for i in range(40)
        ]
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        yield folder


@pytest.fixture
def config(world, tiny_model, tmp_path) -> PreferenceConfig:
    source = SourceSection(path=str(world / "pairs.jsonl"))
    return PreferenceConfig(
        model=ModelSection(path=str(tiny_model)),
        data=AnswerDataSection(
            train=(dataclasses.replace(source, skip=16),), eval=(dataclasses.replace(source, limit=16),), seq_len=96
        ),
        losses=(DPOLoss(beta=0.5),),
        optim=AdamWSection(lr=1e-2, schedule=ScheduleSection(kind="constant", warmup=0.0)),
        mesh=MeshSection(data=2, fsdp=4),
        train=TrainSection(steps=4, batch_size=8, save_every=2),
        run=RunSection(dir=str(tmp_path / "{name}"), name="run", export=False),
    )


def records(folder, kind):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def evaluated(job, state) -> dict[str, float]:
    """Means over the whole evaluation data, as the loop computes them."""
    (source,) = job.evals.values()
    step = jax.jit(job.eval_step)
    totals = {}
    with jax.set_mesh(job.mesh):
        for k in range(source.num_batches_per_epoch):
            sums = to_host(
                step(job.eval_params(state), job.frozen, job.place(source.batch(k)), jax.random.key(0), job.hyper)
            )
            totals = dict(add(totals, sums)) if totals else dict(sums)
    return {name: float(s.total / s.weight) for name, s in totals.items() if s.weight}


def moved(job):
    """The first state, its parameters away from the reference's."""
    state = job.init_state()
    off = lambda x: x + 0.02 * jax.numpy.sin(jax.numpy.arange(x.size, dtype=x.dtype).reshape(x.shape))  # noqa: E731
    return state._replace(params=jax.tree.map(off, state.params))


def test_a_run_separates_the_sides_and_tells_of_both(config, monkeypatch):
    watch = PreferenceWatchSection(window=1.0, first=1, kl=1e-9)
    config = dataclasses.replace(config, watch=watch, run=dataclasses.replace(config.run, export=True))
    result = assemble.train(config)
    first, last = records(result.folder, "eval")
    assert first["dpo"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["rewards/margin"] == pytest.approx(0.0, abs=1e-5)
    assert last["rewards/margin"] > 0.1
    assert last["loss"] < first["loss"]
    train = records(result.folder, "train")
    for name in ("rewards/chosen", "rewards/rejected", "rewards/accuracy", "logprobs/chosen", "kl", "tokens/chosen"):
        assert name in train[-1]
    (alarm,) = [json.loads(line) for line in (result.folder / "alarms.jsonl").read_text().splitlines()]
    assert alarm["alarm"] == "kl"
    page = assemble_report(result.folder)
    assert all(title in page for title in ("reward margin", "pairs in the right order", "Alarms"))
    # The same data and model again: nothing is computed a second time.
    monkeypatch.setattr(reference_policy, "_scorer", None)
    preference.make_job(config)


def assemble_report(folder) -> str:
    from jaxpost.report import write_report

    return write_report(folder).read_text(encoding="utf-8")


@pytest.mark.slow
def test_cached_live_and_adapterless_references_agree(config):
    kinds = {"cached": CachedReference(), "live": LiveReference()}
    means = {}
    for name, section in kinds.items():
        job = preference.make_job(dataclasses.replace(config, reference=section))
        assert ("reference" in job.frozen) == (name == "live")
        means[name] = evaluated(job, moved(job))
    assert abs(means["live"]["rewards/margin"]) > 0.01
    assert means["cached"] == pytest.approx(means["live"], rel=1e-4, abs=1e-5)


def test_under_an_adapter_the_base_is_the_reference(config):
    config = dataclasses.replace(config, adapter=LoRASection(rank=2, alpha=4.0))
    means = []
    for section in (CachedReference(), LiveReference()):
        job = preference.make_job(dataclasses.replace(config, reference=section))
        assert "reference" not in job.frozen
        means.append(evaluated(job, moved(job)))
    assert means[0]["rewards/margin"] != 0
    assert means[0] == pytest.approx(means[1], rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_it_goes_on_as_if_never_stopped_with_the_reference_that_it_had(config, tmp_path):
    config = dataclasses.replace(config, reference=RefreshedReference(every=3, mix=0.5))
    whole = assemble.train(config)
    reference = whole.state.extra["reference"]
    assert int(reference.age) == 1
    cut = dataclasses.replace(config, run=dataclasses.replace(config.run, name="cut"))
    shutil.copytree(whole.folder, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "4")
    text = (tmp_path / "cut" / "config.yaml").read_text().replace("name: run", "name: cut")
    (tmp_path / "cut" / "config.yaml").write_text(text)
    cut = dataclasses.replace(cut, run=dataclasses.replace(cut.run, allow_changed_config=True))
    again = assemble.train(cut)
    for a, b in zip(jax.tree.leaves(whole.state), jax.tree.leaves(again.state), strict=True):
        np.testing.assert_array_equal(a, b)
    losses = lambda folder: [r["loss"] for r in records(folder, "train")]  # noqa: E731
    assert losses(whole.folder) == losses(again.folder)


@pytest.mark.parametrize(
    "loss", [CPOLoss(), pytest.param(KTOLoss(beta=0.5), marks=pytest.mark.slow)], ids=["pairs", "unpaired"]
)
def test_packed_shared_and_padded_rows_mean_the_same(config, loss):
    reference = NoReference() if isinstance(loss, CPOLoss) else LiveReference()
    config = dataclasses.replace(config, losses=(loss,), reference=reference)
    state, means = None, []
    for packing, share in ((True, True), (False, False)):
        data = dataclasses.replace(config.data, packing=packing, seq_len=128)
        job = preference.make_job(dataclasses.replace(config, data=data, share_prompts=share))
        state = moved(job) if state is None else state
        means.append(evaluated(job, state))
    if isinstance(loss, KTOLoss):  # its baseline is a mean over the answers of a batch, and batches differ
        means = [{name: x for name, x in found.items() if name != "kto"} for found in means]
    assert means[0] == pytest.approx(means[1], rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_another_model_may_be_the_reference(config, tiny_model, tmp_path):
    other = tmp_path / "other"
    model = huggingface.read_config(tiny_model)
    params = jax.tree.map(lambda x: 0.9 * x, huggingface.load(tiny_model, model))
    huggingface.save(other, model, params, tokenizer_from=tiny_model)
    means = []
    for section in (CachedReference(path=str(other)), LiveReference(path=str(other))):
        job = preference.make_job(dataclasses.replace(config, reference=section))
        means.append(evaluated(job, job.init_state()))
    assert means[0]["rewards/margin"] != 0
    assert means[0] == pytest.approx(means[1], rel=1e-4, abs=1e-5)
    # Other bytes under the same name are another reference.
    changed = jax.tree.map(lambda x: 0.8 * x, huggingface.load(tiny_model, model))
    huggingface.save(other, model, changed, tokenizer_from=tiny_model, overwrite=True)
    job = preference.make_job(dataclasses.replace(config, reference=CachedReference(path=str(other))))
    assert evaluated(job, job.init_state())["rewards/margin"] != means[0]["rewards/margin"]
    assert flatten(params).keys() == flatten(changed).keys()


def test_inspection_shows_both_sides_and_what_differs(config):
    text = assemble.inspect(config, rows=1)
    assert "[chosen," in text
    assert "[rejected," in text
    assert "counts of groups (pairs)" in text
