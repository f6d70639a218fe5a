"""What is drawn against the distribution enumerated in float64 NumPy, written from the definitions."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.stages import Lowered

from jaxpost.generate.choose import Choice, choose, log_probabilities, top_logprobs
from jaxpost.generate.noise import row_keys, uniforms
from jaxpost.generate.params import SamplingParams
from jaxpost.generate.penalties import History
from jaxpost.generate.rows import RowParams, Widths, pack, pack_bits

VOCAB, DRAWS, BATCH, EOS = 24, 40_000, 4_000, 3
LOGITS = (np.random.default_rng(0).normal(size=VOCAB) * 1.7).astype(np.float32)
PROMPT, ANSWER = [5, 9, 5, 1], [7, 2, 7, 7, 9]
jitted, whole = jax.jit(choose), jax.jit(log_probabilities)


def history(count: int = 1, prompt=PROMPT, answer=ANSWER, width: int = 16) -> History:
    text = np.zeros((count, width), np.int32)
    text[:, : len(prompt) + len(answer)] = [*prompt, *answer]
    lengths = np.full(count, len(prompt), np.int32)
    return History(jnp.asarray(text), jnp.asarray(lengths), jnp.asarray(lengths + len(answer)))


def packed(*params: SamplingParams, vocab: int = VOCAB) -> RowParams:
    encode = lambda text: [int(i) for i in text.split()]  # noqa: E731
    return pack(params, vocab_size=vocab, eos_ids=[EOS], encode=encode, at_least=Widths(bias=4, words=8, word=4))


def draw(logits, params: SamplingParams, uniform, **keywords) -> Choice:
    """One row for each number."""
    return batch(np.asarray(logits)[None], packed(params, vocab=np.shape(logits)[-1]), uniform, **keywords)


def batch(logits: np.ndarray, rows: RowParams, uniform, **keywords) -> Choice:
    """Small vocabularies in batches of one size, so that one program serves most tests."""
    count = len(uniform)
    size = count if logits.shape[-1] > 1000 else BATCH
    take = lambda a: jnp.asarray(np.resize(a, (size, *a.shape[1:])))  # noqa: E731
    rows = jax.tree.map(take, rows)
    choice = jitted(take(logits), rows, history(size), take(np.asarray(uniform, np.float32)), **keywords)
    return jax.tree.map(lambda a: np.asarray(a[:count]), choice)


def edited(params: SamplingParams) -> np.ndarray:
    """Logits before the temperature, one token after another."""
    x = LOGITS.astype(np.float64).copy()
    text = [*PROMPT, *ANSWER]
    for token in range(VOCAB):
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            x[token] = -np.inf
        for word in params.bad_words:
            *before, last = (int(i) for i in word.split())
            if last == token and ANSWER[len(ANSWER) - len(before) :] == before:
                x[token] = -np.inf
        n = params.no_repeat_ngram_size
        if n and [*text, token][len(text) - n + 1 :] in [text[i : i + n] for i in range(len(text) - n + 1)]:
            x[token] = -np.inf
        if token == EOS and len(ANSWER) < params.min_tokens:
            x[token] = -np.inf
        x[token] += params.logit_bias.get(token, 0.0)
        if token in text:
            x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
        x[token] -= params.frequency_penalty * ANSWER.count(token) + params.presence_penalty * (token in ANSWER)
    return x


def softmax(x: np.ndarray) -> np.ndarray:
    w = np.exp(x - x.max())
    return w / w.sum()


def distribution(params: SamplingParams) -> np.ndarray:
    p = softmax(edited(params) / params.temperature)
    p = np.where(p >= params.min_p * p.max(), p, 0)
    order = np.argsort(-p, kind="stable")
    if params.top_k > 0:
        p[order[params.top_k :]] = 0
    p /= p.sum()
    kept = int(np.searchsorted(np.cumsum(p[order]), params.top_p * (1 - 1e-12))) + 1
    p[order[kept:]] = 0
    return p / p.sum()


def chi_squared_p_value(counts: np.ndarray, p: np.ndarray) -> float:
    """0 if anything impossible was drawn; cells of fewer than 5 expected are put together (Wilson-Hilferty's tail)."""
    if counts[p == 0].any():
        return 0.0
    expected = p * counts.sum()
    large = expected >= 5
    groups = [*zip(counts[large], expected[large], strict=True), (counts[~large].sum(), expected[~large].sum())]
    statistic = sum((c - e) ** 2 / e for c, e in groups if e > 0)
    freedom = sum(e > 0 for _, e in groups) - 1
    if freedom == 0:
        return 1.0
    spread = 2 / (9 * freedom)
    z = ((statistic / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5
    return 0.5 * float(jax.scipy.special.erfc(jnp.float32(z / 2**0.5)))


def frequencies(params: SamplingParams) -> np.ndarray:
    """Counts over DRAWS numbers of one row's noise, its positions being the draws."""
    ids = jnp.zeros(1, jnp.int32)
    key = row_keys(jnp.asarray([7], jnp.uint32), ids, ids, ids)
    counts = np.zeros(VOCAB)
    for start in range(0, DRAWS, BATCH):
        number = uniforms(jnp.repeat(key, BATCH), jnp.arange(start, start + BATCH))
        choice = draw(LOGITS, params, number)
        assert not choice.stuck.any()
        counts += np.bincount(choice.token, minlength=VOCAB)
    return counts


OPTIONS = {
    "temperature 1": {},
    "temperature 0.6": {"temperature": 0.6},
    "temperature 3": {"temperature": 3.0},
    "top_k": {"top_k": 5},
    "top_k 1": {"top_k": 1},
    "top_k of all": {"top_k": 1000},
    "top_p": {"top_p": 0.8},
    "top_p of nearly nothing": {"top_p": 1e-6},
    "min_p": {"min_p": 0.08},
    "min_p 1": {"min_p": 1.0},
    "repetition": {"repetition_penalty": 1.5},
    "repetition below 1": {"repetition_penalty": 0.7},
    "presence": {"presence_penalty": 1.3},
    "frequency": {"frequency_penalty": 0.9},
    "negative frequency": {"frequency_penalty": -0.5},
    "ngram 1": {"no_repeat_ngram_size": 1},
    "ngram 2": {"no_repeat_ngram_size": 2},
    "min_tokens": {"min_tokens": 6},
    "min_tokens reached": {"min_tokens": 5},
    "bias": {"logit_bias": {0: 3.0, 11: -2.5, 23: 1.0}},
    "allowed": {"allowed_token_ids": [0, 3, 4, 17, 23]},
    "bad words": {"bad_words": ["8", "7 9 4", "9 6", "1 9 2", "2 9 10"]},
    "top_k and top_p": {"top_k": 8, "top_p": 0.7, "temperature": 1.4},
    "all three cuts": {"top_k": 9, "top_p": 0.85, "min_p": 0.02, "temperature": 1.8},
    "penalties": {"repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.3, "top_p": 0.9},
    "everything": {
        **{"temperature": 1.3, "top_k": 12, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2, "min_tokens": 9},
        **{"presence_penalty": 0.4, "frequency_penalty": 0.3, "no_repeat_ngram_size": 3, "logit_bias": {2: 1.5}},
        **{"allowed_token_ids": [*range(1, 22)], "bad_words": ["9 12", "20"]},
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_frequencies_are_those_of_the_enumerated_distribution(options):
    params = SamplingParams(**options)
    assert chi_squared_p_value(frequencies(params), distribution(params)) > 1e-3


@pytest.mark.parametrize(
    "wrong", [{"temperature": 0.96}, {"top_k": 20}, {"repetition_penalty": 1.1}, {"logit_bias": {6: 0.1}}], ids=str
)
def test_the_chi_squared_test_tells_a_slightly_wrong_distribution(wrong):
    assert chi_squared_p_value(frequencies(SamplingParams()), distribution(SamplingParams(**wrong))) < 1e-3


def test_greedy_takes_the_best_of_the_edited_logits_and_the_first_of_equals():
    params = SamplingParams(temperature=0.0, repetition_penalty=2.0, top_k=3, logit_bias={4: 2.0})
    assert int(draw(LOGITS, params, [0.99]).token[0]) == edited(params).argmax()
    ties = np.zeros(VOCAB, np.float32)
    ties[[6, 9, 23]] = 2.0
    assert draw(ties, SamplingParams(temperature=0), [0.0, 0.5, 0.999]).token.tolist() == [6, 6, 6]


def test_top_k_keeps_exactly_k_of_equals_by_lowest_id():
    x = np.full(VOCAB, -9.0, np.float32)
    x[:8] = [1.0, 0.0, 2.0, 0.0, -0.0, 0.0, -1.0, 0.0]
    numbers = np.linspace(0, 1, 997, endpoint=False)
    for k, kept in (
        (1, {2}),
        (2, {0, 2}),
        (3, {0, 1, 2}),
        (4, {0, 1, 2, 3}),
        (5, {0, 1, 2, 3, 4}),
        (7, set(range(8)) - {6}),
    ):
        drawn = draw(x, SamplingParams(top_k=k), numbers)
        assert set(drawn.token.tolist()) == kept


@pytest.mark.parametrize("p", [0.5, 0.26, 0.25, 0.76])
def test_top_p_keeps_the_fewest_of_equals_by_lowest_id(p):
    x = np.where(np.arange(VOCAB) < 8, -3.0, -np.inf).astype(np.float32)
    drawn = draw(x, SamplingParams(top_p=p), np.linspace(0, 1, 997, endpoint=False))
    assert set(drawn.token.tolist()) == set(range(int(np.ceil(p * 8))))


def test_cuts_are_exact_for_logits_of_every_size():
    """Values that differ by one unit in the last place, in the middle of large, small and denormal numbers."""
    rng = np.random.default_rng(1)
    for trial in range(20):
        x = np.float32(10.0 ** rng.uniform(-38, 30)) * rng.normal(size=200).astype(np.float32)
        x[17:20] = np.nextafter(x[20], np.float32([np.inf, -np.inf, np.inf]))
        x[rng.choice(200, 30, replace=False)] = -np.inf
        k = int(rng.integers(1, 150))
        params = SamplingParams(top_k=k, temperature=1e30, logprobs_mode="processed")
        row = packed(params, vocab=200)
        logprobs = np.asarray(whole(jnp.asarray(x[None]), row, history()))[0]
        expected = set(np.argsort(-x, kind="stable")[:k].tolist())
        assert set(np.flatnonzero(logprobs > -np.inf).tolist()) == expected, trial


@pytest.mark.parametrize("shape", ["peaked", "flat", "ties", "few"])
def test_cuts_of_a_large_vocabulary_are_the_sorted_ones(shape):
    """More tokens than the blocks that are looked at first."""
    vocab, rng = 20_001, np.random.default_rng(6)
    x = rng.normal(size=(6, vocab)) * {"peaked": 6, "flat": 0.3, "ties": 2, "few": 2}[shape]
    x = (np.round(x, 1) if shape == "ties" else x).astype(np.float32)
    if shape == "few":
        x[:, 700:] = -np.inf
    asked = [{"top_k": 40}, {"top_k": 3000}, {"top_p": 0.7}, {"top_k": 60, "top_p": 0.9}, {"min_p": 0.3}, {"top_k": 1}]
    params = [SamplingParams(**one, logprobs_mode="processed", temperature=0.8) for one in asked]
    found = np.asarray(whole(jnp.asarray(x), packed(*params, vocab=vocab), history(6))) > -np.inf
    for row, one in enumerate(params):
        p = softmax(x[row].astype(np.float64) / 0.8)
        p = np.where(p >= one.min_p * p.max(), p, 0)
        order = np.lexsort((np.arange(vocab), -x[row]))
        p[order[one.top_k or vocab :]] = 0
        sums = np.cumsum(p[order]) / p.sum()
        count = int(np.searchsorted(sums, one.top_p)) + 1 if one.top_p < 1 else int((p > 0).sum())
        kept = np.flatnonzero(found[row])
        assert abs(len(kept) - count) <= (2 if one.top_p < 1 else 0), asked[row]  # sums of float32 near p
        assert set(kept.tolist()) == set(order[: len(kept)].tolist()), asked[row]


def test_the_inverse_of_a_large_vocabulary_is_near_float64s():
    rng = np.random.default_rng(2)
    x = (rng.normal(size=50_257) * 3).astype(np.float32)
    numbers = rng.random(64).astype(np.float32)
    tokens = np.asarray(draw(x, SamplingParams(temperature=0.9), numbers).token)
    p = softmax(x.astype(np.float64) / 0.9)
    ends = np.cumsum(p)
    assert (numbers <= ends[tokens] + 2e-6).all()
    assert (numbers >= ends[tokens] - p[tokens] - 2e-6).all()


@pytest.mark.parametrize("number", [0.0, 0.3, 1 - 2**-24])
@pytest.mark.parametrize(
    "options", [{}, {"top_p": 0.9}, {"temperature": 0}, {"top_k": 2, "temperature": 1e-4}], ids=str
)
def test_extremes_stay_finite_and_never_draw_what_has_no_probability(options, number):
    one = np.full(VOCAB, -np.inf, np.float32)
    one[20] = -1e4
    large = np.linspace(-2e4, 2e4, VOCAB).astype(np.float32)
    large[-1] = -np.inf
    flat = np.full(VOCAB, 3e38, np.float32)
    for x in (one, large, flat):
        choice = draw(x, SamplingParams(**options), [number])
        assert np.isfinite(choice.logprob).all()
        assert np.isfinite(x[choice.token[0]])
        assert not choice.stuck[0]
    assert int(draw(one, SamplingParams(**options), [number]).token[0]) == 20
    assert int(draw(large, SamplingParams(**options), [number]).token[0]) == VOCAB - 2


@pytest.mark.parametrize(
    "options", [{}, {"top_p": 0.9}, {"temperature": 0.0}, {"repetition_penalty": 1.1, "top_k": 3}], ids=str
)
def test_a_row_without_tokens_is_stuck_and_the_others_go_on(options):
    x = np.tile(LOGITS, (5, 1))
    x[1] = -np.inf
    x[2, 4] = np.nan
    x[3, 4] = np.inf
    x[4] = np.nan
    choice = batch(x, packed(*[SamplingParams(**options, logprobs_mode="processed")] * 5), [0.4] * 5)
    assert choice.stuck.tolist() == [False, True, True, True, True]
    assert choice.logprob[1:].tolist() == [0.0] * 4
    assert np.isfinite(choice.logprob).all()


def test_a_mask_of_bits_allows_only_its_tokens():
    may = np.zeros(VOCAB, bool)
    may[[2, 20]] = True
    mask = jnp.asarray(np.tile(pack_bits(may), (BATCH, 1)))
    choice = draw(LOGITS, SamplingParams(), np.linspace(0, 0.999, 50), mask=mask)
    assert set(choice.token.tolist()) == {2, 20}


@pytest.mark.parametrize("mode", ["raw", "temperature", "processed"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"temperature": 1.6, "top_k": 6, "presence_penalty": 0.5},
    ],
    ids=str,
)
def test_log_probabilities_by_name(mode, options):
    params = SamplingParams(**options, logprobs_mode=mode)
    heat = params.temperature or 1.0
    expected = {
        "raw": softmax(LOGITS.astype(np.float64)),
        "temperature": softmax(LOGITS.astype(np.float64) / heat),
        "processed": distribution(params) if params.temperature else softmax(edited(params)),
    }[mode]
    choice = draw(LOGITS, params, np.linspace(0, 0.99, 40))
    np.testing.assert_allclose(choice.logprob, np.log(expected[choice.token]), atol=2e-6)
    full = whole(jnp.asarray(LOGITS[None]), packed(params), history())
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(full[0], np.log(expected), atol=2e-6)
    values, ids = top_logprobs(full, 4)
    assert ids[0].tolist() == np.argsort(-expected, kind="stable")[:4].tolist()
    np.testing.assert_allclose(values[0], np.log(expected[ids[0]]), atol=2e-6)


def test_log_probabilities_of_a_row_without_tokens_are_minus_infinity():
    row = packed(SamplingParams(logprobs_mode="processed", top_k=2))
    assert whole(jnp.full((1, VOCAB), -jnp.inf), row, history()).tolist() == [[-np.inf] * VOCAB]


def mixed_rows() -> tuple[np.ndarray, list[SamplingParams]]:
    params = [
        SamplingParams(**options, logprobs_mode=mode) for options in OPTIONS.values() for mode in ("raw", "processed")
    ]
    params += [SamplingParams(temperature=0.0), SamplingParams(temperature=0.0, frequency_penalty=1.0)]
    return np.random.default_rng(3).normal(size=(len(params), VOCAB)).astype(np.float32) * 2, params


def test_a_row_does_not_depend_on_the_others_of_its_batch():
    x, params = mixed_rows()
    number = np.random.default_rng(4).random(len(params)).astype(np.float32)
    together = batch(x, packed(*params), number)
    for at in range(0, len(params), 3):
        alone = draw(x[at], params[at], number[at : at + 1])
        assert int(alone.token[0]) == int(together.token[at])
        np.testing.assert_allclose(alone.logprob[0], together.logprob[at], atol=1e-6)


def test_values_of_parameters_never_recompile():
    draw(LOGITS, SamplingParams(), [0.5])
    programs = jitted._cache_size()
    for options in OPTIONS.values():
        draw(LOGITS, SamplingParams(**options), [0.5])
    assert jitted._cache_size() == programs


def lowered(vocab: int = 1000) -> Lowered:
    rows = packed(SamplingParams(), SamplingParams(), vocab=vocab)
    return jitted.lower(jnp.zeros((2, vocab)), rows, history(2), jnp.zeros(2))


def test_the_program_sorts_nothing_and_keeps_its_conditions():
    text = lowered().compile().as_text()
    assert not re.search(r"= [^=]* (sort|topk)\(|TopK", text)
    assert len(re.findall(r" conditional\(", text)) >= 8
    # Without edits and cuts, what runs outside of any branch does not touch the vocabulary but for its maximum.
    shapes = re.findall(r"(\w+)\[2,1000\]", text[text.index("ENTRY") :].split("\n}")[0])
    assert shapes
    assert len(shapes) <= 4


def test_noise_depends_on_meaning_alone():
    rng = np.random.default_rng(5)
    ids = [jnp.asarray(rng.integers(0, 50, 64), jnp.int32) for _ in range(4)]
    seeds = jnp.asarray(rng.integers(0, 2**32, 64), jnp.uint32)
    numbers = uniforms(row_keys(seeds, *ids[:3]), ids[3])
    assert ((numbers > 0) & (numbers < 1)).all()
    assert len(np.unique(numbers)) == 64
    order = rng.permutation(64)[:10]
    some = uniforms(row_keys(seeds[order], *(i[order] for i in ids[:3])), ids[3][order])
    assert some.tolist() == numbers[order].tolist()
    for changed in range(5):
        arguments = [a[:1] for a in (seeds, *ids)]
        arguments[changed] = arguments[changed] + arguments[changed].dtype.type(1)
        assert float(uniforms(row_keys(*arguments[:4]), arguments[4])[0]) != float(numbers[0])


def test_noise_is_the_fold_of_its_names_in_order():
    key = jax.random.key(11, impl="threefry2x32")
    for number in (2, 30, 4, 5):
        key = jax.random.fold_in(key, number)
    one = lambda i: jnp.asarray([i], jnp.int32)  # noqa: E731
    number = uniforms(row_keys(jnp.asarray([11], jnp.uint32), one(2), one(30), one(4)), one(5))
    assert float(number[0]) == (2 * (int(jax.random.bits(key, (), jnp.uint32)) >> 9) + 1) / 2**24
