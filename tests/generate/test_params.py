"""Requests: names, ranges, contradictions; and their arrays."""

import jax
import numpy as np
import pytest

from jaxpost.generate.params import SamplingParams
from jaxpost.generate.rows import Widths, pack, pack_bits


def encode(text: str) -> list[int]:
    """A token a letter; a space is 0."""
    return [ord(letter) - ord("a") + 1 if letter != " " else 0 for letter in text]


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        ({"max_tokens": 3, "top_k": -1, "stop": ["a", "b"]}, SamplingParams(max_tokens=3, top_k=-1, stop=("a", "b"))),
        (
            {"max_completion_tokens": 9, "stop": "END", "logprobs": True, "top_logprobs": 3, "logit_bias": {"5": -100}},
            SamplingParams(max_tokens=9, stop=("END",), logprobs=3, logit_bias={5: -100.0}),
        ),
        ({"logprobs": True}, SamplingParams(logprobs=0)),
        ({"logprobs": False}, SamplingParams()),
        ({"top_logprobs": 2}, SamplingParams(logprobs=2)),
        ({"logprobs": 4, "prompt_logprobs": 1}, SamplingParams(logprobs=4, prompt_logprobs=1)),
        (
            {"max_new_tokens": 7, "min_new_tokens": 2, "do_sample": False, "num_return_sequences": 4, "top_p": None},
            SamplingParams(max_tokens=7, min_tokens=2, temperature=0.0, n=4),
        ),
        ({"do_sample": True, "temperature": 0.5}, SamplingParams(temperature=0.5)),
        ({"do_sample": False, "temperature": 0}, SamplingParams(temperature=0.0)),
        ({"max_tokens": 5, "max_new_tokens": 5}, SamplingParams(max_tokens=5)),
        ({"seed": -1}, SamplingParams()),
    ],
    ids=str,
)
def test_names_of_vllm_openai_and_hugging_face(mapping, expected):
    assert SamplingParams.from_mapping(mapping) == expected
    assert SamplingParams().updated(mapping) == expected


def test_what_a_mapping_says_takes_the_place_of_other_wishes():
    wish = SamplingParams(temperature=0.0, max_tokens=400, logprobs=2, seed=5, stop="a")
    assert wish.updated({}) == wish
    assert wish.updated({"max_new_tokens": 9, "logprobs": False, "seed": -1}) == SamplingParams(
        temperature=0.0, max_tokens=9, stop="a"
    )
    assert wish.updated({"min_tokens": 300}).min_tokens == 300  # more than the default of max_tokens
    assert wish.updated({"do_sample": True, "temperature": 0.5}).temperature == 0.5
    with pytest.raises(ValueError, match="do_sample=True, but temperature=0"):
        wish.updated({"do_sample": True})
    with pytest.raises(ValueError, match="min_tokens is 401, more than max_tokens, 400"):
        wish.updated({"min_tokens": 401})


@pytest.mark.parametrize(
    ("mapping", "said"),
    [
        ({"temprature": 1}, "'temprature'.*'temperature'"),
        ({"max_token": 1}, "'max_token'.*'max_tokens'"),
        ({"max_tokens": 5, "max_new_tokens": 6}, "max_tokens=5 and max_new_tokens=6"),
        ({"do_sample": False, "temperature": 0.5}, "do_sample=False.*temperature=0.5"),
        ({"do_sample": True, "temperature": 0}, "do_sample=True.*temperature=0"),
        ({"do_sample": "yes"}, "do_sample is 'yes'"),
        ({"logprobs": False, "top_logprobs": 3}, "logprobs=False and top_logprobs=3"),
        ({"logprobs": 2, "top_logprobs": 3}, "logprobs=2 and top_logprobs=3"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"temperature": 1e39}, "temperature is 1e[+]39"),
        ({"repetition_penalty": 1e-46}, "repetition_penalty is 1e-46"),
        ({"repetition_penalty": 1e39}, "repetition_penalty is 1e[+]39"),
        ({"logit_bias": {5: -1e39}}, "logit_bias of token 5 is -1e[+]39"),
        ({"no_repeat_ngram_size": 2**31}, "no_repeat_ngram_size is 2147483648"),
        ({"min_tokens": 2**31, "max_tokens": 2**31}, "max_tokens is 2147483648|min_tokens is 2147483648"),
        ({"temperature": True}, "temperature is True"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"top_k": -2}, "top_k is -2"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"n": 0}, "n is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"min_tokens": 9, "max_tokens": 5}, "min_tokens is 9.*max_tokens, 5"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"presence_penalty": 2.5}, "presence_penalty is 2.5"),
        ({"frequency_penalty": -3}, "frequency_penalty is -3"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1"),
        ({"stop": ["a", ""]}, "stop holds ''"),
        ({"stop": 5}, "stop is 5"),
        ({"stop": {"a": 1}}, "stop is {'a': 1}"),
        ({"allowed_token_ids": {4: 1}}, "allowed_token_ids is {4: 1}"),
        ({"bad_words": [""]}, "bad_words holds ''"),
        ({"stop_token_ids": [-1]}, "token id in stop_token_ids is -1"),
        ({"stop_token_ids": 7}, "stop_token_ids is 7"),
        ({"allowed_token_ids": []}, "allowed_token_ids is empty"),
        ({"logit_bias": {"x": 1}}, "token id in logit_bias is 'x'"),
        ({"logit_bias": {"3": float("inf")}}, "logit_bias of token 3 is inf"),
        ({"logit_bias": [3]}, r"logit_bias is \[3\]"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"logprobs_mode": "cooked"}, "logprobs_mode is 'cooked'.*raw, temperature, processed"),
        ({"ignore_eos": "no"}, "ignore_eos is 'no'"),
    ],
    ids=str,
)
def test_a_wrong_request_is_told_by_key_and_value(mapping, said):
    with pytest.raises(ValueError, match=said):
        SamplingParams.from_mapping(mapping)


