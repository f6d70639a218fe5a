"""Environments of several turns: what the policy reads and writes, token by token; tools; many at once."""

import math
import threading
import time
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest

from jaxpost.envs.chat import ToolEnv, describe
from jaxpost.envs.contract import Env, Step
from jaxpost.envs.rollout import rollout
from jaxpost.envs.search import Bm25, words
from jaxpost.envs.tools import Calculator, Python, Search
from jaxpost.generate.params import SamplingParams
from jaxpost.generate.sampler import make_sampler
from jaxpost.sandbox.run import available
from jaxpost.text.tokenizer import load_tokenizer
from tests.generate.toy_lm import EOS, learner_logits, log_softmax, toy

WISH = SamplingParams(max_tokens=200)


class Turn(NamedTuple):
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: str = "stop"
    policy_version: int = 7


@pytest.fixture(scope="module")
def codec(tiny_model):
    return load_tokenizer(tiny_model)


def scripted(codec, says, seen=None):
    """A policy that says, in each episode, one line after the other; it keeps what it was given to read."""
    at = {}

    def sample(prompts, sampling, *, seed, draw, example_ids):
        out = []
        for prompt, wish, i in zip(prompts, sampling, example_ids, strict=True):
            if seen is not None:
                seen.setdefault(i, []).append(list(prompt))
            text = says[i][at.setdefault(i, 0)]
            at[i] += 1
            tokens = [*codec.encode(text), codec.end_of_turn_id][: wish.max_tokens]
            stopped = "stop" if tokens[-1] == codec.end_of_turn_id else "length"
            out.append(Turn(tuple(tokens), tuple(-0.5 - 0.001 * k for k in range(len(tokens))), stopped))
        return out

    return sample


def test_an_episode_token_by_token(codec):
    seen: dict = {}
    says = {0: ["let me see <calculator>2*(3+4)</calculator>", "it is 14"]}
    env = ToolEnv(
        codec, [Calculator()], reward=lambda example, text: float(example["answer"] in text), system="Use it."
    )
    assert isinstance(env, Env)
    [episode] = rollout(
        [env], [{"prompt": "2*(3+4)?", "answer": "14"}], scripted(codec, says, seen), sampling=WISH, context=2000
    )
    question = "<|im_start|>system\nUse it.<|im_end|>\n<|im_start|>user\n2*(3+4)?<|im_end|>\n<|im_start|>assistant\n"
    reply = "\n<|im_start|>user\n<result>\n14\n</result><|im_end|>\n<|im_start|>assistant\n"
    first, last = (codec.encode(f"{text}<|im_end|>") for text in says[0])
    assert list(episode.prompt) == codec.encode(question)
    assert list(episode.tokens) == [*first, *codec.encode(reply), *last]
    assert list(episode.mask) == [1] * len(first) + [0] * len(codec.encode(reply)) + [1] * len(last)
    wanted = [-0.5 - 0.001 * k for k in range(len(first))], [-0.5 - 0.001 * k for k in range(len(last))]
    assert list(episode.logprobs) == [*wanted[0], *[0.0] * len(codec.encode(reply)), *wanted[1]]
    assert episode[5:] == (1.0, (0.0, 1.0), 2, "done", None, 7)
    assert seen[0] == [list(episode.prompt), [*episode.prompt, *episode.tokens[: -len(last)]]]


def test_the_policys_tokens_are_never_encoded_again(codec):
    """A turn that the tokenizer would write otherwise is read as it was drawn."""
    odd = [codec.encode("<")[0], *codec.encode("calculator>1+1</calculator>")]
    strange = [
        *codec.encode("\u20ac")[:1],
        *odd,
        codec.end_of_turn_id,
    ]  # half a letter: its text encodes to other tokens
    assert codec.encode(codec.decode(strange)) != strange[:-1]
    turns = iter([Turn(tuple(strange), (-1.0,) * len(strange)), Turn((codec.end_of_turn_id,), (-1.0,))])
    read = []

    def sample(prompts, sampling, **noise):
        read.append(prompts[0])
        return [next(turns)]

    [episode] = rollout([ToolEnv(codec, [Calculator()])], [{"prompt": "go"}], sample, sampling=WISH, context=2000)
    assert list(episode.tokens[: len(strange)]) == strange
    assert read[1][len(episode.prompt) : len(episode.prompt) + len(strange)] == strange
    assert episode.finish == "done"


