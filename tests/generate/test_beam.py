"""Beam search on a toy model against every text that there is, and against itself with other neighbours."""

import numpy as np
import pytest

from jaxpost.generate.beam import beam_search
from jaxpost.generate.pages import OutOfPages
from jaxpost.generate.params import SamplingParams
from jaxpost.generate.sampler import make_sampler
from tests.generate.test_sampler import PROMPTS
from tests.generate.toy_lm import EOS, PAGE, distribution, learner_logits, log_softmax, toy


def searcher(window=None, **settings):
    model, params = toy(window)
    options = {"eos_ids": (EOS,), "context": 100, "rows": 16, "page_size": PAGE, "prefill_tokens": 16}
    sampler = make_sampler(model, **(options | settings))
    return sampler, lambda prompts, wish, **k: beam_search(sampler, params, prompts, wish, **k)


@pytest.fixture(scope="module")
def shared():
    return searcher()[1]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.5, -0.5])
def test_beams_wide_enough_find_the_best_of_all_texts(shared, length_penalty):
    prompt, length = (1, 2, 3), 3
    every = {t: np.log(p) / len(t) ** length_penalty for t, p in distribution(prompt, length).items()}
    best = sorted(every, key=lambda t: -every[t])[:20]
    wish = SamplingParams(temperature=0, max_tokens=length, n=20)
    [found] = shared([list(prompt)], wish, beams=64, length_penalty=length_penalty, early_stopping="never")
    assert [beam.tokens for beam in found] == best
    np.testing.assert_allclose([beam.score for beam in found], [every[t] for t in best], atol=1e-4)
    assert {beam.finish for beam in found if beam.tokens[-1] == EOS} <= {"stop"}
    assert {beam.finish for beam in found if beam.tokens[-1] != EOS} == {"length"}


WISH = SamplingParams(temperature=0, max_tokens=12, n=3)


@pytest.mark.parametrize("window", [None, pytest.param(5, marks=pytest.mark.slow)])
def test_log_probabilities_are_the_learners_and_neighbours_change_nothing(window):
    sampler, search = searcher(window)
    found = search(PROMPTS, WISH, beams=3)
    for prompt, beams in zip(PROMPTS, found, strict=True):
        assert len({beam.tokens for beam in beams}) == 3
        assert beams[0].score >= beams[1].score >= beams[2].score
        for beam in beams:
            want = log_softmax(learner_logits([*prompt, *beam.tokens], window))[len(prompt) - 1 : -1]
            np.testing.assert_allclose(beam.logprobs, [want[i, t] for i, t in enumerate(beam.tokens)], atol=1e-4)
            assert beam.score == pytest.approx(sum(beam.logprobs) / len(beam.tokens))
    for pool in (sampler.engine.book.full, sampler.engine.book.windowed):
        assert pool.free == pool.count - 1, "every page came back"
    # Two prompts at a time, and then one: the second begins anew whenever the cache overflows.
    tight, narrow = searcher(window, rows=6, cache_tokens=64)
    for few in (narrow(PROMPTS, WISH, beams=3), [narrow([p], WISH, beams=3)[0] for p in PROMPTS]):
        assert [[b.tokens for b in beams] for beams in few] == [[b.tokens for b in beams] for beams in found]
    assert tight.engine.book.full.free == tight.engine.book.full.count - 1


def test_one_beam_is_greedy_and_bans_are_kept(shared):
    for prompt, [beam] in zip(PROMPTS, shared(PROMPTS, SamplingParams(max_tokens=12), beams=1), strict=True):
        text = list(prompt)
        for token in beam.tokens:
            assert token == int(learner_logits(text)[-1].argmax())
            text.append(token)
        assert beam.finish == ("stop" if EOS in beam.tokens else "length")
    wish = SamplingParams(max_tokens=12, min_tokens=12, n=3, no_repeat_ngram_size=2)
    for prompt, beams in zip(PROMPTS, shared(PROMPTS, wish, beams=3), strict=True):
        for beam in beams:
            assert len(beam.tokens) == 12
            pairs = list(zip([*prompt, *beam.tokens], [*prompt, *beam.tokens][1:], strict=False))
            new = pairs[len(prompt) - 1 :]
            assert len(set(new)) == len(new)
            assert not set(new) & set(pairs[: len(prompt) - 1])


def test_what_a_search_cannot_do_is_said(shared):
    for wish, options, told in (
        (SamplingParams(n=4), {"beams": 3}, "3 beams cannot give n=4"),
        (SamplingParams(temperature=0.5), {"beams": 3}, "temperature=0.5 has no meaning"),
        (SamplingParams(top_p=0.5), {"beams": 3}, "no use for top_p=0.5"),
        (SamplingParams(max_tokens=99), {"beams": 3}, "prompt 0 has 3 tokens"),
    ):
        with pytest.raises(ValueError, match=told):
            shared([[1, 2, 3]], wish, **options)
    with pytest.raises(OutOfPages, match="the beams of one prompt do not fit the cache"):
        searcher(cache_tokens=40)[1]([[1] * 8], SamplingParams(max_tokens=24, min_tokens=24), beams=16)


def test_beams_that_bans_end_are_texts(shared):
    wish = SamplingParams(n=3, max_tokens=8, allowed_token_ids=(0, 1), no_repeat_ngram_size=1)
    [found] = shared([[4]], wish, beams=3)
    assert {beam.tokens for beam in found} == {(0, 1), (1, 0)}
    assert [beam.finish for beam in found] == ["length"] * 2
    assert found[0].score >= found[1].score
    assert [beam.score for beam in found] == pytest.approx([sum(beam.logprobs) / 2 for beam in found])
    assert shared([[0, 1]], wish, beams=3) == [[]], "no text at all"


def test_a_token_is_pushed_only_where_it_was_ranked():
    sampler, search = searcher()
    search([[1]], SamplingParams(max_tokens=1), beams=1)
    [text] = sampler.engine.admit(sampler.ready(toy()[1], 8)[1], [[1, 2]])
    with pytest.raises(ValueError, match="rank has just read"):
        sampler.engine.push(text, 3)
