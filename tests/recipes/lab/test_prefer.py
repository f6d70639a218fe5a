"""Preference losses on the lab: equal pairs and updates for each, the table by hand, and a tiny run to its end."""

import dataclasses
import json

import numpy as np
import pytest

from jaxpost.assemble.answer_data import answer_sources
from jaxpost.assemble.model import load_model
from jaxpost.assemble.supervised import open_model
from jaxpost.config import ModelSection
from jaxpost.config_check_preference import check_preference, data_kind, needs_mismatched
from jaxpost.config_io import ConfigError
from jaxpost.config_preference_losses import DPOLoss
from jaxpost.generate.samples import Completion
from jaxpost.recipes.lab import folder as new
from jaxpost.recipes.lab import model
from jaxpost.recipes.lab.prefer import methods, pairs, results, runner

TINY = model.Recipe(rows=10, prompts=24, held_out=6, width=16, layers=1, heads=2)
PLAN = methods.Plan(pairs=16, batch=8, answers=2, each=1, rates=(1e-3,))


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Files of problems, and a model that has learned nothing."""
    patch = pytest.MonkeyPatch()
    patch.setenv("JAXPOST_CACHE", str(tmp_path_factory.mktemp("cache")))
    lab = model.find_lab(TINY)
    model.write_problems(lab)
    shape = new.architecture(width=TINY.width, layers=TINY.layers, heads=TINY.heads, max_positions=256)
    new.write_new_model(lab.model, shape, seed=0)
    (lab.folder / "measured.json").write_text("{}")
    yield lab
    patch.undo()


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def some_pairs(count):
    return [{"prompt": f"1{i}+11", "chosen": f"{21 + i}", "rejected": f"10+10={i}"} for i in range(1, count + 1)]


@pytest.mark.parametrize("name", [*methods.METHODS, "bco", "aot_unpaired", "aot", "nll"])
def test_every_loss_reads_the_same_answers_an_update(name, lab, tmp_path):
    path = write(tmp_path / "pairs.jsonl", some_pairs(16))
    method = methods.load_method(name)
    where = {"model": lab.model, "pairs": path, "folder": tmp_path}
    config = check_preference(methods.lab_config(method, PLAN, name=name, rate=1e-3, seed=3, **where))
    assert (config.train.steps, config.optim.lr, config.data.seed) == (2, 1e-3, 3)
    kind = data_kind(method.losses)
    source = answer_sources(config, open_model(config), kind=kind, mismatched=needs_mismatched(method.losses))["train"]
    found = []
    for k in range(config.train.steps):
        batch = source.batch(k)
        own = [(row, s) for row, s in zip(*np.nonzero(batch.groups), strict=True) if batch.ranks[row, s] >= 0]
        assert len(own) == 2 * PLAN.batch, "answers of an update"
        found += [
            tuple(batch.tokens[row][batch.weights[row] * (batch.segment_ids[row] == s + 1) > 0]) for row, s in own
        ]
    end = load_model(ModelSection(path=str(lab.model))).tokenizer
    wanted = [(*end.encode(row[side]), end.eos_ids[0]) for row in some_pairs(16) for side in ("chosen", "rejected")]
    assert sorted(found) == sorted(wanted), "every answer once an epoch"


def test_methods_by_name_mixture_and_preset(tmp_path):
    assert methods.load_method("dpo").losses == (DPOLoss(),)
    assert methods.load_method("dpo").reference.kind == "cached"
    assert methods.load_method("sft").losses[0].mean == "token"
    assert methods.load_method("simpo+nll").reference.kind == "none"
    preset = tmp_path / "mine.yaml"
    preset.write_text(
        "method: preference\nmodel: {path: a/b}\nlosses: [{kind: dpo, beta: 0.7}]\n"
        "reference: {kind: refreshed, every: 3}\noptim: {kind: lion, lr: 5}\n"
    )
    found = methods.load_method(str(preset))
    config = methods.lab_config(found, PLAN, name="mine", rate=1e-3, seed=0)
    assert (config.losses[0].beta, config.reference.kind, config.reference.every) == (0.7, "refreshed", 3)
    assert (config.model.path, config.optim.kind) == ("model", "adamw")
    preset.write_text("method: preference\nreference: {kind: live, path: other}\n")
    assert methods.load_method(str(preset)).reference.path is None, "the reference is the lab's model"
    for name, message in (
        ("dpoo", r"dpoo is no preference loss \(sft, alphapo"),
        ("dpo+kto", "judges single answers"),
        ("xpo", "xpo is no preference loss"),
    ):
        with pytest.raises(ConfigError, match=message):
            methods.load_method(name)
    other = tmp_path / "sft.yaml"
    other.write_text("method: sft\n")
    with pytest.raises(ConfigError, match="presets of `method: preference`"):
        methods.load_method(str(other))
    with pytest.raises(ConfigError, match="names of their own"):
        methods.load_methods(["dpo", "dpo"])


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"pairs": 17}, "no whole number"),
        ({"answers": 1}, "no pair"),
        ({"rates": ()}, "rates"),
        ({"epochs": 0}, "epochs"),
    ],
)
def test_plans_that_cannot_be(wish, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(PLAN, **wish)


def said(*texts, finish="stop"):
    return [Completion((1,), (0.0,), finish, text) for text in texts]


def test_pairs_are_right_and_wrong_and_no_answer_is_in_two():
    problem, rng = {"prompt": "47+38", "answer": "85"}, np.random.default_rng(0)
    found = said("85", "40+30=70;85", "85", "84", "83", "") + said("82", finish="length")
    rows = pairs.pairs_of(problem, found, most=5, rng=rng)
    assert len(rows) == 2
    assert {row["chosen"] for row in rows} == {"85", "40+30=70;85"}
    assert {row["rejected"] for row in rows} == {"84", "83"}
    assert len(pairs.pairs_of(problem, found, most=1, rng=rng)) == 1
    assert pairs.pairs_of(problem, said("85", "85"), most=5, rng=rng) == []


def test_pairs_are_a_function_of_the_seed_and_are_kept(tmp_path):
    problems = [{"prompt": f"1{i}+1", "answer": f"{11 + i}"} for i in range(1, 8)]
    draw = lambda rows, numbers: [c for row in rows for c in said(row["answer"], "7")]  # noqa: E731
    make = lambda name, seed, count=3: pairs.write_pairs(  # noqa: E731
        tmp_path / name, problems, draw, count=count, most=1, answers=2, seed=seed
    )
    first, again, other = make("a", 0), make("b", 0), make("c", 1)
    assert first.read_text() == again.read_text() != other.read_text()
    assert len(first.read_text().splitlines()) == 3
    first.write_text("kept")
    assert make("a", 5).read_text() == "kept"
    with pytest.raises(ValueError, match="make 7 pairs, 8 are wanted"):
        make("d", 0, 8)
    assert len(make("e", 0, None).read_text().splitlines()) == 7


def cell(method, seed, greedy, rate=1e-4, sampled=0.3):
    return results.Cell(method, seed, rate, 2, 4, greedy, sampled, 0.75, 1.0 + seed, -2.0, 9.0, 1.0, {"sum": greedy})


def test_the_table_by_hand():
    cells = [cell("untrained", 0, 0.4, 0.0), cell("sft", 0, 0.5), cell("dpo", 0, 0.6)]
    cells += [cell("untrained", 1, 0.4, 0.0), cell("sft", 1, 0.7), cell("dpo", 1, 0.8)]
    rows = results.summarise(cells, "sft")
    assert [row.method for row in rows] == ["untrained", "sft", "dpo"]
    none, sft, dpo = rows
    # s = 0.1 sqrt 2 over two seeds, t(1) = 12.7062: half = 12.7062 * 0.1; differences by seed are 0.1 twice.
    assert (dpo.greedy.mean, dpo.greedy.half) == (pytest.approx(0.7), pytest.approx(1.27062, rel=1e-5))
    assert (dpo.against_first.mean, dpo.against_first.half) == (pytest.approx(0.1), pytest.approx(0, abs=1e-9))
    assert none.against_first.mean == pytest.approx(-0.2)
    assert sft.against_first is None
    lines = results.table(rows, title="Three", first="sft").splitlines()
    assert lines[2].startswith("| method | rate | greedy | against sft | sampled | against sft | pairs in order |")
    assert {line.count("|") for line in lines[2:]} == {13}
    assert lines[6] == (
        "| dpo | 0.0001 | 70.0% ± 127.1 | +10.0 ± 0.0 | 30.0% ± 0.0 | +0.0 ± 0.0 | 75.0% ± 0.0 | +1.50 ± 6.35 | "
        "-2.00 ± 0.00 | 9.0 | 1 | 70% |"
    )


def test_rates_are_chosen_by_greedy_and_sampled_answers_together():
    tried = [cell("dpo@0.1", 9, 0.5, 0.1, sampled=0.1), cell("dpo@0.2", 9, 0.4, 0.2, sampled=0.3)]
    assert max(tried, key=results.worth).rate == 0.2
    text = results.tried(tried, {"dpo": 0.2}, title="Tried")
    assert text.splitlines()[2:] == ["| method | 0.1 | 0.2 |", "|---|---|---|", "| dpo | 30.0% | **35.0%** |"]


def fake_pairs(lab, place):
    """The model has learned nothing, so its pairs are written for it."""
    for name, count in (("seed0", 16), ("unseen", 3)):
        write(place / "pairs" / f"{name}.jsonl", some_pairs(count))


@pytest.mark.slow
def test_a_run_to_its_end_goes_on_and_refuses_another(lab, tmp_path):
    fake_pairs(lab, tmp_path)
    said = []
    run = lambda names, **options: runner.prefer(  # noqa: E731
        names, **{"seeds": 1, "plan": PLAN, "folder": tmp_path, "recipe": TINY, "say": said.append} | options
    )
    text = run(["sft", "dpo"])
    kept = json.loads((tmp_path / "table.json").read_text())
    none, sft, dpo = kept["rows"]
    assert (none["order"]["mean"], none["chosen"]["mean"]) == (0.5, 0.0)
    assert sft["chosen"]["mean"] > 0, "what is trained on becomes likelier"
    assert dpo["order"]["mean"] > 0.5
    assert text.splitlines()[4].startswith("| untrained |  | ")
    for name in ("sft", "dpo"):
        found = json.loads((tmp_path / "cells" / name / "seed0" / "result.json").read_text())["cell"]
        assert (found["updates"], found["pairs"]) == (2, 16)
    said.clear()
    assert run(["sft", "dpo"]) == text
    assert said == [], "nothing is run again"
    with pytest.raises(ValueError, match=r"another comparison \(answers differ\)"):
        run(["sft"], plan=dataclasses.replace(PLAN, answers=3))
    with pytest.raises(ValueError, match=r"another comparison \(methods differ\)"):
        run(["sft"], plan=dataclasses.replace(PLAN, rates=(1e-2,)))


def test_each_method_has_its_own_rate_of_several(lab, tmp_path):
    fake_pairs(lab, tmp_path)
    bench = runner.Bench(lab, dataclasses.replace(PLAN, rates=(1e-4, 1e-2)), tmp_path, lambda text: None)
    bench.cell = lambda title, method, rate, seed, place, *, chosen_on: cell(
        title, seed, {"sft@0.0001": 0.9, "dpo@0.01": 0.8}.get(title, 0.5), rate
    )
    rates, cells = runner.choose_rates(bench, methods.load_methods(["sft", "dpo", "ipo"]))
    assert rates == {"sft": 1e-4, "dpo": 1e-2, "ipo": 1e-4}
    assert {c.seed for c in cells} == {runner.CHOICE_SEED}
    assert len(cells) == 6
