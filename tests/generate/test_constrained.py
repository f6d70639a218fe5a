"""Rows with a thinking budget in the sampler: forced tokens written at once, and tokens that were refused."""

import numpy as np
import pytest

from jaxpost.generate.batching import Run
from jaxpost.generate.engine import Engine
from jaxpost.generate.params import SamplingParams
from jaxpost.generate.thinking import ThinkingBudget
from tests.generate.test_sampler import PROMPTS, sampler
from tests.generate.toy_lm import EOS, VOCAB, learner_logits, log_softmax

END, WAIT = 5, (2, 3)


@pytest.fixture(scope="module")
def shared():
    return sampler(rows=4)[0]


def starting(budget, ends=(EOS,)):
    return [lambda: budget.start([1], vocab_size=VOCAB, end_ids=list(ends))] * len(PROMPTS)


@pytest.mark.parametrize(
    "mode", ["processed", *(pytest.param(m, marks=pytest.mark.slow) for m in ("temperature", "raw"))]
)
def test_forced_tokens_are_written_in_one_pass_and_scored_as_if_drawn(shared, mode, monkeypatch):
    budget = ThinkingBudget(begin=(1, 2, 3), end=(END, 4, 0), max_tokens=3)
    wish = SamplingParams(n=2, max_tokens=14, temperature=0.7, logprobs=2, logprobs_mode=mode)
    steps, extend = [], Engine.extend
    monkeypatch.setattr(Engine, "extend", lambda *a, **k: (steps.append(len(a[2])), extend(*a, **k))[1])
    found = shared(PROMPTS, wish, seed=4, matchers=starting(budget))
    fast = sum(steps)
    steps.clear()
    monkeypatch.setattr(Run, "_forced", lambda self, sample: [])
    want = shared(PROMPTS, wish, seed=4, matchers=starting(budget))
    assert fast < 0.8 * sum(steps), "steps of rows"
    for a, b in zip(found, want, strict=True):
        assert a.tokens[:3] == (1, 2, 3)
        assert (a.tokens, a.finish, a.stop) == (b.tokens, b.finish, b.stop)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
        assert [[t for t, _ in x] for x in a.best] == [[t for t, _ in x] for x in b.best]
        np.testing.assert_allclose([[p for _, p in x] for x in a.best], [[p for _, p in x] for x in b.best], atol=1e-4)


def test_a_refused_token_leaves_no_trace(shared, monkeypatch):
    """An end of thinking that comes too early is taken back, and the wait stands in its place."""
    budget = ThinkingBudget(end=(END,), min_tokens=9, max_tokens=9, wait=WAIT, max_waits=2)
    refused, retract = [], Engine.retract
    monkeypatch.setattr(Engine, "retract", lambda self, text, n: (refused.append(n), retract(self, text, n))[1])
    wish = SamplingParams(n=4, max_tokens=16, temperature=1.5, logprobs_mode="raw", logprobs=1, ignore_eos=True)
    found = shared(PROMPTS, wish, seed=6, matchers=starting(budget, ()))
    assert len(refused) > 5
    waits = 0
    for c in found:
        prompt = PROMPTS[c.example]
        at = c.tokens.index(END)
        assert at <= 9
        waits += sum(c.tokens[i : i + 2] == WAIT for i in range(at))
        assert len(c.tokens) == len(c.logprobs) == len(c.best) == 16
        want = log_softmax(learner_logits([*prompt, *c.tokens])[len(prompt) - 1 : -1])
        np.testing.assert_allclose(c.logprobs, [want[i, t] for i, t in enumerate(c.tokens)], atol=1e-4)
    assert waits >= len(refused)
