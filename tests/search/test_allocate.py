"""Compute where it helps: difficulty, the plain and the fitted policy, widths, and uncertainty that asks for more."""

from __future__ import annotations

import itertools
import math
from functools import partial

import numpy as np
import pytest

from jaxpost.search.allocate import Option, plain, spend
from jaxpost.search.contract import Found
from jaxpost.search.curves import Fitted, Level, Trial, envelope, fit, isotonic
from jaxpost.search.difficulty import Measuring, difficulty, disagreement, measure, surprise
from jaxpost.search.drive import search
from jaxpost.search.metacognition import metacognition, uncertainty
from jaxpost.search.requests import Draw, Score
from jaxpost.search.tree import Ledger, Node, Problem
from jaxpost.search.width import expected_maximum, gain, signal_to_noise, widest
from tests.search.toy import ToyPolicy, ToyVerifier


def table(text):
    """The first letter of the prompt says how sure the answer is: "e" always "a"; "h" one of four letters."""
    if len(text) > 1:
        return {"$": 1.0}
    return {"a": 1.0} if text[0] == "e" else {"a": 0.25, "b": 0.25, "c": 0.25, "d": 0.25}


def sampled(problem, *, n=1, note="", max_tokens=4):
    """The most frequent of n answers."""
    [answers] = yield Draw([problem.root], n=n, max_tokens=max_tokens, note=note)
    counts = [sum(b.answer == a.answer for b in answers) for a in answers]
    return Found.best(answers, key=lambda node: float(counts[answers.index(node)]))


def test_features_have_the_scales_that_they_state():
    verifier = ToyVerifier(lambda text: 0.75)
    how = Measuring(probes=8, max_tokens=4, long_prompt=4, domain_words=("hx",), many_domain=2, surprising=4.0,
                    past=lambda problem: 0.25, score=True)  # fmt: skip

    def only(problem):
        found = yield from measure(problem, how)
        assert found.features["length"] == 0.25
        assert found.features["past"] == 0.75
        assert found.features["verifier"] == 0.25
        assert found.features["domain"] == 0.0
        each = [problem.canonical(node.answer) for node in found.probes]
        assert found.features["agreement"] == disagreement(each)
        assert sum(found.votes.values()) == 8
        return Found.best(list(found.probes))

    outs = search(["e", "h"], only, ToyPolicy(table), verifiers={"verifier": verifier})
    easy, hard = (out.tree.facts for out in outs)
    assert easy["features"]["agreement"] == 0.0
    assert easy["features"]["surprise"] == 0.0
    assert hard["features"]["agreement"] > 0.5
    assert hard["features"]["surprise"] == pytest.approx(math.log(4) / 2 / 4.0)  # half of the tokens are sure ends
    assert easy["difficulty"] < hard["difficulty"]
    assert [out.problem.ledger.generated for out in outs] == [16, 16]
    assert surprise([], surprising=1.0) != surprise([], surprising=1.0)
    with pytest.raises(ValueError, match="'length' is 3"):
        difficulty({"length": 3.0})
    with pytest.raises(ValueError, match="no feature"):
        Measuring(weights={"lenght": 1.0})


@pytest.mark.parametrize(("level", "chosen"), [(0.29, "greedy"), (0.3, "beam 3"), (0.69, "beam 3"), (0.7, "tree 5")])
def test_the_plain_policy_has_its_thresholds(level, chosen):
    called = []

    def named(name):
        def method(problem, size=0):
            called.append(f"{name} {size}".removesuffix(" 0"))
            return (yield from sampled(problem))

        return method

    how = Measuring(probes=0, weights={"length": 0.0, "domain": 0.0, "ambiguity": 0.0}, past=lambda problem: 1 - level)
    method = partial(plain, greedy=named("greedy"), beam=named("beam"), tree=named("tree"), measuring=how)
    [out] = search(["e"], method, ToyPolicy(table))
    assert called == [chosen] == [out.tree.facts["chosen"]]
    assert out.tree.facts["difficulty"] == pytest.approx(level)
    if chosen.startswith("beam"):  # a scorer of noise alone deserves no beam
        search(["e"], partial(method, snr=0.0), ToyPolicy(table))
        assert called[-1] == "beam 1"