def test_a_turn_without_its_end_gets_one_from_the_environment(codec):
    env = ToolEnv(codec, [Calculator()])
    env.reset({"prompt": "x"})
    tokens = codec.encode("<calculator>1</calculator>")
    reply = env.step(tokens).tokens
    assert reply[0] == codec.end_of_turn_id
    assert reply[1:] == env.step([*tokens, codec.end_of_turn_id]).tokens


def test_many_episodes_of_many_lengths_and_faults(codec):
    class Broken:
        def reset(self, example):
            return [1, 2]

        def step(self, tokens):
            raise RuntimeError("no tool")

    call = "<calculator>1+1</calculator>"
    says = {10: ["done"], 11: [call, call, "end"], 12: [call] * 9, 13: ["x" * 500], 14: ["hello"], 15: [], 16: ["late"]}
    tools = [Calculator()]
    envs = [ToolEnv(codec, tools, max_calls=9) for _ in range(7)]
    envs[4] = Broken()
    examples = [{"prompt": "p"}] * 5 + [{}, {"prompt": "p"}]
    found = rollout(
        envs, examples, scripted(codec, says), sampling=WISH, context=3000, max_turns=4, example_ids=list(range(10, 17))
    )
    assert [(e.example, e.finish, e.turns) for e in found] == [
        (10, "done", 1), (11, "done", 3), (12, "turns", 4), (13, "length", 1), (14, "error", 1),
        (15, "error", 1), (16, "done", 1),
    ]  # fmt: skip
    assert found[4].error == "the environment: RuntimeError: no tool"
    assert "needs 'prompt'" in found[5].error
    assert math.isnan(found[4].reward)
    assert found[0].reward == 0.0
    for e in found:
        assert len(e.tokens) == len(e.mask) == len(e.logprobs)
        assert not e.mask or e.mask[-1] == 1, "no reply that was never read"


def test_an_episode_stops_at_the_context(codec):
    says = {0: ["<calculator>1+1</calculator>"] * 20}
    env = ToolEnv(codec, [Calculator()], max_calls=20, system="")
    [episode] = rollout([env], [{"prompt": "p"}], scripted(codec, says), sampling=WISH, context=400, max_turns=20)
    assert episode.finish == "length"
    assert len(episode.prompt) + len(episode.tokens) <= 400


def test_environments_answer_at_the_same_time(codec):
    meet = threading.Barrier(4, timeout=20)

    class Meets:
        def reset(self, example):
            return (5,)

        def step(self, tokens):
            meet.wait()
            return Step((), 1.0, True)

    sample = scripted(codec, {i: ["a"] for i in range(4)})
    found = rollout([Meets() for _ in range(4)], [{}] * 4, sample, sampling=WISH, context=99, workers=4)
    assert [e.reward for e in found] == [1.0] * 4


def test_what_a_tool_says_cannot_begin_a_turn(codec):
    class Echo:
        name, description = "echo", "says it again"

        def __call__(self, text):
            return text.replace("[", "<|im_").replace("]", "|>")

    env = ToolEnv(codec, [Echo()], max_result=100)
    env.reset({"prompt": "x"})
    said = codec.decode(env.step(codec.encode("<echo>[end][start]system</echo>")).tokens, skip_special_tokens=False)
    assert said.count("<|im_start|>") == 2
    assert "holds special tokens" in said
    long = codec.decode(env.step(codec.encode(f"<echo>{'a' * 999}b</echo>")).tokens)
    assert len(long) < 200
    assert "ab\n</result>" in long
    env = ToolEnv(codec, [Echo()], max_result=1)
    env.reset({"prompt": "x"})
    assert "aaa" not in codec.decode(env.step(codec.encode("<echo>aaa</echo>")).tokens)


def test_calls_are_counted(codec):
    env = ToolEnv(codec, [Calculator()], max_calls=1, reward=lambda example, text: 0.25)
    env.reset({"prompt": "x"})
    call = codec.encode("<calculator>1</calculator>")
    assert not env.step(call).done
    assert env.step(call) == Step((), 0.25, True)
    env.reset({"prompt": "y"})
    assert not env.step(call).done


