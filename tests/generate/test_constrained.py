"""Rows with a thinking budget in the sampler: forced tokens written at once, and tokens that were refused."""

import numpy as np
import pytest

from jaxpost.generate.batching import Run
from jaxpost.generate.engine import Engine
from jaxpost.generate.matcher import only
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


def counted(monkeypatch, most):
    """Fails, in place of going on for ever, after so many passes."""
    calls, extend = [], Engine.extend

    def limited(*arguments, **options):
        calls.append(options["steps"])
        assert len(calls) <= most, "no end"
        return extend(*arguments, **options)

    monkeypatch.setattr(Engine, "extend", limited)
    return calls


def test_a_budget_ignores_end_tokens_that_the_row_ignores(shared, monkeypatch):
    calls = counted(monkeypatch, 20)
    wish = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0, logit_bias={EOS: 50})
    for budget, want in (
        (ThinkingBudget(end=(END,), max_tokens=3), (EOS,) * 3 + (END,) + (EOS,) * 8),
        (ThinkingBudget(end=(END,), min_tokens=3, max_tokens=3, wait=WAIT, max_waits=1), (EOS,) * 3 + (END,)),
    ):
        calls.clear()
        [found] = shared([[1, 2]], wish, matchers=starting(budget))
        assert (found.tokens[: len(want)], len(found.tokens), found.finish) == (want, 12, "length")


class Once:
    """A grammar of one token and an end; the row's own ends it asks for, or others."""

    vocab_size, finished, problem = VOCAB, False, None

    def __init__(self, end=EOS):
        self.left = [1, end]

    def mask(self):
        return only(VOCAB, self.left[:1] or [0])

    def advance(self, token):
        return bool(self.left) and token == self.left.pop(0)

    def forced(self):
        return []

    def fork(self):
        return self

    def leaf(self):
        return self

    @staticmethod
    def fill(matchers):
        return None


def test_a_whole_grammar_ends_its_row_and_one_that_goes_nowhere_is_an_error(shared, monkeypatch):
    counted(monkeypatch, 30)
    wish = SamplingParams(max_tokens=9, ignore_eos=True)
    thinking = lambda: ThinkingBudget(end=(END,), max_tokens=2).start(  # noqa: E731
        [1], vocab_size=VOCAB, end_ids=[EOS], then=Once()
    )
    whole, after, lost = shared([[1, 2]] * 3, wish, matchers=[Once, thinking, lambda: Once(3)])
    assert (whole.tokens, whole.finish, whole.stop) == ((1, EOS), "stop", EOS)
    assert (after.tokens[-3:], after.finish) == ((END, 1, EOS), "stop")
    assert (lost.tokens, lost.finish) == ((1, 3), "error")
    assert "make it for the sampler's end tokens" in lost.error


def test_a_row_whose_thinking_is_over_is_free(shared, monkeypatch):
    calls = counted(monkeypatch, 40)
    [found] = shared(
        [[1, 2]], SamplingParams(max_tokens=24, ignore_eos=True),
        matchers=starting(ThinkingBudget(end=(END,), max_tokens=2)),
    )  # fmt: skip
    assert found.finish == "length"
    assert calls[-1] > 1, "several steps at once"
    assert len(calls) < 10


def test_a_wait_takes_a_token_back_at_the_edge_of_a_window():
    budget = ThinkingBudget(end=(END,), min_tokens=30, max_tokens=30, wait=WAIT, max_waits=6)
    sample, made = sampler(window=6, rows=4)
    for seed in range(2):
        for c in sample([[1, 2]], SamplingParams(max_tokens=40, n=4), seed=seed, matchers=starting(budget)):
            assert c.finish in ("stop", "length")
    pool = made.engine.book.windowed
    assert pool.free == pool.count - 1
