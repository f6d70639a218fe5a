"""Each processor against a loop over rows and tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.generate import penalties
from jaxpost.generate.params import SamplingParams
from jaxpost.generate.penalties import History
from jaxpost.generate.rows import pack, pack_bits

VOCAB, ROWS, WIDTH = 9, 40, 14


@pytest.fixture(scope="module")
def case() -> tuple[np.ndarray, History, list[list[int]], list[list[int]]]:
    """Random texts of few tokens, of every length (also empty answers), with rubbish behind their ends."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(1, 7, ROWS)
    lengths = prompts + rng.integers(0, WIDTH - 6, ROWS)
    tokens = rng.integers(0, VOCAB - 4, (ROWS, WIDTH))
    texts = [tokens[row, : lengths[row]].tolist() for row in range(ROWS)]
    answers = [tokens[row, prompts[row] : lengths[row]].tolist() for row in range(ROWS)]
    as_int = lambda a: jnp.asarray(a, jnp.int32)  # noqa: E731
    return (
        rng.normal(size=(ROWS, VOCAB)).astype(np.float32) * 3,
        History(as_int(tokens), as_int(prompts), as_int(lengths)),
        texts,
        answers,
    )


def test_repetition_frequency_and_presence(case):
    logits, history, texts, answers = case
    rng = np.random.default_rng(1)
    repetition = rng.uniform(0.5, 2, ROWS).astype(np.float32)
    presence, frequency = rng.uniform(-2, 2, (2, ROWS)).astype(np.float32)
    expected = logits.copy()
    for row in range(ROWS):
        for token in set(texts[row]):
            x = expected[row, token]
            expected[row, token] = x / repetition[row] if x > 0 else x * repetition[row]
        for token in set(answers[row]):
            expected[row, token] -= frequency[row] * answers[row].count(token) + presence[row]
    got = jax.jit(penalties.penalise)(
        jnp.asarray(logits), *map(jnp.asarray, (repetition, presence, frequency)), history
    )
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_repeated_ngrams(case):
    logits, history, texts, _ = case
    sizes = np.arange(ROWS) % 6
    expected = np.zeros(logits.shape, bool)
    for row, (text, size) in enumerate(zip(texts, sizes, strict=True)):
        runs = {tuple(text[i : i + size]) for i in range(len(text) - size + 1)} if size else set()
        for token in range(VOCAB):
            expected[row, token] = size > 0 and len(text) >= size - 1 and (*text, token)[len(text) + 1 - size :] in runs
    assert expected.any(axis=1).sum() > 10
    got = jax.jit(penalties.ban_ngrams)(jnp.asarray(logits), jnp.asarray(sizes, jnp.int32), history)
    np.testing.assert_array_equal(got, np.where(expected, -np.inf, logits))


def test_bad_words_are_completed_in_the_answer_only(case):
    logits, history, _, answers = case
    rng = np.random.default_rng(2)
    words = np.full((ROWS, 4, 4), -1)
    expected = logits.copy()
    banned = 0
    for row in range(ROWS):
        for slot in range(3):
            word = rng.integers(0, VOCAB - 4, rng.integers(1, 5)).tolist()
            if slot == 0 and len(answers[row]) >= 2:
                word = [*answers[row][-2:], 8]
            words[row, slot, : len(word)] = word
            before = word[:-1]
            if len(before) <= len(answers[row]) and answers[row][len(answers[row]) - len(before) :] == before:
                expected[row, word[-1]] = -np.inf
                banned += len(before) > 0
    assert banned > 10
    got = jax.jit(penalties.ban_words)(jnp.asarray(logits), jnp.asarray(words, jnp.int32), history)
    np.testing.assert_array_equal(got, expected)


def test_bias_bits_and_end_tokens(case):
    logits, history, _, answers = case
    params = [
        SamplingParams(logit_bias={0: 1.5, 8: -2.0}),
        SamplingParams(allowed_token_ids=[1, 8]),
        SamplingParams(min_tokens=4, stop_token_ids=[6]),
        SamplingParams(min_tokens=4, stop_token_ids=[6], ignore_eos=True),
    ] * (ROWS // 4)
    expected = logits.copy()
    for row in range(ROWS):
        if row % 4 == 0:
            expected[row, [0, 8]] += [1.5, -2.0]
        elif row % 4 == 1:
            expected[row, [0, *range(2, 8)]] = -np.inf
        elif len(answers[row]) < 4:
            expected[row, [2, 6] if row % 4 == 2 else [6]] = -np.inf
    rows = pack(params, vocab_size=VOCAB, eos_ids=[2])
    got = jax.jit(penalties.edit_logits)(jnp.asarray(logits), jax.tree.map(jnp.asarray, rows), history)
    np.testing.assert_array_equal(got, expected)


def test_nothing_asked_changes_nothing_and_says_so(case):
    logits, history, _, _ = case
    rows = jax.tree.map(jnp.asarray, pack([SamplingParams()] * ROWS, vocab_size=VOCAB, eos_ids=[2]))
    assert not penalties.edits(rows, history)
    np.testing.assert_array_equal(penalties.edit_logits(jnp.asarray(logits), rows, history), logits)
    one = rows._replace(min_tokens=rows.min_tokens.at[3].set(100))
    assert penalties.edits(one, history)


def test_a_grammars_mask_and_allowed_tokens_are_both_kept(case):
    logits, history, _, _ = case
    rows = jax.tree.map(
        jnp.asarray, pack([SamplingParams(allowed_token_ids=[1, 8])] * ROWS, vocab_size=VOCAB, eos_ids=[])
    )
    may = np.zeros((ROWS, VOCAB), bool)
    may[:, [1, 3]] = True
    got = penalties.edit_logits(jnp.asarray(logits), rows, history, jnp.asarray(pack_bits(may)))
    assert (np.flatnonzero(got[0] > -np.inf) == [1]).all()


def test_a_run_longer_than_any_text_is_found_nowhere_and_at_once():
    tokens = jnp.asarray([[1, 1, 1, 0]])
    history = History(tokens, jnp.asarray([1]), jnp.asarray([3]))
    logits = jnp.zeros((1, 4))
    assert (penalties.ban_ngrams(logits, jnp.asarray([2**31 - 1]), history) == logits).all()
    assert penalties.ban_ngrams(logits, jnp.asarray([3]), history)[0, 1] == -jnp.inf