def test_the_plain_policy_answers_with_its_probes_where_the_budget_ends():
    def nothing(problem, size=0):
        yield Draw([problem.root], 1, 4)
        return Found(())

    method = partial(plain, greedy=nothing, beam=nothing, tree=nothing, measuring=Measuring(probes=4, max_tokens=2))
    [out] = search(["e"], method, ToyPolicy(table), budget=8)
    assert out.answers[0].text == "a"
    assert out.tokens_spent == 8


def test_isotonic_regression_is_the_nearest_monotone_sequence():
    rng = np.random.default_rng(0)
    grid = np.linspace(0, 1, 11)
    for _ in range(20):
        values, weights = rng.choice(grid, 4), rng.integers(1, 4, 4).astype(float)
        found = np.array(isotonic(values.tolist(), weights.tolist()))
        assert (np.diff(found) >= -1e-12).all()
        cost = (weights * (values - found) ** 2).sum()
        best = min(
            (weights * (values - np.array(c)) ** 2).sum() for c in itertools.combinations_with_replacement(grid, 4)
        )
        assert cost <= best + 1e-9


def concave(rng, steps):
    gains = np.sort(rng.random(steps))[::-1] / steps
    return (
        Level(0.0, 0.0, "", 0),
        *(Level(float(i + 1), float(gains[: i + 1].sum()), "m", i + 1) for i in range(steps)),
    )


def best_of_all(curves, total, *, exactly=True):
    """Every choice of a level for each prompt."""
    found = 0.0
    for choice in itertools.product(*curves):
        if sum(level.cost for level in choice) <= total:
            found = max(found, sum(level.accuracy for level in choice))
    return found / len(curves)


@pytest.mark.parametrize("seed", range(6))
def test_greedy_marginal_gains_equal_brute_force(seed):
    rng = np.random.default_rng(seed)
    fitted = Fitted((0.3, 0.6), tuple(concave(rng, n) for n in (2, 3, 4)), (1, 1, 1))
    levels = [0.1, 0.4, 0.9, 0.9, 0.2]
    curves = [fitted.curves[fitted.bin(d)] for d in levels]
    for total in range(17):
        plan = fitted.plan(levels, total)
        assert plan.predicted == pytest.approx(best_of_all(curves, total))
        assert plan.cost == sum(c.cost for c in plan.choices) <= total


@pytest.mark.parametrize("seed", range(4))
def test_with_increments_of_any_cost_the_loss_is_less_than_one_increment(seed):
    rng = np.random.default_rng(seed)
    drawn = [zip(rng.integers(1, 30, 4).tolist(), rng.random(4).tolist(), strict=True) for _ in range(3)]
    points = [[Level(float(c), a, "m", c) for c, a in each] for each in drawn]
    curves = tuple(envelope([Level(0.0, 0.0, "", 0), *each]) for each in points)
    everything = [[Level(0.0, 0.0, "", 0), *each] for each in points]
    fitted = Fitted((0.3, 0.6), curves, (1, 1, 1))
    largest = max(b.accuracy - a.accuracy for curve in curves for a, b in itertools.pairwise(curve)) / 3
    for total in range(0, 80, 7):
        assert fitted.plan([0.1, 0.5, 0.9], total).predicted > best_of_all(everything, total) - largest - 1e-12


