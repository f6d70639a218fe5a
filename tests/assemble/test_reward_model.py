"""Reward models end to end on a tiny model: trained, judged, exported, read back, used as rewards."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxpost import assemble, sharding
from jaxpost.assemble.judge import make_judge
from jaxpost.assemble.model import load_model
from jaxpost.assemble.readout import Readout, readout_of
from jaxpost.assemble.reward_model import make_job
from jaxpost.assemble.reward_scores import (
    Reduce,
    judge,
    load_reward_model,
    read_groups,
    read_head,
    save_reward_model,
    score_groups,
)
from jaxpost.assemble.score import Verdict, score
from jaxpost.cli import main
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
    RegressionLoss,
    RewardConfig,
)
from jaxpost.config_rewards import FinishedSection, ModelRewardSection, RewardSection
from jaxpost.config_rl import ArithmeticPrompts, OnlineSection, RLConfig, RolloutSection
from jaxpost.generate.scoring import Scorer
from jaxpost.models import heads
from jaxpost.report import write_report
from jaxpost.rewards.contract import Sample
from jaxpost.train.compiled import CompiledEval


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
    config = dataclasses.replace(config, loss=BradleyTerryLoss(margin=0.5, centre=0.01), head=HeadSection(std=0.0))
    result = assemble.train(config)
    first, last = (records(result)[i] for i in (0, -1))
    assert first["loss"] == pytest.approx(np.log1p(np.exp(0.5)), rel=1e-5), "a head of zeros: only the margin"
    assert (first["pairs/accuracy"], last["pairs/accuracy"]) == (0.0, 1.0), "ties are not right"
    assert last["pairs/items"] == 8
    assert last["pairs/low"] == pytest.approx(0.6756, abs=1e-3), "Wilson's interval of 8 of 8"
    told = ("subset/a/accuracy", "calibration_error", "length_correlation", "longer_is_worse/accuracy")
    assert {f"pairs/{name}" for name in told} <= last.keys()
    assert last["rewards/chosen"] > last["rewards/rejected"]
    page = write_report(result.folder).read_text()
    assert "pairs: of what is given x %, so much is right" in page
    job = make_job(config)
    dataset = job.evals["pairs"].dataset
    model = load_reward_model(str(result.folder / "export"))
    groups = [dataset.group(i) for i in range(8)]
    scored = score_groups(model.scorer, model.params, groups, model.readout)
    gaps = [float(scores[0][-1].mean() - scores[1][-1].mean()) for _, scores in scored]
    assert np.mean(gaps) == pytest.approx(last["rewards/margin"], rel=1e-4)
    texts = model([row["prompt"] for row in PAIRS[:8]], [row["chosen"] for row in PAIRS[:8]])
    np.testing.assert_allclose([x.item() for x in texts], [s[0].item() for _, s in scored], rtol=1e-5)


@pytest.mark.slow
def test_a_process_model_by_an_adapter_finds_the_first_error_and_its_export_scores_alike(config, tmp_path):
    config = on(
        config, tmp_path, STEPS, loss=ProcessLoss(), adapter=LoRASection(rank=2, alpha=4.0),
        head=HeadSection(classes=2, members=3, lr=5e-2),
    )  # fmt: skip
    result = assemble.train(config)
    last = records(result)[-1]
    assert last["rows/first_error/f1"] == 1.0
    assert last["rows/uncertainty"] > 0
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


RL = {
    "prompts": ArithmeticPrompts(),
    "rollout": RolloutSection(prompts=2, samples=4, max_tokens=8, rows=8),
    "optim": AdamWSection(lr=1e-3, schedule=ScheduleSection(kind="constant", warmup=0.0)),
    "mesh": MeshSection(data=-1, fsdp=1),
}


def samples_of(result):
    return [json.loads(line) for line in (result.folder / "samples.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_reward_model_rewards_grpo(tiny_model, random_reward_model, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXPOST_CACHE", str(tmp_path / "cache"))
    other = save_random(tiny_model, tmp_path / "other", seed=1)
    part = ModelRewardSection(
        path=(random_reward_model, other), members="mean_std", penalty=0.5, template="Sum: {prompt}"
    )
    config = RLConfig(
        model=ModelSection(path=str(tiny_model)),
        reward=RewardSection(parts=(part, FinishedSection(weight=0.1)), workers=1),
        train=OnlineSection(steps=2),
        run=RunSection(dir=str(tmp_path / "{name}"), name="rl", export=False),
        **RL,
    )
    rows = samples_of(assemble.train(config))
    assert {"model", "model/uncertainty", "finished"} <= rows[0]["rewards"].keys()
    texts = [row["text"] for row in rows]
    asked = [row["prompt"] for row in rows]
    each = [
        [x.item() for x in load_reward_model(path)([f"Sum: {prompt}" for prompt in asked], texts)]
        for path in (random_reward_model, other)
    ]
    expected = np.mean(each, axis=0) - 0.5 * np.std(each, axis=0)
    np.testing.assert_allclose([row["rewards"]["model"] for row in rows], expected, rtol=1e-4, atol=1e-5)
    total = expected + 0.1 * np.array([row["rewards"]["finished"] for row in rows])
    np.testing.assert_allclose([row["reward"] for row in rows], total, rtol=1e-4, atol=1e-5)


def test_a_process_model_rewards_the_steps_of_an_answer(tiny_model, tmp_path):
    path = save_random(tiny_model, tmp_path / "prm", Readout(steps=True, probability=True))
    judge = make_judge(RewardSection(parts=(ModelRewardSection(path=(path,)),)), sharding.make_mesh(MeshSection()))
    steps = ["first thing\n", "\n", "second one"]
    found, faults = judge.by_step([{"prompt": "do"}], [steps])
    assert not faults
    model = load_reward_model(path)
    (expected,) = model.scores([model.encode("do", "-", steps=["first thing", "second one"])])
    np.testing.assert_allclose(found[0][[0, 2]], expected[:, 0, 0], rtol=1e-5)
    assert np.isnan(found[0][1])
    scored = judge([{"prompt": "do"}, {"question": "do"}], [Sample("first thing\nsecond one"), Sample("a")])
    assert scored.rewards["model"][0] == pytest.approx(expected.min(), rel=1e-5)
    assert np.isnan(scored.rewards["model"][1])
    assert "has no prompt" in scored.problems[0].reason


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "loss"),
    [(RANKINGS, PlackettLuceLoss(centre=0.01)), (RANKINGS, BradleyTerryLoss(rows="rankings")),
     (LABELS, OutcomeLoss()), (LABELS, OutcomeLoss(at="tokens"))],
    ids=["plackett_luce", "all_pairs", "outcome", "outcome_tokens"],
)  # fmt: skip
def test_other_objectives_learn(config, tmp_path, rows, loss):
    result = assemble.train(on(config, tmp_path, rows, loss=loss))
    assert records(result)[-1]["rows/accuracy"] > 0.9


def test_grades_are_no_probabilities(config, tmp_path):
    rows = [{"prompt": f"say {i}", "completion": "yes", "score": 1 + i % 5} for i in range(16)]
    with pytest.raises(
        ValueError, match=r"rows\.jsonl has the score [2-5], but loss\.kind outcome reads scores as prob"
    ):
        make_job(on(config, tmp_path, rows, loss=OutcomeLoss(rows="scores")))


def test_a_folder_without_a_head_is_no_reward_model(tiny_model):
    with pytest.raises(ValueError, match=r"is no reward model: its config\.json names LlamaForCausalLM"):
        load_reward_model(str(tiny_model))


@pytest.fixture(scope="module")
def random_reward_model(tiny_model, tmp_path_factory):
    """A sequence classifier with a random head, on disk."""
    return save_random(tiny_model, tmp_path_factory.mktemp("random") / "model")


def save_random(tiny_model, folder, readout=None, seed=0):
    readout = readout or Readout()
    pretrained = load_model(ModelSection(path=str(tiny_model)), trunk=True)
    table = heads.head_table(pretrained.config.width, readout.outputs, std=1.0)
    head = heads.init_head(jax.random.key(seed), table)
    return str(save_reward_model(folder, pretrained, pretrained.load(), head, readout))


def test_score_writes_rows_resumes_and_judges(random_reward_model, tmp_path, capfd):
    rows = [*PAIRS[:6], {"prompt": "a", "chosen": "b" * 2000, "rejected": "c"}]
    data, out = written(tmp_path / "pairs.jsonl", rows), tmp_path / "scores.jsonl"
    args = ["score", random_reward_model, data, "--out", str(out)]
    assert main(args) == 1
    said = capfd.readouterr().err
    assert "of 6\n" in said
    assert "1 of 7 rows could not be scored" in said
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert "max_positions" in found[-1]["error"] or "tokens" in found[-1]["error"]
    model = load_reward_model(random_reward_model)
    expected = model([row["prompt"] for row in PAIRS[:6]], [row["rejected"] for row in PAIRS[:6]])
    np.testing.assert_allclose([row["scores"][1] for row in found[:6]], [x.item() for x in expected], rtol=1e-5)
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:3]) + lines[3][:10])
    assert main(args) == 1
    assert sorted(out.read_text().splitlines()) == sorted("".join(lines).splitlines())
    assert main(["score", random_reward_model, written(tmp_path / "other.jsonl", PAIRS[6:]), "--out", str(out)]) == 2
    assert "holds scores of other rows" in capfd.readouterr().err


def test_a_row_that_cannot_be_read_is_named_or_has_an_error_and_the_others_go_on(random_reward_model, tmp_path):
    same, half = {"prompt": "a", "chosen": "b", "rejected": "b"}, {"prompt": "a", "chosen": "\ud83d", "rejected": "c"}
    source = SourceSection(path=written(tmp_path / "rows.jsonl", [PAIRS[0], same, half, {"text": "x"}, PAIRS[1]]))
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: chosen and rejected are identical"):
        list(score([random_reward_model], source))
    verdict = Verdict()
    rows = list(score([random_reward_model], source, on_bad_row="skip", verdict=verdict))
    assert ["error" in row for row in rows] == [False, True, True, True, False]
    assert [row["where"][-2:] for row in rows] == [":1", ":2", ":3", ":4", ":5"]
    assert (verdict.rows, verdict.failed, verdict.numbers()["items"]) == (5, 3, 2)


def test_scores_of_another_model_are_not_taken_for_this_ones(tiny_model, random_reward_model, tmp_path):
    source, out = SourceSection(path=written(tmp_path / "rows.jsonl", PAIRS[:2])), tmp_path / "out.jsonl"
    model = save_random(tiny_model, tmp_path / "model")
    first = list(score([model], source, out=out))
    assert list(score([model], source, out=out)) == first
    with pytest.raises(ValueError, match="holds scores by another model, or combined in another way"):
        list(score([model], source, out=out, reduce=Reduce(members="min")))
    save_random(tiny_model, tmp_path / "model", seed=1)
    with pytest.raises(ValueError, match="holds scores by another model"):
        list(score([model], source, out=out))
    out.write_text("my notes")
    with pytest.raises(ValueError, match="line 1: not the beginning of a row of `jaxpost score`"):
        list(score([model], source, out=out))
    assert out.read_text() == "my notes"


def test_grades_ties_and_steps_count_in_the_verdict(tiny_model, random_reward_model, tmp_path):
    graded = [{**row, "strength": "slightly_better" if n % 2 else 1.0} for n, row in enumerate(PAIRS[:4])]
    verdict = Verdict()
    list(score([random_reward_model], SourceSection(path=written(tmp_path / "a.jsonl", graded)), verdict=verdict))
    assert {"grade/1/items", "grade/0.333/items"} <= verdict.numbers().keys()
    tied, verdict = [{"prompt": "a", "completions": ["yes", "no"], "ranks": [0, 0]}] * 2, Verdict()
    list(score([random_reward_model], SourceSection(path=written(tmp_path / "b.jsonl", tied)), verdict=verdict))
    assert verdict.numbers() == {}, "ties say nothing of the model"
    process = save_random(tiny_model, tmp_path / "process", Readout(steps=True, probability=True))
    lines = [
        {"prompt": "a", "completion": "good\nbad\n", "labels": [1, 0]},
        {"prompt": "a", "completion": "x", "labels": [1, 0]},
    ]
    source = SourceSection(path=written(tmp_path / "c.jsonl", [*lines, *STEPS[:3]]))
    for model, failed in ((process, 1), (random_reward_model, 0)):
        verdict = Verdict()
        rows = list(score([model], source, verdict=verdict))
        assert (verdict.failed, len(rows)) == (failed, 5)
        assert verdict.numbers()["items"] == 5 - failed
    assert "steps" not in rows[0]


def test_a_file_of_pairs_and_labels_is_judged_by_both(random_reward_model, tmp_path):
    labels = [{"prompt": f"p{n}", "completion": "yes", "label": n % 2 == 0} for n in range(5)]
    verdicts = []
    for name, rows in (("pairs", PAIRS[:4]), ("labels", labels), ("both", [*PAIRS[:4], *labels])):
        source = SourceSection(path=written(tmp_path / f"{name}.jsonl", rows))
        list(score([random_reward_model], source, verdict=(verdict := Verdict())))
        verdicts.append(verdict.numbers())
    pairs, answers, both = verdicts
    assert pairs["items"] == 4
    assert answers["items"] == 5
    apart = {f"pairs/{k}": v for k, v in pairs.items()} | {f"answers/{k}": v for k, v in answers.items()}
    assert both == pytest.approx(apart, rel=1e-4)


def test_an_ensemble_of_models_pays_for_its_uncertainty(tiny_model, random_reward_model, tmp_path):
    other = save_random(tiny_model, tmp_path / "other", seed=1)
    rows = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": f"{i}"}]} for i in range(3)
    ]
    source = SourceSection(path=written(tmp_path / "chats.jsonl", rows))
    each = [[r["scores"][0] for r in score([m], source)] for m in (random_reward_model, other)]
    both = list(score([random_reward_model, other], source, reduce=Reduce(members="mean_std", penalty=2.0)))
    np.testing.assert_allclose(
        [r["scores"][0] for r in both], np.mean(each, axis=0) - 2 * np.std(each, axis=0), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose([r["uncertainty"][0] for r in both], np.std(each, axis=0), rtol=1e-4)


ASPECTS = [
    {"prompt": f"say {i}", "response": "yes " * (1 + i % 3), "helpfulness": i % 3, "correctness": 4 - i % 3,
     "coherence": None if i % 4 else 1} for i in range(24)
]  # fmt: skip


@pytest.mark.slow
def test_several_objectives_have_an_output_each_and_unknown_grades_do_not_count(config, tmp_path):
    config = on(config, tmp_path, ASPECTS, loss=RegressionLoss())
    names = ("helpfulness", "correctness", "coherence")
    config = dataclasses.replace(config, head=HeadSection(std=0.0, lr=5e-2))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=60))
    result = assemble.train(dataclasses.replace(config, data=dataclasses.replace(config.data, objectives=names)))
    last = records(result)[-1]
    assert last["rows/objective/helpfulness/correlation"] > 0.9
    assert last["rows/objective/correctness/correlation"] > 0.9
    assert last["regression"] < 0.5 * records(result)[0]["regression"]
    model = load_reward_model(str(result.folder / "export"))
    assert model.readout.objectives == names
    rows = list(score([str(result.folder / "export")], SourceSection(path=str(tmp_path / "rows.jsonl"), limit=2),
                      kind="scores", reduce=Reduce(objectives=(1.0, 0.5, 0.0))))  # fmt: skip
    each = rows[0]["objectives"][0]
    assert rows[0]["scores"][0] == pytest.approx(each["helpfulness"] + 0.5 * each["correctness"], rel=1e-4)


def test_inspect_shows_steps_and_their_labels(config, tmp_path):
    shown = assemble.inspect(on(config, tmp_path, STEPS, loss=ProcessLoss()), rows=1)
    assert "good" in shown
    assert "steps" in shown


@pytest.mark.parametrize(
    ("rows", "loss", "head"),
    [(PAIRS, BradleyTerryLoss(), HeadSection(members=2, std=1.0)),
     pytest.param(STEPS, ProcessLoss(), HeadSection(classes=2, std=1.0), marks=pytest.mark.slow),
     pytest.param(LABELS, OutcomeLoss(at="tokens"), HeadSection(std=1.0), marks=pytest.mark.slow)],
    ids=["pairs", "steps", "labels"],
)  # fmt: skip
def test_an_evaluation_reads_its_data_once_and_judges_what_the_scorer_says(config, tmp_path, rows, loss, head):
    """Scores of packed batches are those of every answer alone, and so are the numbers made of them."""
    config = on(config, tmp_path, rows, loss=loss, head=head)
    job = make_job(config)
    params = job.eval_params(job.init_state())
    source, readout = job.evals["rows"], readout_of(config)
    evaluate = CompiledEval(job, "rows")
    with jax.set_mesh(job.mesh):
        batches = [source.batch(k) for k in range(source.num_batches_per_epoch)]
        kept = [jax.device_get(evaluate(params, batch)[1]) for batch in batches]
    pretrained = load_model(config.model, job.mesh, trunk=True)
    scorer = Scorer(pretrained.model, read_head, mesh=job.mesh, pad_id=pretrained.tokenizer.pad_id)
    alone = score_groups(scorer, params, [source.dataset.group(i) for i in range(len(source.dataset))], readout)
    packed = read_groups(source, [batch["outputs"] for batch in kept], readout)
    assert len(packed) == len(alone) == len(source.dataset)
    for (group, scores), (own, expected) in zip(packed, alone, strict=True):
        np.testing.assert_array_equal(group.answers[0].tokens, own.answers[0].tokens)
        for x, y in zip(scores, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    found, expected = job.examine("rows", kept), judge(alone)
    assert found.keys() == {f"rows/{name}" for name in expected}
    assert [found[f"rows/{name}"] for name in expected] == pytest.approx(list(expected.values()), rel=1e-3, abs=1e-4)
