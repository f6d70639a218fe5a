"""Searches side by side: what is batched, what budgets buy, and whom a failure touches."""

from __future__ import annotations

from functools import partial

import pytest

from jaxpost.search.contract import Found, Verdict
from jaxpost.search.drive import search
from jaxpost.search.requests import Draw, Score
from tests.search.toy import ToyPolicy, ToyVerifier


def coin(text):
    return {"a": 0.4, "b": 0.4, "$": 0.2}


def best(problem, *, n=4, max_tokens=8):
    [answers] = yield Draw([problem.root], n=n, max_tokens=max_tokens, scored=True)
    yield Score(answers)
    return Found.best(answers)


def run(prompts, budget=None, price=0, **kwargs):
    policy = ToyPolicy(coin)
    verifiers = {"verifier": ToyVerifier(lambda text: text.count("a"), price=price)}
    return policy, search(prompts, partial(best, **kwargs), policy, verifiers=verifiers, budget=budget)


def test_prompts_share_batches_and_do_not_touch_each_other():
    policy, together = run(["a", "b", "ab"])
    assert policy.calls == [("draw", 12)]
    numbers = [0, 1, 2]
    for number, prompt, out in zip(numbers, ["a", "b", "ab"], together, strict=True):
        alone = search([prompt], best, ToyPolicy(coin), numbers=[number],
                       verifiers={"verifier": ToyVerifier(lambda text: text.count("a"))})[0]  # fmt: skip
        assert [c.text for c in alone.answers] == [c.text for c in out.answers]
        assert out.answers[0].score == max(c.score for c in out.answers if c.node.complete)


@pytest.mark.parametrize("budget", [0, 1, 5, 17, 40, 200])
@pytest.mark.parametrize("price", [0, 1])
def test_no_budget_is_ever_exceeded_and_what_is_left_over_is_spent(budget, price):
    _, [out] = run(["a"], budget=budget, price=price, n=8)
    ledger = out.problem.ledger
    assert ledger.spent <= budget
    drawn = sum(len(node.tokens) for node in out.tree.walk() if node is not out.tree)
    assert ledger.generated == drawn
    assert ledger.verified == price * drawn
    # Something was refused only where the next answer, at its longest, did not fit.
    if ledger.refused and budget:
        assert ledger.left < 8 * (1 + price) or budget < 8 * (1 + price)


def test_a_budget_too_small_for_an_answer_is_a_sentence_and_others_go_on():
    _, outs = run(["a", "", "b"], budget=200)
    assert outs[1].error == "the prompt is empty"
    assert [outs[0].error, outs[2].error] == [None, None]
    _, [small] = run(["a"], budget=1, n=1)
    if not any(c.node.complete for c in small.answers):
        assert "too small" in small.error


def test_a_verifier_that_costs_more_than_its_price_is_told():
    verifier = ToyVerifier(lambda text: 0.0)
    verifier.__class__ = type("Dear", (ToyVerifier,), {"__call__": lambda self, cases: [Verdict(1.0, 50)] * len(cases)})
    [out] = search(
        ["a"], partial(best, n=1, max_tokens=9), ToyPolicy(coin), verifiers={"verifier": verifier}, budget=40
    )
    assert out.tokens_spent > 40
    assert "costs more than its price" in out.problem.warnings[0]


@pytest.mark.parametrize(("judge", "said"), [(lambda text: float("nan"), "it said NaN"), (None, "verdicts on")])
def test_a_verifier_that_fails_is_named_and_the_answers_stay(judge, said):
    verifier = ToyVerifier(judge or (lambda text: 0.0))
    if judge is None:
        verifier.__class__ = type("Short", (ToyVerifier,), {"__call__": lambda self, cases: []})
    [out] = search(["a"], partial(best, n=6, max_tokens=40), ToyPolicy(coin), verifiers={"verifier": verifier})
    assert said in out.error
    assert out.answers
