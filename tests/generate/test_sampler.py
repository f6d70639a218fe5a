"""The sampler against an enumerated distribution, the learner's forward pass, and itself in other batches."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.generate.batching import Run
from jaxpost.generate.beam import beam_search
from jaxpost.generate.pages import OutOfPages
from jaxpost.generate.params import SamplingParams
from jaxpost.generate.sampler import make_sampler
from tests.generate.toy_lm import EOS, PAGE, VOCAB, distribution, learner_logits, log_softmax, toy

PROMPTS = [[1, 2, 3], [4], [0, 5, 2, 1, 3, 3, 1], [2, 2, 2, 2, 2, 2, 2, 2, 1]]


def sampler(window=None, **settings):
    model, params = toy(window)
    options = {"eos_ids": (EOS,), "context": 200, "rows": 16, "page_size": PAGE, "prefill_tokens": 16, "max_steps": 8}
    sample = make_sampler(model, **(options | settings))
    return lambda *a, **k: sample(params, *a, **k), sample


@pytest.fixture(scope="module")
def shared():
    return sampler()[0]


def best_text(prompt, length, window=None):
    tokens = list(prompt)
    for _ in range(length):
        tokens.append(int(learner_logits(tokens, window)[-1].argmax()))
        if tokens[-1] == EOS:
            break
    return tuple(tokens[len(prompt) :])


@pytest.mark.parametrize("window", [None, 5])
def test_greedy_is_the_argmax_of_the_learner_token_by_token(window):
    sample, _ = sampler(window)
    found = sample(PROMPTS, SamplingParams(temperature=0, max_tokens=14))
    for prompt, answer in zip(PROMPTS, found, strict=True):
        assert answer.tokens == best_text(prompt, 14, window)
        assert answer.finish == ("stop" if answer.tokens[-1] == EOS else "length")


def test_frequencies_of_whole_texts_match_the_enumerated_distribution(shared):
    prompt, length, n = (1, 2, 3), 3, 3000
    want = distribution(prompt, length, 1.5)
    assert abs(sum(want.values()) - 1) < 1e-6
    found = shared([list(prompt)], SamplingParams(n=n, max_tokens=length, temperature=1.5), seed=11)
    texts = sorted(want, key=lambda t: -want[t])
    common = [t for t in texts if want[t] * n >= 5]
    counts = dict.fromkeys(texts, 0)
    for c in found:
        counts[c.tokens] += 1
    observed = np.asarray([counts[t] for t in common] + [n - sum(counts[t] for t in common)], float)
    expected = np.asarray([want[t] * n for t in common] + [n * (1 - sum(want[t] for t in common))])
    keep = expected > 1e-3
    chi_squared = float(((observed - expected)[keep] ** 2 / expected[keep]).sum())
    freedom = int(keep.sum()) - 1
    assert freedom > 10
    # Wilson and Hilferty's approximation of the 99.9th percentile.
    assert chi_squared < freedom * (1 - 2 / (9 * freedom) + 3.09 * np.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize("mode", ["raw", "temperature"])
def test_log_probabilities_are_the_learners(shared, mode):
    wish = SamplingParams(n=3, max_tokens=20, temperature=0.7, logprobs_mode=mode, logprobs=2)
    for c in shared(PROMPTS, wish, seed=5):
        prompt = PROMPTS[c.example]
        logits = learner_logits([*prompt, *c.tokens])[len(prompt) - 1 : -1]
        want = log_softmax(logits / (0.7 if mode == "temperature" else 1.0))
        np.testing.assert_allclose(c.logprobs, [want[i, t] for i, t in enumerate(c.tokens)], atol=1e-4)
        for i, pairs in enumerate(c.best):
            assert [t for t, _ in pairs] == list(np.argsort(-want[i])[:2])
            np.testing.assert_allclose([p for _, p in pairs], np.sort(want[i])[::-1][:2], atol=1e-4)


def test_prompt_log_probabilities_are_the_learners(shared):
    wishes = [SamplingParams(n=2, max_tokens=1, prompt_logprobs=n) for n in (0, 1, 3, 20)]
    for c in shared(PROMPTS, wishes):
        want = log_softmax(learner_logits(PROMPTS[c.example]))
        tokens = PROMPTS[c.example][1:]
        np.testing.assert_allclose(c.prompt_logprobs, [want[i, t] for i, t in enumerate(tokens)], atol=1e-4)
        count = min(wishes[c.example].prompt_logprobs, VOCAB)
        assert len(c.prompt_best) == (len(tokens) if count else 0)
        for i, pairs in enumerate(c.prompt_best):
            assert [t for t, _ in pairs] == list(np.argsort(-want[i])[:count])
            np.testing.assert_allclose([p for _, p in pairs], np.sort(want[i])[::-1][:count], atol=1e-4)


@pytest.mark.parametrize(("length", "page"), [(40, 4), (200, 16)])
def test_scores_of_a_prompt_need_no_second_copy_of_it(length, page, monkeypatch):
    fills, fill = [], Run._fill

    def limited(run):
        fills.append(1)
        assert len(fills) < 50, "no end"
        fill(run)

    monkeypatch.setattr(Run, "_fill", limited)
    sample, _ = sampler(rows=1, page_size=page, context=300)
    wish = SamplingParams(max_tokens=4, prompt_logprobs=0)
    found = sample([[i % 5 for i in range(length)]] * 3, wish)
    assert [len(c.prompt_logprobs) for c in found] == [length - 1] * 3


def test_a_sample_depends_on_its_meaning_alone(shared):
    """Alone, among others, in other slots, with few rows, small chunks or a cache that overflows: the same texts."""
    wishes = [SamplingParams(n=1 + i % 3, max_tokens=6 + 5 * i, temperature=1.0, top_k=i) for i in range(4)]
    want = {(c.example, c.sample): (c.tokens, c.finish) for c in shared(PROMPTS, wishes, seed=3, draw=2)}
    assert len({tokens for tokens, _ in want.values()}) > 5
    alone = [c for i in range(4) for c in shared([PROMPTS[i]], wishes[i], seed=3, draw=2, example_ids=[i])]
    turned = shared(PROMPTS[::-1], wishes[::-1], seed=3, draw=2, example_ids=[3, 2, 1, 0])
    few = sampler(rows=2, max_steps=3, prefill_tokens=4)[0](PROMPTS, wishes, seed=3, draw=2)
    tight, made = sampler(rows=8, cache_tokens=60)
    small = tight(PROMPTS, wishes, seed=3, draw=2)
    for found in (alone, turned, few, small):
        assert {(c.example, c.sample): (c.tokens, c.finish) for c in found} == want
    pool = made.engine.book.full
    assert pool.free == pool.count - 1, "every page came back"
    other = shared(PROMPTS, wishes, seed=3, draw=3)
    assert {(c.example, c.sample): (c.tokens, c.finish) for c in other} != want


def test_int8_pages_change_little():
    exact, _ = sampler()
    rounded, _ = sampler(kv_dtype=jnp.int8)
    wish = SamplingParams(temperature=0, max_tokens=12, logprobs_mode="raw")
    gaps = []
    for a, b in zip(exact(PROMPTS, wish), rounded(PROMPTS, wish), strict=True):
        same = next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=False)) if x != y), len(a.tokens))
        gaps += np.abs(np.subtract(a.logprobs[:same], b.logprobs[:same])).tolist()
    assert 0 < max(gaps) < 0.3


def test_stop_strings_end_the_text_and_may_be_kept(shared):
    letters = "abcdefg"
    model, params = toy()
    sample = make_sampler(
        model, eos_ids=(EOS,), context=200, rows=4, page_size=PAGE, max_steps=8,
        decode=lambda ids: "".join(letters[i] for i in ids),
    )  # fmt: skip
    wish = {"temperature": 1.5, "max_tokens": 40, "ignore_eos": True}
    [free] = sample(params, [[1, 2]], SamplingParams(**wish), seed=1)
    stop = free.text[9:11]
    at = free.text.index(stop)
    [cut] = sample(params, [[1, 2]], SamplingParams(**wish, stop=(stop, "never")), seed=1)
    assert (cut.text, cut.stop, cut.finish) == (free.text[:at], stop, "stop")
    assert cut.tokens == free.tokens[: at + 2]
    assert len(cut.logprobs) == len(cut.tokens)
    [kept] = sample(params, [[1, 2]], SamplingParams(**wish, stop=stop, include_stop_str_in_output=True), seed=1)
    assert kept.text == free.text[: at + 2]

    # One that is whole among the first `min_tokens` is text like any other; the next one counts.
    stop = free.text[4]
    second = free.text.index(stop, free.text.index(stop) + 1)
    for least in (free.text.index(stop) + 1, second):
        [cut] = sample(params, [[1, 2]], SamplingParams(**wish, stop=stop, min_tokens=least), seed=1)
        assert (cut.text, cut.stop, len(cut.tokens)) == (free.text[:second], stop, second + 1)

    # Of stop strings that end together the longest counts, whatever their alphabet (the last letter to come is A here).
    late = max(set(free.text), key=free.text.index)
    at = free.text.index(late)
    sample.decode = lambda ids: "".join("A" if letters[i] == late else letters[i] for i in ids)
    stop = free.text[at - 1] + "A"
    [cut] = sample(params, [[1, 2]], SamplingParams(**wish, stop=("A", stop)), seed=1)
    assert (cut.text, cut.stop, len(cut.tokens)) == (free.text[: at - 1], stop, at + 1)


def test_end_tokens_can_be_ignored_and_added(shared):
    wish = {"temperature": 1.0, "max_tokens": 30}
    for c in shared(PROMPTS, SamplingParams(**wish, ignore_eos=True), seed=2):
        assert (c.finish, len(c.tokens)) == ("length", 30)
    for c in shared(PROMPTS, SamplingParams(**wish, stop_token_ids=(3,), n=4), seed=2):
        assert not {3, EOS} & set(c.tokens[:-1])
        assert c.stop == (c.tokens[-1] if c.finish == "stop" else None)


def test_the_text_of_an_end_token_is_cut_off_or_kept():
    model, params = toy()
    sample = make_sampler(
        model, eos_ids=(), context=200, rows=4, page_size=PAGE, max_steps=8,
        decode=lambda ids: "".join("abcdefg"[i] for i in ids),
    )  # fmt: skip
    wish = {"max_tokens": 30, "stop_token_ids": (3,)}
    [free] = sample(params, [[1, 2]], SamplingParams(max_tokens=30), seed=1)
    at = free.tokens.index(3)
    for keep in (False, True):
        [done] = sample(params, [[1, 2]], SamplingParams(**wish, include_stop_str_in_output=keep), seed=1)
        assert (done.tokens, done.stop, done.text) == (free.tokens[: at + 1], 3, free.text[: at + keep])
        for beams in beam_search(
            sample, params, [[1, 2]], SamplingParams(**wish, n=3, include_stop_str_in_output=keep), beams=3
        ):
            for beam in beams:
                told = beam.tokens[:-1] if beam.finish == "stop" and not keep else beam.tokens
                assert beam.text == sample.decode(told)
            assert {beam.finish for beam in beams} >= {"stop"}


def test_bad_rows_are_told_and_the_others_go_on(shared):
    prompts = [[1, 2], [], [9], [1] * 199, [3]]
    wishes = [SamplingParams(max_tokens=4)] * 4 + [SamplingParams(max_tokens=4, allowed_token_ids=(VOCAB + 1,))]
    found = shared(prompts, wishes, errors="return")
    assert [c.finish == "error" for c in found] == [False, True, True, True, True]
    assert [c.error and c.error[:8] for c in found] == [None, "prompt 1", "prompt 2", "prompt 3", "prompt 4"]
    assert "is empty" in found[1].error
    assert "token id 9, outside the vocabulary of 7" in found[2].error
    assert "token id -2, outside" in shared([[5, -2]], wishes[0], errors="return")[0].error
    assert "199 tokens; with max_tokens=4 it does not fit the model's context of 200" in found[3].error
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        shared(prompts, wishes)
    with pytest.raises(ValueError, match="needs room for 2 \\+ 30 tokens"):
        sampler(cache_tokens=32)[0]([[1, 2]], SamplingParams(max_tokens=30))


def test_a_prompt_is_read_once_for_all_its_samples():
    sample, made = sampler(rows=8)
    list(sample(PROMPTS, SamplingParams(n=8, max_tokens=4)))
    engine = made.engine
    stored = []
    keep = engine._store
    engine._store = lambda weights, part: (stored.append(int(np.sum(part.part.counts))), keep(weights, part))[1]
    sample(PROMPTS, SamplingParams(n=8, max_tokens=4), seed=1)
    assert sum(stored) == sum(len(p) - 1 for p in PROMPTS)


def test_a_second_call_compiles_nothing_and_strict_forbids_it():
    sample, made = sampler(rows=4, cache_tokens=512)
    wish = SamplingParams(n=2, max_tokens=9)
    sample(PROMPTS, wish)
    count = len(made.engine.compiled)
    made.forget()
    changed = SamplingParams(n=2, max_tokens=9, temperature=0.3, top_k=3, top_p=0.8, presence_penalty=1.0, seed=5)
    sample(PROMPTS, changed)
    made.engine.strict = True
    sample(PROMPTS, changed, seed=9)
    assert len(made.engine.compiled) == count
    with pytest.raises(RuntimeError, match="would compile"):
        sample([[1] * 100], wish)
    assert made.engine.book.full.free == made.engine.book.full.count - 1


def test_the_engine_scores_given_texts_as_the_learner():
    _, made = sampler()
    made(toy()[1], [[1]], SamplingParams(max_tokens=1))
    engine, weights = made.engine, made._weights[1]
    for text, got in zip(PROMPTS, engine.score(weights, PROMPTS), strict=True):
        want = log_softmax(learner_logits(text))
        np.testing.assert_allclose(got.logprobs, [want[i, t] for i, t in enumerate(text[1:])], atol=1e-4)
    with pytest.raises(OutOfPages):
        engine.score(weights, [[1] * 5000])
    assert engine.book.full.free == engine.book.full.count - 1