def test_fitting_bins_by_difficulty_makes_curves_monotone_and_concave(tmp_path):
    trials = [Trial(0.1, m, b, b - 1, r) for m, b, r in (("greedy", 10, 1.0), ("vote", 40, 1.0))] * 10
    trials += [Trial(0.9, m, b, b, r) for m, b, r in (("greedy", 10, 0.0), ("vote", 20, 0.4), ("vote", 40, 1.0))] * 10
    fitted = fit(trials, bins=2)
    assert [[(c.method, c.budget) for c in curve] for curve in fitted.curves] == [
        [("", 0), ("greedy", 10)], [("", 0), ("vote", 40)]
    ]  # fmt: skip
    assert fitted.methods == {"greedy", "vote"}
    assert [c.budget for c in fitted.plan([0.1, 0.9], 50).choices] == [10, 40]
    assert [c.budget for c in fitted.plan([0.1, 0.9], 49).choices] == [10, 0]
    assert fit(trials, bins=2, cost="mean").curves[0][1].cost == 9.0
    path = fitted.save(tmp_path / "deep" / "fitted.json")
    assert Fitted.load(path) == fitted
    path.write_text('{"edges": [0.5], "curves": [], "counts": [], "cost": "limit"}')
    with pytest.raises(ValueError, match="1 edges need 2 curves"):
        Fitted.load(path)
    with pytest.raises(FileNotFoundError, match="fit one first"):
        Fitted.load(tmp_path / "none.json")
    with pytest.raises(ValueError, match="0 trials"):
        fit([])


