"""A sampler over HTTP against a server of our own that answers, fails and lies as it is told."""

import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
from toy_server import Fake, echo
from toy_text import CHATML, fast_tokenizer

from jaxpost.generate.external import RowsFailed, connect, rescore, to_openai
from jaxpost.generate.http_json import Server, ServerError
from jaxpost.generate.params import SamplingParams
from jaxpost.generate.reply import Answer
from jaxpost.generate.samples import Completion
from jaxpost.text.tokenizer import Tokenizer

QUICK = {"timeout": 5.0, "retries": 2, "backoff": 0.01}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(fast_tokenizer("chatml", CHATML))


@pytest.fixture
def fake():
    server = Fake()
    yield server
    server.close()


@pytest.fixture
def sampler(fake, tokenizer):
    return connect(fake.url, "tiny", tokenizer=tokenizer, **QUICK)


def test_answers_come_in_order_whatever_the_order_they_were_made_in(fake, sampler):
    def slow_first(body, tried):
        time.sleep(0.2 / body["prompt"][0])
        return 200, echo(body)

    fake.answer = slow_first
    prompts = [[i, i + 10] for i in range(1, 9)]
    done = sampler(None, prompts, SamplingParams(n=2, logprobs=1), policy_version=3, example_ids=range(100, 108))
    assert [c.tokens for c in done] == [tuple(p) for p in prompts for _ in range(2)]
    assert [(c.example, c.sample) for c in done] == [(i, k) for i in range(100, 108) for k in range(2)]
    assert {c.policy_version for c in done} == {3}
    assert fake.most_busy > 1
    first = done[0]
    assert first.logprobs == (-1.0, -11.0)
    assert first.best == (((1, -1.0),), ((7, -9.0),))
    assert (first.finish, first.text, first.error) == ("length", "echo", None)


def test_concurrency_is_bounded(fake, tokenizer):
    def slow(body, tried):
        time.sleep(0.03)
        return 200, echo(body)

    fake.answer = slow
    connect(fake.url, "tiny", tokenizer=tokenizer, concurrency=2, **QUICK)(None, [[i] for i in range(8)])
    assert fake.most_busy == 2


def test_seeds_depend_on_the_meaning_of_a_draw_alone(fake, sampler):
    def seeds(prompts, **more):
        fake.bodies.clear()
        sampler(None, prompts, SamplingParams(n=2), **more)
        return {(b["prompt"][0], b["seed"]) for b in fake.bodies}

    one = seeds([[1], [2]], seed=5, draw=1)
    assert len({seed for _, seed in one}) == 4
    assert all(0 <= seed < 2**31 for _, seed in one)
    assert one == seeds([[2], [1]], seed=5, draw=1, example_ids=[1, 0])
    assert not one & seeds([[1], [2]], seed=5, draw=2)
    assert not one & seeds([[1], [2]], seed=6, draw=1)


def test_a_failed_row_is_told_by_number_and_the_others_go_on(fake, sampler):
    def second_fails(body, tried):
        if body["prompt"] == [2]:
            return 400, {"error": {"message": "prompt too long\x1b[31m", "type": "BadRequestError"}}
        return 200, echo(body)

    fake.answer = second_fails
    done = sampler(None, [[1], [2], [3], []], errors="return")
    assert [c.finish for c in done] == ["length", "error", "length", "error"]
    assert "prompt 1, sample 0" in done[1].error
    assert "400: 'prompt too long\\x1b[31m'" in done[1].error
    assert done[1].tokens == ()
    assert "prompt is empty" in done[3].error
    with pytest.raises(RowsFailed, match=r"2 of 4 samples failed \(numbers 1, 3\).*prompt too long") as caught:
        sampler(None, [[1], [2], [3], []])
    assert [c.tokens for c in caught.value.completions] == [(1,), (), (3,), ()]
    assert fake.tries["[2]"] == 2  # a bad request is not sent again


def test_what_may_pass_is_tried_again(fake, sampler):
    def third_time(body, tried):
        if tried == 1:
            return 503, b"<html>starting</html>"
        if tried == 2:
            return 429, {"message": "slow down"}, [("Retry-After", "0")]
        return 200, echo(body)

    fake.answer = third_time
    assert sampler(None, [[4]])[0].tokens == (4,)
    assert fake.tries["[4]"] == 3
    fake.answer = lambda body, tried: (503, {"detail": "still starting"})
    [lost] = sampler(None, [[5]], errors="return")
    assert "503: 'still starting', after 3 tries" in lost.error


