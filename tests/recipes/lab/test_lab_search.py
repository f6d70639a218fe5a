"""The lab's comparison of searches on a model of a few letters: labels, cells that are kept, tables."""

from __future__ import annotations

import json

import pytest

from jaxpost.data.judged import Stepwise, UnpairedPreference
from jaxpost.eval.search import Outcome
from jaxpost.recipes.lab.search import results
from jaxpost.recipes.lab.search.cells import judged, run_cells
from jaxpost.recipes.lab.search.methods import table
from jaxpost.recipes.lab.search.samples import SEPARATOR, grow, last_number, outcome_rows, write_samples
from jaxpost.search.drive import search
from jaxpost.search.export import grown, step_rows
from tests.search.toy import LETTERS, ToyPolicy, ToyVerifier

PROMPTS = [{"prompt": "1+1", "answer": "2"}, {"prompt": "1+2", "answer": "3"}]


def lines(text):
    """Answers are "2", "3" or "1=2;2" and the like, always within two steps."""
    said = text.split("\n")[-1][3:] if len(text) > 3 else ""
    if said in ("", "1=2;"):
        return {"2": 0.5, "3": 0.3, **({"1": 0.2} if not said else {})}
    return {"1": {"=": 1.0}, "1=": {"2": 1.0}, "1=2": {";": 1.0}}.get(said, {"$": 1.0})


@pytest.mark.parametrize(
    ("text", "number"),
    [("85", "85"), ("40+30=70;70+15=085", "85"), ("3-7=-4", "-4"), ("9-4", "4"), ("-5", "-5"), ("7;", "7"), ("", None)],
)
def test_the_last_number_is_the_answer(text, number):
    assert last_number(text) == number


def test_labels_are_shares_of_right_answers_below(tmp_path):
    paths = write_samples(tmp_path, PROMPTS, ToyPolicy(lines), held=0.5, say=lambda text: None)
    rows = {name: [json.loads(line) for line in path.read_text().splitlines()] for name, path in paths.items()}
    assert {row["prompt"] for row in rows["outcomes"]} == {"1+1"}
    assert {row["prompt"] for row in rows["steps_held"]} == {"1+2"}
    for row in rows["outcomes"] + rows["outcomes_held"]:
        assert row["label"] == (row["completion"][-1] == {"1+1": "2", "1+2": "3"}[row["prompt"]])
        UnpairedPreference(**row)
    assert len({row["completion"] for row in rows["outcomes"]}) == len(rows["outcomes"])
    [output] = search(["1+1"], grow, ToyPolicy(lines), canonical=last_number)
    tree = grown(output, lambda text: float(last_number(text) == "2"))
    assert {row["completion"] for row in outcome_rows(tree)} == {row["completion"] for row in rows["outcomes"]}
    for row in step_rows([tree], separator=SEPARATOR):
        Stepwise(prompt=row["prompt"], completions=tuple(row["completions"]), labels=tuple(row["labels"]))
        last = row["labels"][-1]
        assert last is None or last == float(row["completions"][-1] == "2")
    # What is there is not drawn again.
    assert write_samples(tmp_path, PROMPTS, ToyPolicy({}.get), say=lambda text: pytest.fail("drawn again")) == paths


class Reader(ToyPolicy):
    """Reads letters that it does not know as ?."""

    def read(self, prompts):
        return super().read(["".join(c if c in LETTERS else "?" for c in prompt) for prompt in prompts])


@pytest.mark.parametrize("name", sorted(name for name in table(64) if not name.startswith("token MCTS")))
def test_every_method_of_the_lab_keeps_its_budget(name):
    tried = table(64, snr=1.0)[name]
    verifiers = {} if tried.scorer == "none" else {"verifier": ToyVerifier(lambda t: 0.9 if "2" in t else 0.1, price=1)}
    outs = search(["1+1", "1+2"], tried.method, Reader(lines), budget=64, verifiers=verifiers, canonical=last_number)
    assert all(out.tokens_spent <= 64 for out in outs)
    assert all(out.answers for out in outs), [out.error for out in outs]
    assert set("".join(c.text for out in outs for c in out.answers)) <= set(LETTERS)


def test_cells_are_kept_and_others_are_refused(tmp_path):
    drawn = []

    def draw(method, budget, seed):
        drawn.append((seed, method, budget))
        return [Outcome(seed == 0, (seed == 0, True), budget), Outcome(False, (), 1, True)]

    def run(methods, seeds, identity="a"):
        drawn.clear()
        return run_cells(methods, [8, 16], range(seeds), draw, tmp_path, identity={"lab": identity}, say=lambda s: None)

    first = run(["best of N", "greedy"], 1)
    assert drawn == [(0, "best of N", 8), (0, "best of N", 16), (0, "greedy", 8), (0, "greedy", 16)]
    again = run(["best of N", "greedy"], 2)
    assert [seed for seed, *_ in drawn] == [1] * 4
    assert again[0].seeds[0] == first[0].seeds[0]
    assert again[0].right.tolist() == [0.5, 0.0]
    with pytest.raises(ValueError, match=r"another comparison \(lab differ\)"):
        run(["greedy"], 1, "b")


def test_the_table_the_numbers_and_the_curve_are_written(tmp_path):
    def draw(method, budget, seed):
        return [Outcome(method == "majority" or i % 2 == 0, (i % 2 == 0, True), budget - seed) for i in range(6)]

    runs = run_cells(["greedy", "majority"], [8, 16], range(2), draw, tmp_path, identity={}, say=lambda s: None)
    text = results.write(tmp_path, runs, title="a <title>", verifiers="said")
    assert text.startswith("a <title>")
    assert "| majority | 8 | 8 | 100.0% [61.0, 100.0] |" in text
    assert "majority@8" in text
    assert "pass@2" in text
    points = json.loads((tmp_path / "points.json").read_text())
    assert [p["accuracy"]["value"] for p in points["points"]] == [0.5, 0.5, 1.0, 1.0]
    assert points["points"][0]["by_seed"] == [0.5, 0.5]
    svg = (tmp_path / "curve.svg").read_text()
    assert svg.startswith("<svg")
    assert "compute-optimal" in svg


def test_outcomes_compare_canonical_answers():
    outs = search(["1+1", ""], table(64)["majority"].method, ToyPolicy(lines), canonical=last_number, budget=64)
    found = judged(outs, ["2", "3"])
    assert found[0].offered == tuple(c.canonical == "2" for c in outs[0].answers)
    assert found[0].tokens == outs[0].tokens_spent
    assert found[1] == Outcome(False, (), 0, True)
