"""The processed distribution of a token against transformers' logits processors, applied in the same order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
from transformers.generation import logits_process as hf  # noqa: E402

from jaxpost.generate.choose import choose, log_probabilities  # noqa: E402
from jaxpost.generate.params import SamplingParams  # noqa: E402
from jaxpost.generate.penalties import History  # noqa: E402
from jaxpost.generate.rows import pack  # noqa: E402

ROWS, EOS = 12, 2
WHOLE, DRAW = jax.jit(log_probabilities), jax.jit(choose)


def reference(params: SamplingParams, logits: np.ndarray, text: np.ndarray, prompt: int) -> np.ndarray:
    words = [[int(i) for i in word.split()] for word in params.bad_words]
    eos = torch.tensor([EOS])
    processors = []
    if params.no_repeat_ngram_size:
        processors.append(hf.NoRepeatNGramLogitsProcessor(params.no_repeat_ngram_size))
    if words:
        processors.append(hf.NoBadWordsLogitsProcessor(words))
    if params.min_tokens:
        processors.append(hf.MinNewTokensLengthLogitsProcessor(prompt, params.min_tokens, eos))
    if params.logit_bias:
        processors.append(hf.SequenceBiasLogitsProcessor({(i,): v for i, v in params.logit_bias.items()}))
    if params.repetition_penalty != 1:
        processors.append(hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature:
        processors.append(hf.TemperatureLogitsWarper(params.temperature))
        processors.append(hf.MinPLogitsWarper(params.min_p))
        if params.top_k:
            processors.append(hf.TopKLogitsWarper(params.top_k))
        if params.top_p < 1:
            processors.append(hf.TopPLogitsWarper(params.top_p))
    scores = torch.tensor(logits)
    for processor in processors:
        scores = processor(torch.tensor(text, dtype=torch.int64), scores)
    return torch.log_softmax(scores.double(), -1).numpy()


@pytest.mark.parametrize("vocab", [40, 20_000])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"top_k": 7},
        {"top_p": 0.83},
        {"min_p": 0.07},
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2, "top_k": 30},
        {"no_repeat_ngram_size": 3},
        {"bad_words": ["7", "3 4", "0 1 5", "1 1 1 1"]},
        {"min_tokens": 30},
        {"logit_bias": {0: 2.0, 5: -3.0, 39: 0.5}},
        {"temperature": 0.0, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        {"temperature": 1.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
        {
            **{"temperature": 1.2, "top_k": 25, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1},
            **{"no_repeat_ngram_size": 2, "bad_words": ["7", "3 4"], "min_tokens": 30, "logit_bias": {1: 1.0}},
        },
    ],
    ids=str,
)
def test_the_distribution_is_transformers(options, vocab):
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(ROWS, vocab)) * 3).astype(np.float32)
    text = rng.integers(0, 6, (ROWS, 25)).astype(np.int32)
    params = SamplingParams(**options, logprobs_mode="processed", max_tokens=64)
    # transformers looks for bad words in the prompt too: there all of the text counts as the answer.
    prompt = 0 if params.bad_words else 10
    lengths = np.full(ROWS, text.shape[1], np.int32)
    history = History(*map(jnp.asarray, (np.pad(text, ((0, 0), (0, 7))), np.full(ROWS, prompt, np.int32), lengths)))
    encode = lambda text: [int(i) for i in text.split()]  # noqa: E731
    rows = pack([params] * ROWS, vocab_size=vocab, eos_ids=[EOS], encode=encode)
    expected = reference(params, logits, text, prompt)
    got = np.asarray(WHOLE(jnp.asarray(logits), rows, history))
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(expected))
    np.testing.assert_allclose(got, expected, atol=3e-5)
    chosen = DRAW(jnp.asarray(logits), rows, history, jnp.linspace(0.01, 0.99, ROWS))
    np.testing.assert_allclose(chosen.logprob, expected[np.arange(ROWS), chosen.token], atol=3e-5)
    if params.temperature == 0:
        assert chosen.token.tolist() == expected.argmax(-1).tolist()