def test_a_server_that_does_not_answer(fake, tokenizer):
    def hang(body, tried):
        if body["prompt"] == [1]:
            time.sleep(0.6)
        return 200, echo(body)

    fake.answer = hang
    impatient = connect(fake.url, "tiny", tokenizer=tokenizer, timeout=0.2, retries=1, backoff=0.0)
    slow, quick = impatient(None, [[1], [2]], errors="return")
    assert "did not answer within 0.2 s, after 2 tries" in slow.error
    assert quick.tokens == (2,)
    fake.close()
    with pytest.raises(ServerError, match=r"cannot be reached .*is the server running"):
        connect(fake.url, "tiny", tokenizer=tokenizer, timeout=1.0, retries=0)
    gone = impatient(None, [[2]], errors="return")[0]
    assert "cannot be reached" in gone.error


HUGE = 10**400
"""JSON, but more than a float holds."""


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (b"not json", "not JSON: 'not json'"),
        (b"[" * 100_000, "not JSON"),
        ([1], "no completion"),
        ({"choices": []}, "no completion"),
        ({"choices": [{"text": 5}]}, "no completion"),
        ({"choices": [{"text": "a", "finish_reason": "abort"}]}, "'abort'"),
        ({"choices": [{"text": "a", "finish_reason": "stop", "token_ids": [10**9]}]}, "token 1000000000 is not"),
        ({"choices": [{"text": "a", "finish_reason": "stop", "token_ids": [-1]}]}, "token -1 is not"),
        (
            {"choices": [{"text": "a", "finish_reason": "stop", "token_ids": [1], "logprobs": {"token_logprobs": []}}]},
            None,
        ),
        (
            {
                "choices": [
                    {"text": "a", "finish_reason": "stop", "token_ids": [1], "logprobs": {"token_logprobs": [-1, -2]}}
                ]
            },
            "2 log-probabilities, not all numbers, for 1 tokens",
        ),
        (
            b'{"choices": [{"text": "", "finish_reason": "stop", "token_ids": [1],'
            b'"logprobs": {"token_logprobs": [NaN]}}]}',
            "not all numbers",
        ),
        (
            {
                "choices": [
                    {"text": "", "finish_reason": "stop", "token_ids": [1], "logprobs": {"token_logprobs": [HUGE]}}
                ]
            },
            "not all numbers",
        ),
        (b'{"choices": [{"text": "a\\ud83d", "finish_reason": "length"}]}', "half a surrogate pair"),
        ({"choices": [{"text": "__import__('os')", "finish_reason": "stop", "token_ids": [1]}]}, None),
    ],
)
def test_an_answer_that_is_none(fake, sampler, reply, told):
    fake.answer = lambda body, tried: (200, reply)
    [done] = sampler(None, [[1]], errors="return")
    if told is None:
        assert done.error is None
        assert done.tokens == (1,)
        assert done.logprobs == ()
    else:
        assert done.finish == "error"
        assert told in done.error


def test_without_token_ids_the_text_is_encoded_again_and_flagged(fake, sampler, tokenizer):
    text = "The quick fox"
    words = {"tokens": ["The", " quick", " fox"], "token_logprobs": [-1.0, -2.0, -3.0]}
    fake.answer = lambda body, tried: (
        200,
        {"choices": [{"text": text, "finish_reason": "stop", "logprobs": words}]},
    )
    [answer] = sampler.answers(["What is"])
    assert answer.reencoded
    assert answer.prompt == tuple(tokenizer.encode("What is"))
    assert answer.completion.tokens == (*tokenizer.encode(text), *tokenizer.eos_ids)
    assert answer.completion.logprobs == ()
    [stopped] = sampler.answers(["What is"], SamplingParams(stop=["."]))
    assert stopped.completion.tokens == tuple(tokenizer.encode(text))


def test_token_ids_in_other_forms(fake, sampler):
    content = [{"id": 5, "token": "a", "logprob": -0.5, "top_logprobs": [{"id": 6, "logprob": -2.0}]}]
    told = {"text": "a", "finish_reason": "stop", "stop_reason": 9, "logprobs": {"content": content}}
    fake.answer = lambda body, tried: (200, {"choices": [told]})
    [answer] = sampler.answers([[1]], SamplingParams(logprobs=2))
    assert not answer.reencoded
    assert answer.completion.tokens == (5,)
    assert answer.completion.logprobs == (-0.5,)
    assert answer.completion.best == (((6, -2.0),),)
    assert answer.completion.stop == 9
    fake.answer = lambda body, tried: (200, echo(body, token_ids=None))
    assert sampler.answers([[1, 2]])[0].completion.tokens == (1, 2)


