"""Guessed tokens change no text: each row of the sampler with and without them, and the look-up against a loop."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.generate.params import SamplingParams
from jaxpost.generate.sampler import make_sampler
from jaxpost.generate.speculative import Lookup, look_up
from jaxpost.generate.thinking import ThinkingBudget
from tests.generate.test_sampler import PROMPTS, sampler
from tests.generate.toy_lm import EOS, PAGE, VOCAB, toy

MIXED = [
    SamplingParams(n=2, max_tokens=40, temperature=0.7, logprobs_mode="raw"),
    SamplingParams(n=2, max_tokens=43, min_tokens=9, temperature=1.2, top_k=4, top_p=0.9, repetition_penalty=1.2),
    SamplingParams(n=1, max_tokens=40, temperature=0, presence_penalty=0.7, frequency_penalty=0.3, ignore_eos=True),
    SamplingParams(
        n=3, max_tokens=33, no_repeat_ngram_size=3, min_p=0.05, stop_token_ids=(3,), logprobs_mode="processed"
    ),
]
# In every call the same number of best tokens and of end tokens, so that few programs are compiled.
SAME = {"logprobs": 2, "ignore_eos": True, "stop_token_ids": (3, 4)}


@pytest.fixture(scope="module")
def pair():
    """A sampler without guesses and one with them, of a model with full and sliding-window blocks."""
    model, params = toy(5)

    def make(speculate):
        return make_sampler(
            model, eos_ids=(EOS,), context=200, rows=2, page_size=PAGE, prefill_tokens=16, max_steps=10,
            cache_tokens=256, decode=lambda ids: "".join("abcdefg"[i] for i in ids), speculate=speculate,
        )  # fmt: skip

    plain, guessing = make(0), make(Lookup(4, 1, 3))
    guessing._compiled = plain._compiled
    bind = lambda sample: lambda *a, **k: sample(params, *a, **k)  # noqa: E731
    return bind(plain), bind(guessing), guessing


def guess_by_hand(text, lookup):
    n = len(text)
    for size in range(lookup.longest, lookup.shortest - 1, -1):
        for e in range(n - 1, size - 1, -1):
            if size <= n and text[e - size : e] == text[n - size :]:
                ahead = text[e:]
                return [ahead[i % len(ahead)] for i in range(lookup.tokens)]
    return None


@pytest.mark.parametrize("lookup", [Lookup(3, 1, 1), Lookup(4, 2, 3), Lookup(2, 3, 5)])
def test_the_longest_then_latest_run_that_stood_before_is_found(lookup):
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 3, rng.integers(1, 18)).tolist() for _ in range(150)]
    tokens = rng.integers(0, 3, (len(texts), 18)).astype(np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    guesses, found = look_up(jnp.asarray(tokens), jnp.asarray([len(t) for t in texts], jnp.int32), lookup)
    wants = [guess_by_hand(text, lookup) for text in texts]
    assert found.tolist() == [want is not None for want in wants]
    assert 10 < sum(found.tolist()) < 150
    for want, got in zip(wants, np.asarray(guesses).tolist(), strict=True):
        assert want is None or got == want


def same(found, want):
    assert len(found) == len(want)
    for a, b in zip(found, want, strict=True):
        assert (a.example, a.sample, a.tokens, a.finish, a.stop) == (b.example, b.sample, b.tokens, b.finish, b.stop)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
        assert len(a.best) == len(b.best)
        for x, y in zip(a.best, b.best, strict=True):
            assert [t for t, _ in x] == [t for t, _ in y]
            np.testing.assert_allclose([p for _, p in x], [p for _, p in y], atol=1e-4)


def test_texts_and_log_probabilities_are_those_without_guesses(pair):
    plain, guessing, made = pair
    wishes = [replace(wish, logprobs=2) for wish in MIXED]
    for seed in range(2):
        want, found = plain(PROMPTS, wishes, seed=seed), guessing(PROMPTS, wishes, seed=seed)
        same(found, want)
        assert all(c.guessed == c.right == 0 for c in want)
        assert all(0 <= c.right <= c.guessed for c in found)
        assert sum(c.guessed for c in found) > sum(c.right for c in found) > 0
        assert {c.finish for c in found} == {"stop", "length"}
    for pool in (made.engine.book.full, made.engine.book.windowed):
        assert pool.free == pool.count - 1, "every page came back"


def test_a_text_that_repeats_itself_takes_few_passes(pair):
    _, guessing, made = pair
    wish = SamplingParams(temperature=0, max_tokens=40, logit_bias={2: 100.0}, **SAME)
    passes = []
    for sample in pair[:2]:
        [answer] = sample([[1, 2, 2, 2]], wish)
        assert answer.tokens == (2,) * 40
    assert (answer.guessed, answer.right) == (32, 32)
    engine, keep = made.engine, made.engine.extend
    engine.extend = lambda *a, **k: (passes.append(keep(*a, **k)), passes[-1])[1]
    try:
        guessing([[1, 2, 2, 2]], wish)
    finally:
        engine.extend = keep
    assert sum(int(decoded.passes) for decoded in passes) == 8, "five tokens a pass"


def test_stop_strings_end_a_run_of_right_guesses(pair):
    wish = SamplingParams(temperature=0, max_tokens=40, stop=("ccccccc",), logit_bias={2: 100.0}, **SAME)
    for sample in pair[:2]:
        [c] = sample([[1, 2, 2, 2]], wish)
        assert (c.tokens, c.text, c.stop, len(c.logprobs)) == ((2,) * 7, "", "ccccccc", 7)


def test_a_grammar_row_makes_no_guesses(pair):
    budget = ThinkingBudget(end=(5,), max_tokens=6)
    make = lambda: budget.start([1], vocab_size=VOCAB, end_ids=[EOS])  # noqa: E731
    [found] = pair[1]([[1, 2, 2, 2]], SamplingParams(max_tokens=40, **SAME), matchers=[make])
    assert found.guessed == 0
    assert 5 in found.tokens[:7]


def test_a_lookup_that_makes_no_sense_is_refused():
    for wrong, told in ((Lookup(-1), "guesses nothing"), (Lookup(2, 3, 2), "shortest=3 and longest=2")):
        with pytest.raises(ValueError, match=told):
            sampler(speculate=wrong)
