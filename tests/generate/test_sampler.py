"""The sampler against a Markov chain whose every probability is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.generate.sampler import choose, make_sampler
from jaxpost.types import Inputs, Model, Outputs

VOCAB, EOS = 5, 4
TABLE = np.random.default_rng(0).normal(size=(VOCAB, VOCAB)).astype(np.float32) * 1.5


def markov(table: np.ndarray) -> tuple[Model, dict]:
    """logits of the next token = table[token]; the cache counts the tokens that it was shown."""

    def forward(params, inputs: Inputs, cache=None) -> Outputs:
        hidden = params["table"][inputs.tokens]
        return Outputs(hidden, None if cache is None else cache + inputs.segment_ids.sum(-1))

    model = Model(
        config=None,
        table=(),
        init=lambda key: None,
        forward=forward,
        unembed=lambda params, hidden: hidden,
        init_cache=lambda batch, capacity, dtype: jnp.zeros((batch,), jnp.int32),
    )
    return model, {"table": jnp.asarray(table)}


@pytest.fixture(scope="module")
def sampler():
    model, params = markov(TABLE)
    sample = make_sampler(model, eos_ids=(EOS,), context=256, rows=64)
    return lambda *a, **k: sample(params, *a, **k)


def test_greedy_follows_the_most_probable_chain_and_stops_at_the_end_token(sampler):
    [answer] = sampler([[0]], max_tokens=6)
    token, expected = 0, []
    for _ in range(6):
        token = int(TABLE[token].argmax())
        expected.append(token)
        if token == EOS:
            break
    assert list(answer.tokens) == expected
    assert answer.finish == ("stop" if expected[-1] == EOS else "length")


def test_an_end_token_ends_a_row_and_is_kept():
    table = np.full((VOCAB, VOCAB), -20.0, np.float32)
    for token, following in ((0, 1), (1, 2), (2, EOS), (3, 3)):
        table[token, following] = 20.0
    model, params = markov(table)
    stopped, endless = make_sampler(model, eos_ids=(EOS,), context=256, rows=4)(params, [[0], [3]], max_tokens=8)
    assert stopped.tokens == (1, 2, EOS)
    assert stopped.finish == "stop"
    assert endless.tokens == (3,) * 8
    assert endless.finish == "length"


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_of_the_first_token_match_the_distribution(temperature):
    n = 4000
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(1), i))(jnp.arange(n))
    logits = jnp.broadcast_to(TABLE[2], (n, VOCAB))
    tokens, logprobs = jax.jit(choose)(logits, keys, jnp.float32(temperature))
    scaled = TABLE[2].astype(np.float64) / temperature
    probs = np.exp(scaled) / np.exp(scaled).sum()
    counts = np.bincount(np.asarray(tokens), minlength=VOCAB)
    chi_squared = ((counts - n * probs) ** 2 / (n * probs)).sum()
    assert chi_squared < 18.5  # 99.9th percentile with 4 degrees of freedom
    np.testing.assert_allclose(np.exp(np.asarray(logprobs)), probs[np.asarray(tokens)], rtol=1e-5)


def test_a_sample_does_not_depend_on_its_batch(sampler):
    prompts = [[i % 4] * (1 + i % 3) for i in range(20)]
    together = sampler(prompts, max_tokens=12, temperature=1.0, seed=3)
    alone = [sampler([p], max_tokens=12, temperature=1.0, seed=3, first_id=i)[0] for i, p in enumerate(prompts)]
    assert together == alone
    assert together != sampler(prompts, max_tokens=12, temperature=1.0, seed=4)
    assert len({a.tokens for a in together}) > 10


@pytest.mark.parametrize(
    ("prompts", "arguments", "message"),
    [
        ([[1], []], {"max_tokens": 4}, "prompt 1 is empty"),
        ([[1] * 300], {"max_tokens": 4}, "prompt 0 has 300 tokens"),
        ([[1]], {"max_tokens": 0}, "at least 1"),
        ([[1]], {"max_tokens": 4, "temperature": -1.0}, "temperature is -1.0"),
    ],
)
def test_bad_requests_get_a_sentence(sampler, prompts, arguments, message):
    with pytest.raises(ValueError, match=message):
        sampler(prompts, **arguments)