def test_log_probabilities_of_the_prompt(fake, sampler):
    rows = [None, {"2": {"logprob": -0.25}, "9": {"logprob": -0.1}}, {"3": {"logprob": -0.75}}]
    fake.answer = lambda body, tried: (200, echo(body, prompt_logprobs=rows))
    assert sampler(None, [[1, 2, 3]], SamplingParams(prompt_logprobs=1))[0].prompt_logprobs == (-0.25, -0.75)
    assert fake.bodies[0]["prompt_logprobs"] == 1
    for wanted, best in ((0, ()), (1, (((9, -0.1),), ((3, -0.75),))), (2, (((9, -0.1), (2, -0.25)), ((3, -0.75),)))):
        assert sampler(None, [[1, 2, 3]], SamplingParams(prompt_logprobs=wanted))[0].prompt_best == best
    assert sampler(None, [[1, 2]])[0].prompt_logprobs == ()


def test_what_was_asked_for_and_not_told_is_said(fake, sampler):
    [answer] = sampler.answers([[1, 2]], SamplingParams(logprobs=0, prompt_logprobs=1))
    assert answer.untold == ("prompt_logprobs",)
    assert (answer.completion.logprobs, answer.completion.best) == ((-1.0, -2.0), ((), ()))
    fake.answer = lambda body, tried: (200, echo(body, token_ids=[4], logprobs=None))
    assert sampler.answers([[1]], SamplingParams(logprobs=2, prompt_logprobs=0))[0].untold == ("logprobs",)
    assert sampler.answers([[1, 2]])[0].untold == ()


@pytest.mark.parametrize(("told", "count"), [(5, 5), (0, 0), (-5, None), (True, None), (3.0, None)])
def test_tokens_are_as_many_as_the_server_can_have_counted(fake, told, count):
    reply = {"choices": [{"text": "a", "finish_reason": "stop"}], "usage": {"completion_tokens": told}}
    fake.answer = lambda body, tried: (200, reply)
    [answer] = connect(fake.url, "tiny", tokenizer=None, **QUICK).answers(["Hi"])
    assert answer.count == count


def test_a_model_that_is_not_served(fake, tokenizer):
    with pytest.raises(ValueError, match="does not serve 'big'; it serves 'tiny', 'other'"):
        connect(fake.url, "big", tokenizer=tokenizer, **QUICK)
    fake.models = (404, {"detail": "Not Found"})
    assert connect(fake.url + "/v1/", "big", tokenizer=tokenizer, **QUICK)(None, [[3]])[0].tokens == (3,)
    fake.models = (401, {"error": "who are you?"})
    with pytest.raises(ServerError, match="401: 'who are you"):
        connect(fake.url, "tiny", tokenizer=tokenizer, **QUICK)
    fake.models = (307, b"", [("Location", "http://elsewhere/")])
    with pytest.raises(ServerError, match="it points to 'http://elsewhere/'"):
        connect(fake.url, "tiny", tokenizer=tokenizer, **QUICK)


def test_the_key_comes_from_its_own_variable_and_is_never_told(fake, tokenizer, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "not-this")
    monkeypatch.delenv("JAXPOST_API_KEY", raising=False)
    connect(fake.url, "tiny", tokenizer=tokenizer, **QUICK)
    monkeypatch.setenv("JAXPOST_API_KEY", "secret")
    connect(fake.url, "tiny", tokenizer=tokenizer, **QUICK)
    assert fake.keys == [None, "Bearer secret"]
    fake.models = (401, {})
    with pytest.raises(ServerError) as caught:
        connect(fake.url, "tiny", tokenizer=tokenizer, **QUICK)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("key", ["secret\n", "secret\u2603"])
def test_a_key_that_no_header_holds_is_refused_and_not_told(key):
    with pytest.raises(ValueError, match="the API key holds") as caught:
        Server("http://127.0.0.1:9", key)
    assert "secret" not in str(caught.value)
    assert "secret" not in repr(Server("http://127.0.0.1:9", "secret"))