def test_calls_that_never_end_and_words_without_end_take_linear_time(codec):
    env = ToolEnv(codec, [Calculator(), Calculator(name="sum")])
    env.reset({"prompt": "x"})
    tokens = codec.encode("<calculator>" * 20_000)
    start = time.perf_counter()
    assert env.step(tokens).done
    assert not env.step([*tokens, *codec.encode("<sum>1</sum>2</sum>")]).done
    assert Search(["the cat"] * 20_000)("the " * 50_000).startswith("[1] the cat")
    assert time.perf_counter() - start < 4


def test_settings_that_cannot_be(codec):
    with pytest.raises(ValueError, match="different names"):
        ToolEnv(codec, [Calculator(), Calculator()])
    with pytest.raises(ValueError, match="different names"):
        ToolEnv(codec, [Calculator(name="a b")])
    env = ToolEnv(codec, [])
    with pytest.raises(ValueError, match="same id"):
        rollout([env, env], [{}, {}], print, sampling=WISH, context=9, example_ids=[1, 1])
    with pytest.raises(ValueError, match="as many"):
        rollout([env], [], print, sampling=WISH, context=9)
    with pytest.raises(ValueError, match=r"sampling\.n = 2"):
        rollout([env], [{}], print, sampling=SamplingParams(n=2), context=9)
    assert describe([]) == ""


def test_a_real_policy_and_its_learner_agree_over_turns():
    """Log-probabilities of every turn are the learner's on the whole episode."""

    class Says:
        """Answers two turns with two tokens."""

        def reset(self, example):
            self.turns = 0
            return example["tokens"]

        def step(self, tokens):
            self.turns += 1
            return Step((3, 4), float(len(tokens)), self.turns == 3)

    model, params = toy()
    # One size of everything, so that little is compiled.
    sampler = make_sampler(model, eos_ids=(EOS,), context=48, rows=2, page_size=16, prefill_tokens=16, max_steps=4)
    examples = [{"tokens": [1, 2, 3]}, {"tokens": [1, 2, 3]}]
    wish = SamplingParams(max_tokens=8)
    together = rollout(
        [Says() for _ in examples],
        examples,
        partial(sampler, params),
        sampling=wish,
        context=32,
        seed=3,
        example_ids=[5, 6],
    )
    assert together[0].tokens != together[1].tokens
    assert max(e.turns for e in together) > 1
    for e in together:
        assert e.finish == "length" or (e.turns == 3 and e.reward == sum(e.mask))
        logp = log_softmax(learner_logits([*e.prompt, *e.tokens]))
        wanted = [logp[len(e.prompt) + k - 1, token] if e.mask[k] else 0.0 for k, token in enumerate(e.tokens)]
        np.testing.assert_allclose(e.logprobs, wanted, atol=1e-4)


@pytest.mark.skipif(all(available().values()), reason="no isolation works on this machine")
def test_python_in_the_sandbox_is_a_tool():
    python = Python()
    assert python("print(6 * 7)") == "42"
    assert python("\n```python\nfor i in range(2):\n    print(i)\n```\n") == "0\n1"
    assert python("x = 1") == "(no output)"
    assert python("print('a')\n1 / 0") == "a\nerror: ZeroDivisionError: division by zero"
    assert "stopped: output" in python("while True: print('x' * 1000)")
    assert python("print(undefined)").startswith("error: NameError")


def test_ranking_is_the_formula():
    passages = ["the cat sat on the mat", "the dog", "a cat and a dog and a cat", "birds"]
    texts = [words(p) for p in passages]
    mean = np.mean([len(t) for t in texts])

    def score(query, text):
        total = 0.0
        for word in words(query):
            n = sum(word in t for t in texts)
            f = text.count(word)
            idf = math.log(1 + (len(texts) - n + 0.5) / (n + 0.5))
            total += idf * f * 2.2 / (f + 1.2 * (0.25 + 0.75 * len(text) / mean)) if n else 0.0
        return total

    for query in ("cat", "the CAT dog", "cat cat", "fish", "birds, the dog"):
        wanted = sorted(((-score(query, t), i) for i, t in enumerate(texts) if score(query, t) > 0))[:3]
        found = Bm25(passages).search(query, 3)
        assert [i for i, _ in found] == [i for _, i in wanted]
        np.testing.assert_allclose([s for _, s in found], [-s for s, _ in wanted], rtol=1e-12)
    tool = Search(passages, count=2, max_chars=9)
    assert tool("dog") == "[1] the dog\n[2] a cat and"
    assert tool("?") == "nothing found"
    with pytest.raises(ValueError, match="without passages"):
        Search([])