def test_the_constructor_checks_too_and_takes_lists():
    with pytest.raises(ValueError, match="top_p is 2"):
        SamplingParams(top_p=2)
    params = SamplingParams(stop=["x"], stop_token_ids=[4], temperature=0, n=3)
    assert (params.stop, params.stop_token_ids, params.temperature) == (("x",), (4,), 0.0)
    numpys = SamplingParams.from_mapping({"stop_token_ids": np.array([4]), "top_p": np.float32(0.5)})
    assert (type(numpys.stop_token_ids[0]), type(numpys.top_p)) == (int, float)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        (SamplingParams(stop_token_ids=[27]), "stop_token_ids has token id 27.*0 to 26"),
        (SamplingParams(allowed_token_ids=[3, 99]), "allowed_token_ids has token id 99"),
        (SamplingParams(logit_bias={30: 1.0}), "logit_bias has token id 30"),
        (SamplingParams(bad_words=["A"]), "bad_words has token id"),
        (SamplingParams(allowed_token_ids=[1, 2], bad_words=["a", "b"]), "bans every token of allowed_token_ids"),
        (
            SamplingParams(allowed_token_ids=[5, 6], stop_token_ids=[6], min_tokens=2),
            "min_tokens=2 bans the end tokens",
        ),
    ],
)
def test_a_row_that_the_vocabulary_cannot_serve(params, said):
    with pytest.raises(ValueError, match=said):
        pack([params], vocab_size=27, eos_ids=[5], encode=encode)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_no_row_holds(seed):
    with pytest.raises(ValueError, match=f"seed is {seed}"):
        pack([SamplingParams()], vocab_size=4, eos_ids=[], seed=seed)


def test_a_share_that_float32_rounds_to_nothing_keeps_the_best_token():
    assert pack([SamplingParams(top_p=1e-60)], vocab_size=4, eos_ids=[]).top_p[0] > 0


def test_bad_words_need_a_tokenizer():
    with pytest.raises(ValueError, match="needs a tokenizer"):
        pack([SamplingParams(bad_words=["a"])], vocab_size=27, eos_ids=[])
    with pytest.raises(ValueError, match="'a', which has no tokens"):
        pack([SamplingParams(bad_words=["a"])], vocab_size=27, eos_ids=[], encode=lambda text: [])


def test_rows_are_what_was_asked_in_bucketed_widths():
    plain = SamplingParams(seed=5, temperature=1e-6, top_k=1000, logprobs_mode="processed")
    other = SamplingParams(
        logit_bias={1: 0.5, 2: -1.0, 3: 2.0},
        bad_words=["abc", "d"],
        stop_token_ids=[7, 5],
        allowed_token_ids=[4, 26, 7],
    )
    rows = pack([plain, other, plain], vocab_size=40, eos_ids=[5, 6], encode=encode, seed=9)
    assert {a.shape[0] for a in jax.tree.leaves(rows)} == {3}
    assert rows.temperature.tolist() == [0.0, 1.0, 0.0]
    assert rows.top_k.tolist() == [40, 0, 40]
    assert rows.seed.tolist() == [5, 9, 5]
    assert rows.logprobs_mode.tolist() == [2, 1, 2]
    assert rows.bias_ids.tolist() == [[-1] * 4, [1, 2, 3, -1], [-1] * 4]
    assert rows.bias[1].tolist() == [0.5, -1.0, 2.0, 0.0]
    assert rows.bad_words[1].tolist() == [[1, 2, 3, -1], [0, 1, 2, 3], [4, -1, -1, -1], [0, 4, -1, -1]]
    assert (rows.bad_words[0] == -1).all()
    assert rows.end_ids.tolist() == [[5, 6, -1, -1], [5, 6, 7, -1], [5, 6, -1, -1]]
    assert rows.allowed[0].tolist() == [2**32 - 1] * 2
    assert rows.allowed[1].tolist() == [(1 << 4) | (1 << 7) | (1 << 26), 0xFFFFFF00]
    wide = pack([plain], vocab_size=40, eos_ids=[], at_least=Widths.of(rows))
    assert [a.shape[1:] for a in wide] == [a.shape[1:] for a in rows]


def test_rows_that_ignore_the_models_end_keep_their_own():
    rows = pack([SamplingParams(ignore_eos=True, stop_token_ids=[2])], vocab_size=8, eos_ids=[5])
    assert rows.end_ids.tolist() == [[2]]


def test_bits_say_which_tokens():
    may = np.random.default_rng(0).random((3, 70)) < 0.5
    bits = pack_bits(may)
    assert bits.shape == (3, 3)
    for row, token in np.ndindex(3, 96):
        assert bool(bits[row, token // 32] >> np.uint32(token % 32) & 1) == (token >= 70 or may[row, token])