@pytest.mark.parametrize(
    "url",
    [
        *("localhost:8000", "ftp://host", "http://", "http://host:x", "http://me:key@host", "http://[::1"),
        *("http://a b/v1", "http://a..b", f"http://{'a' * 64}.com", "http://host/v1\n", "http://host/\u00e9"),
    ],
)
def test_an_address_that_is_none(url):
    with pytest.raises(ValueError, match="is not an address"):
        Server(url)


@pytest.mark.parametrize("timeout", [0.0, float("nan"), float("inf")])
def test_a_wait_that_is_none(timeout):
    with pytest.raises(ValueError, match="timeout must be above 0"):
        Server("http://127.0.0.1:9", timeout=timeout)


def test_parameters_in_the_servers_names():
    plain = to_openai(SamplingParams(max_tokens=4))
    assert plain == {
        "max_tokens": 4,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logprobs": 1,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    full = {
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "stop": ["a"],
        "stop_token_ids": [4],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "allowed_token_ids": [1, 2],
        "bad_words": ["x"],
        "logprobs": 5,
        "prompt_logprobs": 0,
    }
    sent = to_openai(SamplingParams(**full, logit_bias={3: 1.5}))
    assert sent == full | {"logit_bias": {"3": 1.5}, "return_token_ids": True, "return_tokens_as_token_ids": True}
    json.dumps(sent)
    with pytest.raises(ValueError, match="no_repeat_ngram_size"):
        to_openai(SamplingParams(no_repeat_ngram_size=2))
    assert to_openai(SimpleNamespace(**(full | {"logit_bias": {}})))["top_k"] == 3


def test_more_of_a_request_may_be_said_and_keys_left_out(fake, tokenizer):
    extra = {"return_token_ids": None, "user": "me", "temperature": 0.3}
    connect(fake.url, "tiny", tokenizer=tokenizer, extra=extra, **QUICK)(None, [[1]])
    [body] = fake.bodies
    assert body["user"] == "me"
    assert body["temperature"] == 0.3
    assert "return_token_ids" not in body


def test_parameters_that_do_not_fit_the_prompts(sampler):
    with pytest.raises(ValueError, match="2 prompts with 1 sampling parameters"):
        sampler(None, [[1], [2]], [SamplingParams()])


def table_score(tokens, lengths):
    """A made-up model: log p(t | before) = -(t + before / 100)."""
    before = np.concatenate([np.zeros_like(tokens[:, :1]), tokens[:, :-1]], axis=1)
    return -(tokens + before / 100)


def test_log_probabilities_by_our_own_model(fake, tokenizer):
    calls = []

    def score(params, tokens, lengths):
        calls.append((params, tokens.shape, lengths.tolist()))
        return table_score(tokens, lengths)

    def cut(body, tried):
        return (400, {"error": "no"}) if body["prompt"] == [9] else (200, echo(body, token_ids=[3, 5], logprobs=None))

    fake.answer = cut
    sampler = connect(fake.url, "tiny", tokenizer=tokenizer, score=score, **QUICK)
    prompts = [[1] * (1 + 7 * i) for i in range(10)] + [[9]]
    done = sampler("weights", prompts, errors="return")
    for completion in done[:-1]:
        np.testing.assert_allclose(completion.logprobs, [-3.01, -5.03])
    assert done[-1].finish == "error"
    assert {(params, shape) for params, shape, _ in calls} == {("weights", (8, 64)), ("weights", (8, 128))}
    assert calls[0][2] == [1, 8, 15, 22, 29, 36, 43, 50]


def test_rescoring_keeps_order_and_wants_a_number_a_token():
    def answer(prompt, tokens, finish="stop"):
        return Answer(Completion(tokens, (), finish), prompt)

    given = [answer((1, 2, 3), (4,)), answer((1,), ()), answer((7,), (8, 9)), answer((1,), (), "error")]
    got = rescore(given, table_score, rows=2, multiple=4)
    assert [a.learner_logprobs and tuple(round(p, 6) for p in a.learner_logprobs) for a in got] == [
        (-4.03,),
        None,
        (-8.07, -9.08),
        None,
    ]
    assert [a.completion for a in got] == [a.completion for a in given]
    with pytest.raises(ValueError, match="one number a token"):
        rescore(given, lambda tokens, lengths: tokens[:, 1:])
