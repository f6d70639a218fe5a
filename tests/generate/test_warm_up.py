"""After a warm-up no call up to its size compiles anything: a strict engine would raise."""

import numpy as np
import pytest

from jaxpost.generate.beam import beam_search
from jaxpost.generate.params import SamplingParams
from jaxpost.generate.thinking import ThinkingBudget
from tests.generate.test_sampler import sampler
from tests.generate.toy_lm import EOS, VOCAB, toy


def test_strict_holds_for_beams_and_for_samples_that_copy_any_number_of_pages():
    wish = SamplingParams(temperature=0, max_tokens=6, n=2)
    sample, made = sampler(rows=4, strict=True)
    params = toy()[1]
    done = made.warm_up(params, prompt_tokens=9, sampling=wish, beams=(3, 6))
    prompts = [[1, 2, 3, 4, 5], [2], [0, 3, 3]]
    for beams in (3, 6):
        found = beam_search(made, params, prompts, wish, beams=beams)
        assert [len(texts) for texts in found] == [2, 2, 2]
    for n in range(1, 5):
        sample(prompts[:1], SamplingParams(max_tokens=6, n=n))
    assert len(made.engine.compiled) == done.programs
    with pytest.raises(RuntimeError, match="would compile"):
        beam_search(made, params, prompts, wish, beams=20)


@pytest.mark.slow
def test_strict_holds_after_a_warm_up():
    sample, made = sampler(5, rows=2, prefill_tokens=16, max_steps=4, strict=True)
    largest = SamplingParams(
        max_tokens=20, logprobs=2, prompt_logprobs=1, stop_token_ids=(3,), logit_bias={1: 1.0, 2: 1.0}
    )
    with pytest.raises(RuntimeError, match="would compile"):
        sample([[1, 2]], largest)
    done = made.warm_up(toy(5)[1], prompt_tokens=40, sampling=largest, constrained=True)
    assert done.programs == len(made.engine.compiled) > 5
    assert done.seconds > 0
    again = made.warm_up(toy(5)[1], prompt_tokens=40, sampling=largest, constrained=True)
    assert again.programs == 0
    rng = np.random.default_rng(0)
    budget = ThinkingBudget(end=(5, 4), max_tokens=3)
    make = lambda: budget.start([1], vocab_size=VOCAB, end_ids=[EOS])  # noqa: E731
    for seed in range(4):
        count = int(rng.integers(1, 5))
        prompts = [rng.integers(0, VOCAB, rng.integers(1, 41)).tolist() for _ in range(count)]
        wishes = [
            SamplingParams(
                n=int(rng.integers(1, 4)), max_tokens=int(rng.integers(1, 21)), logprobs=2,
                prompt_logprobs=1 if rng.random() < 0.5 else None, temperature=float(rng.random()), top_p=0.9,
            )
            for _ in prompts
        ]  # fmt: skip
        found = sample(prompts, wishes, seed=seed, matchers=[make if rng.random() < 0.5 else None for _ in prompts])
        assert len(found) == sum(wish.n for wish in wishes)
        if seed == 1:
            made.forget()
    assert len(made.engine.compiled) == done.programs
