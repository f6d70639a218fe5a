"""The geometric mixture of two policies: through pages, chunk by chunk, as the product of both forward passes."""

import jax
import numpy as np
import pytest

from jaxpost.generate.mixture import geometric_mixture, mixed
from jaxpost.generate.params import SamplingParams
from jaxpost.generate.sampler import make_sampler
from tests.generate.toy_lm import EOS, PAGE, learner_logits, log_softmax, toy


@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.slow), 6])
def test_log_probabilities_are_those_of_both_logits_weighed(window):
    model, first = toy(window)
    other = model.init(jax.random.key(8))
    second = jax.tree.map(lambda x: x * 5 if x.ndim > 1 else x, other)
    weight = 0.3
    sampler = make_sampler(geometric_mixture(model, weight), eos_ids=[EOS], context=64, rows=4, page_size=PAGE)
    prompts = [[1, 2, 3, 4, 5], [2, 1]]
    found = sampler(mixed(first, second), prompts, SamplingParams(n=2, max_tokens=12, ignore_eos=True), seed=3)
    plain = make_sampler(model, eos_ids=[EOS], context=64, rows=4, page_size=PAGE)
    told = plain(
        second, [[*prompts[c.example], *c.tokens] for c in found], SamplingParams(max_tokens=1, prompt_logprobs=7)
    )
    for c, of_second in zip(found, told, strict=True):
        prompt = prompts[c.example]
        z_first = log_softmax(learner_logits([*prompt, *c.tokens], window))
        z_second = np.zeros_like(z_first)
        for at, best in enumerate(of_second.prompt_best):
            for token, logprob in best:
                z_second[at, token] = logprob
        both = log_softmax((1 - weight) * z_first + weight * z_second)
        want = [both[len(prompt) - 1 + i, t] for i, t in enumerate(c.tokens)]
        np.testing.assert_allclose(c.logprobs, want, atol=1e-4)
    # A mixture with itself is itself, by the same noise.
    alone = plain(first, prompts, SamplingParams(n=2, max_tokens=12), seed=5)
    twice = sampler(mixed(first, first), prompts, SamplingParams(n=2, max_tokens=12), seed=5)
    assert [c.tokens for c in alone] == [c.tokens for c in twice]


def test_a_weight_that_is_no_share_is_refused():
    with pytest.raises(ValueError, match="a share is from 0 to 1"):
        geometric_mixture(toy()[0], 1.5)