def test_a_fixed_total_goes_where_it_helps_and_is_never_exceeded():
    options = {"greedy": Option(lambda budget: sampled), "vote": Option(lambda budget: partial(sampled, n=budget // 4))}
    prompts = ["e", "h", "e", "h"]
    how = Measuring(probes=3, max_tokens=4, weights={"length": 0.0, "surprise": 0.0, "domain": 0.0, "ambiguity": 0.0})
    base = (Level(0.0, 0.9, "", 0),)
    fitted = Fitted((0.3,), (base, (Level(0.0, 0.2, "", 0), Level(24.0, 0.8, "vote", 24))), (1, 1))
    for total in (0, 10, 24, 48, 72, 100):
        found = spend(prompts, fitted, ToyPolicy(table), total=total, options=options, measuring=how)
        assert found.spent <= total
        if total >= 24:
            assert found.probe_tokens == 24
            assert [c.method for c in found.plan.choices] == [
                "", "vote" if total >= 48 else "", "", "vote" if total >= 72 else ""
            ]  # fmt: skip
    report = found.report([True, False, True, True])
    assert report["realised"] == 0.75
    assert report["predicted"] == pytest.approx((0.9 + 0.8) / 2)
    assert report["share/vote"] == 0.5
    hard = found.outputs[1]
    assert hard.problem.ledger.generated == 6 + 12  # the probes' tokens stay on the bill
    numbers = {node.number for node in hard.tree.walk()}
    assert min(numbers - {0}) > 3  # its noise is not the probes'
    # Planned with what a vote spends elsewhere, 6 tokens on average. Here it spends 12, and the total holds as well.
    mean = Fitted((0.3,), (base, (Level(0.0, 0.2, "", 0), Level(6.0, 0.8, "vote", 24))), (1, 1))
    for total in (30, 36, 47, 60):
        found = spend(prompts, mean, ToyPolicy(table), total=total, options=options, measuring=how, together=3)
        assert 24 < found.spent <= total
    with pytest.raises(ValueError, match="uses vote: no such method"):
        spend(prompts, fitted, ToyPolicy(table), total=9, options={}, measuring=how)


@pytest.mark.parametrize("snr", [0.25, 1.0, 9.0])
@pytest.mark.parametrize("width", [1, 3, 8])
def test_the_gain_of_a_width_is_that_of_a_simulation(snr, width):
    rng = np.random.default_rng(0)
    value = rng.standard_normal((40_000, width))
    said = value + rng.standard_normal(value.shape) / math.sqrt(snr)
    chosen = np.take_along_axis(value, said.argmax(1)[:, None], 1)
    assert gain(width, snr) == pytest.approx(float(chosen.mean()), abs=0.025)
    if width == 8:
        assert signal_to_noise(said, value) == pytest.approx(snr, rel=0.03)


def test_noise_caps_the_width():
    assert expected_maximum(1) == pytest.approx(0, abs=1e-9)
    assert [widest(snr, least=0.05) for snr in (0.0, 0.01, 0.25, 1.0, math.inf)] == sorted(
        widest(snr, least=0.05) for snr in (0.0, 0.01, 0.25, 1.0, math.inf)
    )
    assert widest(0.0) == 1
    assert widest(math.inf, least=1e-9, most=7) == 7
    # The last beam is worth its cost, the next is not.
    n = widest(1.0, least=0.05)
    assert gain(n, 1.0) - gain(n - 1, 1.0) >= 0.05 > gain(n + 1, 1.0) - gain(n, 1.0)
    labels = np.array([0, 1] * 200)
    scores = labels + np.random.default_rng(0).standard_normal(400)
    within = np.mean([scores[labels == k].var() for k in (0, 1)])
    apart = scores[labels == 1].mean() - scores[labels == 0].mean()
    assert signal_to_noise(scores, labels) == pytest.approx(0.25 * apart**2 / within, rel=1e-9)
    with pytest.raises(ValueError, match="signal-to-noise"):
        widest(-1.0)


@pytest.mark.parametrize("signal", ["entropy", "confidence", "disagreement"])
def test_uncertainty_triggers_the_dear_method(signal):
    cheap, dear = partial(sampled, n=3, note="cheap"), partial(sampled, n=5, note="dear")
    method = partial(metacognition, cheap=cheap, dear=dear, signal=signal, threshold=0.2, window=1, top_logprobs=2)
    sure, unsure = search(["e", "h"], method, ToyPolicy(table))
    assert {n.note for n in sure.tree.children} == {"cheap"}
    assert {n.note for n in unsure.tree.children} == {"cheap", "dear"}
    assert unsure.answers[0].node.note == "dear"
    assert (sure.tree.facts["more_compute"], unsure.tree.facts["more_compute"]) == (False, True)
    assert sure.tree.facts["uncertainty"] <= 0.2 < unsure.tree.facts["uncertainty"]
    [poor] = search(["h"], method, ToyPolicy(table), budget=6)
    assert poor.answers[0].node.note == "cheap"
    assert poor.error is None


def test_signals_by_hand():
    problem = Problem(0, "", Node(0, None, (), ""), Ledger(), str.strip)
    best = [(0.5, 0.25), (0.25, 0.25), (0.5, 0.125), (1.0, 1e-30)]
    told = tuple(tuple(math.log(p) for p in row) for row in best)
    node = problem.child(problem.root, (1, 2, 3, 4), "x", logprobs=(-1.0,) * 4, best=told, end="stop")
    node.score = 0.75
    found = Found.best([node])
    # Entropies in bits with what is left as one token: 1/2 1/4 1/4, 1/4 1/4 1/2, 1/2 1/8 3/8, 1.
    bits = 1.5 + 1.5 + 0.5 + 0.375 + 0.375 * math.log2(8 / 3)
    assert uncertainty(problem, found, signal="entropy") == pytest.approx(bits * math.log(2) / 4)
    # Confidences in bits: 1.5, 2, 2, 49.8; the least sure pair has 1.75, and 2 2 ** -1.75 is left.
    assert uncertainty(problem, found, signal="confidence", window=2) == pytest.approx(2 * 2**-1.75)
    assert uncertainty(problem, found, signal="score") == 0.25
    assert math.isnan(uncertainty(problem, Found(()), signal="entropy"))

    def scored(problem):
        [answers] = yield Draw([problem.root], 2, 4)
        yield Score(answers)
        return Found.best(answers)

    method = partial(metacognition, cheap=scored, dear=partial(sampled, note="dear"), signal="score", threshold=0.5)
    outs = [
        search(["e"], method, ToyPolicy(table), verifiers={"verifier": ToyVerifier(lambda t, s=s: s)})[0]
        for s in (0.9, 0.1)
    ]
    assert [out.tree.facts["more_compute"] for out in outs] == [False, True]
