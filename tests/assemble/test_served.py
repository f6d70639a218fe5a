"""`jaxpost generate --server`: rows, resuming and re-scored log-probabilities, against a server of our own."""

import io
import json
import signal
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from toy_server import Fake, echo

from jaxpost import cli
from jaxpost.assemble import ask_server, generate
from jaxpost.assemble.answer_file import Tooled
from jaxpost.assemble.commands import load_bound
from jaxpost.generate.http_json import ServerError
from jaxpost.types import Inputs

PROMPTS = ["Hi", "Count", [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]


@pytest.fixture
def fake():
    server = Fake()
    server.models = {"data": [{"id": "tiny"}]}
    yield server
    server.close()


def written(body):
    """Three tokens that depend on prompt and seed."""
    return [(sum(body["prompt"]) + 7 * k + body["seed"]) % 250 for k in range(3)]


def of_prompt(body, tried):
    ids = written(body)
    return 200, echo(body, token_ids=ids, text=str(ids), logprobs=None)


def test_rows_say_how_probable_our_model_finds_each_token(fake, tiny_model, tmp_path):
    fake.answer = of_prompt
    out, told = tmp_path / "a.jsonl", io.StringIO()
    settings = {"model": str(tiny_model), "sampling": {"n": 5, "max_tokens": 3}, "policy_version": 7, "seed": 2}
    rows = list(ask_server(fake.url, PROMPTS, out=out, progress=told, **settings))
    assert [(row["index"], row["sample"]) for row in rows] == [(i, k) for i in range(3) for k in range(5)]
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows
    assert {row["policy_version"] for row in rows} == {7}
    assert told.getvalue().splitlines()[-1].startswith("15/15 answers")
    assert {body["model"] for body in fake.bodies} == {"tiny"}

    # The plain definition: one text at a time, all logits.
    pretrained, params = load_bound(str(tiny_model))
    model = pretrained.model
    logits_of = jax.jit(lambda params, inputs: model.unembed(params, model.forward(params, inputs).hidden))
    prompts = {tuple(written(body)): body["prompt"] for body in fake.bodies}
    for row in rows[::4]:
        prompt = prompts[tuple(row["token_ids"])]
        tokens = np.asarray([[*prompt, *row["token_ids"]]], np.int32)
        inputs = Inputs(tokens, np.arange(tokens.shape[1], dtype=np.int32)[None], np.ones_like(tokens))
        logprobs = np.asarray(jax.nn.log_softmax(logits_of(params, inputs)))
        want = logprobs[0, np.arange(len(prompt) - 1, tokens.shape[1] - 1), tokens[0, -3:]]
        np.testing.assert_allclose(row["learner_logprobs"], want, atol=1e-5)
        assert row["tokens"] == 3
        assert row["text"] == str(row["token_ids"])

    # Interrupted: only what the file lacks is asked for again, with the same seeds.
    lines, seeds = out.read_bytes().splitlines(keepends=True), {body["seed"] for body in fake.bodies}
    out.write_bytes(b"".join(lines[2:]) + lines[0][:9])
    fake.bodies.clear()
    assert list(ask_server(fake.url, PROMPTS, out=out, **settings)) == rows
    assert out.read_bytes() == b"".join(lines)
    assert len(fake.bodies) == 2
    assert {body["seed"] for body in fake.bodies} < seeds


def test_a_row_that_asks_what_a_server_cannot_do_fails_alone(fake):
    fake.answer = lambda body, tried: (200, {"choices": [{"text": "x", "finish_reason": "length"}]})
    own = [{}, {"no_repeat_ngram_size": 2}, {"logprobs": 1}, {"min_tokens": 9}]
    own += [{"structured_outputs": {"regex": "("}}, {"structured_outputs": {"regex": "x|y"}}]
    rows = list(ask_server(fake.url, ["a"] * 6, chat=False, own=own, sampling={"max_tokens": 4}))
    told = ["", "no_repeat_ngram_size is not among", "need the model's own tokenizer", "min_tokens is 9, more than"]
    told += ["the regex '(' cannot be used", ""]
    assert [row["text"] for row in rows] == ["x", "", "", "", "", "x"]
    assert all(words in row.get("error", "") for words, row in zip(told, rows, strict=True))
    assert sorted(str(body.get("structured_outputs")) for body in fake.bodies) == ["None", "{'regex': 'x|y'}"]
    with pytest.raises(ValueError, match="no_repeat_ngram_size is not among"):
        list(ask_server(fake.url, ["a"], chat=False, sampling={"no_repeat_ngram_size": 2}))


def test_it_is_as_if_our_own_engine_had_answered(fake, tiny_model):
    """The same prompt tokens, and for the engine's tokens the engine's log-probabilities."""
    settings = {"sampling": {"max_tokens": 4, "logprobs": 1}, "system": "Be kind."}
    [own] = generate(str(tiny_model), ["Hi"], **settings)
    ids = [best[0][0] for best in own["top_logprobs"]]  # it is greedy
    fake.answer = lambda body, tried: (200, echo(body, token_ids=ids, logprobs=None))
    [row] = ask_server(fake.url, ["Hi"], model=str(tiny_model), **settings)
    tokenizer = load_bound(str(tiny_model))[0].tokenizer
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert fake.bodies[0]["prompt"] == tokenizer.encode(tokenizer.render(turns, add_generation_prompt=True))
    assert fake.bodies[0]["temperature"] == 0.0
    assert row["token_ids"] == ids
    np.testing.assert_allclose(row["learner_logprobs"], own["logprobs"], atol=1e-5)


def test_without_a_model_the_server_has_the_chat_format(fake, tmp_path):
    def chat(body, tried):
        if body.get("messages") == [{"role": "user", "content": "Count"}]:
            return 400, {"error": {"message": "too long"}}
        message = {"role": "assistant", "content": f"hello {body['seed']}"}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        return 200, {"choices": [choice], "usage": {"completion_tokens": 9}}

    fake.answer = chat
    rows = list(ask_server(fake.url, PROMPTS, name="tiny", sampling={"top_k": 3}))
    assert [row["finish"] for row in rows] == ["stop", "error", "stop"]
    assert "400: 'too long'" in rows[1]["error"]
    assert [row["text"].split()[0] for row in rows[::2]] == ["hello", "hello"]
    assert rows[0]["tokens"] == 9
    assert "learner_logprobs" not in rows[0]
    bodies = {json.dumps(body.pop("messages")): body for body in fake.bodies}
    assert set(bodies) == {json.dumps(p if isinstance(p, list) else [{"role": "user", "content": p}]) for p in PROMPTS}
    body = next(iter(bodies.values()))
    assert set(body) == {"model", "seed", "max_tokens", "temperature", "top_p", "top_k"}, (
        "no more than any server knows"
    )

    fake.bodies.clear()
    fake.answer = lambda body, tried: (200, {"choices": [{"text": "x", "finish_reason": "length"}]})
    tools = ({"type": "function", "function": {"name": "now", "parameters": {}}},)
    [row] = ask_server(fake.url, [Tooled("Once", tools)])
    assert "tools are shown by a chat format of ours" in row["error"]
    assert not fake.bodies
    [row] = ask_server(fake.url, ["Once"], chat=False)
    assert fake.bodies[0]["prompt"] == "Once"
    assert (row["text"], row["tokens"]) == ("x", None)


def test_what_cannot_be_asked_is_told(fake, tiny_model):
    for settings, told in (
        ({"sampling": {"logprobs": 1}}, "give a local model"),
        ({"sampling": {"no_repeat_ngram_size": 2}}, "no_repeat_ngram_size"),
        ({"system": "s", "chat": False}, "needs the chat format"),
        ({"name": "big"}, "does not serve 'big'; it serves 'tiny'"),
    ):
        with pytest.raises(ValueError, match=told):
            list(ask_server(fake.url, ["Hi"], **settings))
    fake.models = {"data": [{"id": "a"}, {"id": "b"}]}
    with pytest.raises(ValueError, match="serves 'a', 'b': name one"):
        list(ask_server(fake.url, ["Hi"]))
    fake.models = (401, {"error": "who are you?"})
    with pytest.raises(ServerError, match="who are you"):
        list(ask_server(fake.url, ["Hi"]))


def test_the_command_asks_a_server(fake, tiny_model, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    fake.answer = of_prompt
    command = ["generate", str(tiny_model), "Hi", "--server", fake.url, "--json", "--policy-version", "2"]
    assert cli.main(command) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["policy_version"], len(row["learner_logprobs"])) == (2, 3)
    fake.answer = lambda body, tried: (400, {"error": "no"})
    assert cli.main(command) == 1
    assert "400: 'no'" in capsys.readouterr().out


def test_an_interrupt_waits_for_no_server(fake):
    asked, over = threading.Event(), threading.Event()

    def hang(body, tried):
        asked.set()
        over.wait(60)
        return 200, {"choices": []}

    fake.answer = hang
    fake.models = {"data": [{"id": "tiny"}]}
    # Tests that run in a shell's background, where Ctrl-C is ignored, would hand that on.
    heard = "import signal, sys, jaxpost.cli; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", f"{heard}; sys.exit(jaxpost.cli.main(sys.argv[1:]))", "generate"]
    command += ["-", "Hi", "Ho", "--server", fake.url]
    job = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        assert asked.wait(60)
        job.send_signal(signal.SIGINT)
        assert job.wait(15) == 130
        assert b"interrupted" in job.stderr.read()
    finally:
        over.set()
        job.kill()
        job.stderr.close()
