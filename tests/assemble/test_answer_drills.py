"""What `generate` and `chat` do with input that nobody meant to give: each bad row says so, and the others go on."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from jaxpost import cli
from jaxpost.assemble import Conversation, chat, generate, read_prompts
from jaxpost.assemble.answer import readable
from jaxpost.assemble.chat import command
from jaxpost.assemble.wishes import read_wishes
from jaxpost.generate.engine import Engine

GREEDY = {"max_tokens": 4}


def test_rows_that_cannot_be_read_say_so_and_the_others_go_on(tiny_model, tmp_path):
    path, out = tmp_path / "p.jsonl", tmp_path / "a.jsonl"
    rows = [
        {"prompt": "Hi"},
        {"prompt": "  "},
        {"messages": []},
        {"messages": [{"content": "no role"}]},
        {"prompt": "half \ud800"},
        {"prompt": "a\u2028b"},
        {"prompt": "x" * 600},
        {"messages": [{"role": "user", "content": [{"type": ["text"], "text": "x"}]}]},
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": "9" * 5000}]}]},
        {"prompt": "Hi"},
    ]
    text = "\r\n".join(json.dumps(row, ensure_ascii=row is rows[4]) for row in rows)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    prompts, own = read_prompts(path)
    assert prompts[5] == "a\u2028b"
    found = list(generate(str(tiny_model), prompts, own=own, sampling=GREEDY | {"n": 2}, rows=1, out=out))
    assert len(found) == 2 * len(rows)
    bad = {row["index"]: row.get("error", "") for row in found}
    for number, told in enumerate(
        ["", "empty", "empty", "role", "half a surrogate", "", "context", "type is", "call of f", ""]
    ):
        assert told in bad[number]
        assert bool(told) == bool(bad[number])
    texts = [row["text"] for row in found]
    assert texts[:2] == texts[-2:], "greedy: the same prompt twice"
    path.write_text('{"messages": ["Hi"]}')
    with pytest.raises(ValueError, match="line 1: a message is"):
        read_prompts(path)
    assert [json.loads(line) for line in out.read_text("utf-8").split("\n")[:-1]] == found


def test_an_error_of_a_reader_or_a_template_fails_its_prompt_alone():
    def encode(prompt):
        return [1] if prompt == "Hi" else {}[prompt]

    good, encoded, failed = readable(["Hi", "Ho"], read_wishes({}, None, 2), [0, 1], encode, {})
    assert (good, encoded) == ([0], [[1]])
    assert failed[0][0].error == (
        "prompt 1: something in it has a shape that cannot be read (KeyError: 'Ho'); mend it or leave it out"
    )


@pytest.mark.parametrize(
    ("name", "held", "told"),
    [
        ("p.txt", b"Hi\nh\xe9\n", "p.txt, line 2: not UTF-8"),
        ("p.jsonl", '{"prompt": "Hi"}'.encode("utf-16"), "p.jsonl, line 1: not UTF-8"),
        ("p.JSONL", b"{", "p.JSONL, line 1: not JSON"),
        ("p.json", b'[{"prompt": "Hi"}]', "p.json, line 1: a row needs"),
        ("p.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("p.jsonl", b'{"prompt": ' + b"1" * 5000 + b"}", "line 1: not JSON"),
        ("p.txt", b"\n \r\n", "p.txt holds no prompt"),
    ],
)
def test_a_file_that_is_none_of_prompts_is_named(tmp_path, name, held, told):
    path = tmp_path / name
    path.write_bytes(held)
    with pytest.raises(ValueError, match=told):
        read_prompts(path)


@pytest.mark.parametrize(
    ("held", "told"),
    [
        ("my notes", "line 1: not the beginning of a row of `jaxpost generate`"),
        ('{"prompt": "Hi"}', "line 1: not the beginning"),
        ('{"index": "0", "sample": 0, "prompt": "Hi"}\n', "line 1: not an answer"),
        ('{"index": [0], "sample": 0, "prompt": "Hi"}\n', "line 1: not an answer"),
        ('{"index": 0, "sample": null, "prompt": "Hi"}\n', "line 1: not an answer"),
        ('{"index": 0, "sample": 0, "prompt": "Hi", "text": "a"}\nnotes', "line 2: not the beginning"),
        ('{"index": 0, "sample": 0, "prompt": "Hi", "settings": "0"}\n', "line 1: answered by another model, or with"),
    ],
)
def test_a_file_of_something_else_is_never_written_over(tmp_path, held, told):
    out = tmp_path / "o.jsonl"
    out.write_text(held)
    with pytest.raises(ValueError, match=told):
        list(generate("no-such-model", ["Hi"], sampling=GREEDY, out=out))
    assert out.read_text() == held


def test_a_link_stays_one_and_what_is_no_file_stays_as_it_is(tiny_model, tmp_path):
    link, file, pipe = tmp_path / "link.jsonl", tmp_path / "o.jsonl", tmp_path / "pipe"
    link.symlink_to(file)
    rows = list(generate(str(tiny_model), ["Hi"], sampling=GREEDY, out=link))
    assert link.is_symlink()
    assert [json.loads(line)["text"] for line in file.read_text().splitlines()] == [row["text"] for row in rows]
    os.mkfifo(pipe)
    for out in (pipe, tmp_path):
        with pytest.raises(ValueError, match=f"{out} is no regular file"):
            list(generate(str(tiny_model), ["Hi"], sampling=GREEDY, out=out))
    assert pipe.is_fifo()


def test_what_cannot_be_drawn_is_left_out_for_json_has_no_word_for_its_probability(tiny_model):
    sampling = GREEDY | {"logprobs_mode": "processed", "temperature": 1.0, "top_k": 2, "logprobs": 4}
    [row] = generate(str(tiny_model), ["Hi"], sampling=sampling)
    assert [len(best) for best in row["top_logprobs"]] == [2] * 4
    json.dumps(row, allow_nan=False)


@pytest.mark.parametrize(
    ("sampling", "shape", "told"),
    [
        ({"min_tokens": 4}, {"choice": ["ab"]}, "here (min_tokens=4, a grammar or a thinking budget), so"),
        ({"bad_words": ["b"]}, {"regex": "ab"}, "here (bad_words=('b',), a grammar or a thinking budget), so"),
        (
            {"allowed_token_ids": [5], "no_repeat_ngram_size": 1},
            None,
            "(allowed_token_ids=(5,), no_repeat_ngram_size=1)",
        ),
    ],
)
def test_wishes_that_leave_nothing_to_draw_are_named(tiny_model, sampling, shape, told):
    [row] = generate(str(tiny_model), ["Hi"], sampling=GREEDY | sampling, shape=shape)
    assert told in row["error"]


def test_beams_that_bans_leave_out_have_rows(tiny_model):
    bans = {"max_tokens": 8, "allowed_token_ids": [16, 17], "no_repeat_ngram_size": 1, "num_beams": 3, "n": 3}
    rows = list(generate(str(tiny_model), ["hi"], sampling=bans, chat=False))
    assert [row["finish"] for row in rows] == ["length", "length", "error"]
    assert [row["tokens"] for row in rows] == [2, 2, 0]
    assert rows[2]["error"].startswith("the search found 2 of n=3 texts")


def test_a_shape_ends_an_answer_that_ignores_end_tokens(tiny_model, monkeypatch):
    calls, extend = [], Engine.extend

    def limited(*arguments, **options):
        calls.append(1)
        assert len(calls) < 50, "no end"
        return extend(*arguments, **options)

    monkeypatch.setattr(Engine, "extend", limited)
    wish = {"max_tokens": 12, "ignore_eos": True}
    [row] = generate(str(tiny_model), ["hi"], sampling=wish, shape={"choice": ["yes", "no"]})
    assert (row["text"] in ("yes", "no"), row["finish"]) == (True, "stop")


def test_a_conversation_says_why_nothing_can_be_drawn(tiny_model):
    talk = Conversation(str(tiny_model), sampling={"max_tokens": 6, "temperature": 0.0, "no_repeat_ngram_size": 1})
    talk.set("allowed_token_ids=[66]")
    with pytest.raises(ValueError, match="every token is banned here"):
        list(talk.say("Hi"))


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_prompts_that_are_no_text_are_refused_alone_and_told(tiny_model, monkeypatch, capfdbinary, options):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hi\n\xff\nHo\n"), "utf-8"))
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.main(["generate", str(tiny_model), "--max-tokens", "2", *options]) == 1
    told = out.buffer.getvalue()
    assert told.count(b"half a surrogate pair") == 1
    assert b"\\udcff" in told
    assert b"Ho" in told


def test_an_empty_prompt_of_the_command_has_its_row(tiny_model, capsys):
    assert cli.main(["generate", str(tiny_model), "", " ", "--json"]) == 1
    assert [json.loads(line)["error"] for line in capsys.readouterr().out.splitlines()] == [
        "prompt 0: it is empty",
        "prompt 1: it is empty",
    ]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--rows", "0"], "rows is 0"),
        (["--seed", "-1"], "seed is -1"),
        (["--max-tokens", "4", "--set", "max_tokens=5"], "max_tokens is said twice, as 4 and as 5"),
        (["--set", "top_k=4", "--set", "top_k=5"], "top_k is said twice"),
        (["--set", "min_tokens=9", "--max-tokens", "3"], "min_tokens is 9, more than max_tokens, 3"),
        (["--set", "logit_bias={5: "], "logit_bias is '{5: '"),
        (["--set", "do_sample=true"], "temperature=0"),
        (["--set", "allowed_token_ids=[]"], "allowed_token_ids is empty"),
        (["--regex", "a(?=b)"], "look"),
        (["--regex", "("], "the regex '('"),
        (["--choice", ""], "choice 0 must be a text"),
        (["--think-min", "9", "--think-max", "3"], "9"),
    ],
)
def test_contradictions_are_one_sentence(tiny_model, capsys, options, told):
    assert cli.main(["generate", str(tiny_model), "Hi", *options]) == 2
    err = capsys.readouterr().err
    assert told in err
    assert len(err.strip().splitlines()) == 1


def test_an_unsatisfiable_schema_is_named(tiny_model, tmp_path, capsys):
    path = tmp_path / "schema.json"
    path.write_bytes(b'{"type": "\xff"}')
    assert cli.main(["generate", str(tiny_model), "Hi", "--schema", str(path)]) == 2
    assert "schema.json is not UTF-8" in capsys.readouterr().err
    path.write_text('{"type": "integer", "minimum": 3, "maximum": 2}')
    assert cli.main(["generate", str(tiny_model), "Hi", "--schema", str(path)]) == 2
    assert "JSON schema" in capsys.readouterr().err


@pytest.mark.slow
def test_a_stop_string_is_found_across_the_bytes_of_its_letters(tiny_model):
    """Every token is a byte, so each letter of the stop string is two tokens, and so is what comes before."""
    cases = {"xü": "éé", "é": "", "éx": "é", "ü": "ééx", "yz": "ééxü"}
    own = [{"stop": [stop, "never"], "include_stop_str_in_output": keep} for stop in cases for keep in (False, True)]
    shape = {"regex": "ééxüyzé"}
    rows = list(generate(str(tiny_model), ["Hi"] * 10, own=own, sampling={"max_tokens": 40}, shape=shape, rows=8))
    for row, wish in zip(rows, own, strict=True):
        stop = wish["stop"][0]
        kept = stop if wish["include_stop_str_in_output"] else ""
        assert (row["text"], row["finish"], row["stop"]) == (cases[stop] + kept, "stop", stop)


def test_a_terminal_obeys_no_model(monkeypatch, capsys):
    from jaxpost import assemble

    row = {"prompt": "\x1b[2Jhi", "text": "a\x1b]0;title\x07\u202eb\n", "index": 0, "sample": 0}
    monkeypatch.setattr(assemble, "generate", lambda *_, **__: [row])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert cli.main(["generate", "m", "x"]) == 0
    assert capsys.readouterr().out == "> \\x1b[2Jhi\na\\x1b]0;title\\x07\\u202eb\n\n\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert cli.main(["generate", "m", "x"]) == 0
    assert "\x1b]0;title" in capsys.readouterr().out, "a file gets the text itself"


def test_a_conversation_survives_what_is_typed(tiny_model, tmp_path):
    talk = Conversation(str(tiny_model), sampling={"max_tokens": 12, "temperature": 0.0, "ignore_eos": True})
    broken = tmp_path / "broken.json"
    broken.write_bytes(b"\xff\xfe")
    lines = [
        "/undo", "/set stop=[", "/set temperature=hot", "/set n=3", "/set logprobs=2", "/set", "/set temperature",
        "/load", f"/load {broken}", f"/load {tmp_path}", f"/save {tmp_path}", "/system",
        "half \udcff", "/SET a=b", "Hi",
    ]  # fmt: skip
    said, waiting = [], iter(lines)

    def ask():
        said.append("")
        line = next(waiting, None)
        if line is None:
            raise EOFError
        return line

    chat(talk, ask, lambda text: said.__setitem__(-1, said[-1] + text))
    told = dict(zip(lines, said, strict=False))
    for line, part in (
        ("/set stop=[", "stop=["), ("/set temperature=hot", "temperature is 'hot'"), ("/set n=3", "one answer"),
        ("/set logprobs=2", "no log-probabilities"), ("/set temperature", "not NAME=VALUE"), ("/load", "needs a file"),
        ("half \udcff", "surrogate"), ("/SET a=b", "no command"), (f"/load {tmp_path}", "directory"),
    ):  # fmt: skip
        assert part in told[line], line
    assert told["Hi"]
    assert len(talk.messages) == 2
    with pytest.raises(ValueError, match="one answer"):
        Conversation(str(tiny_model), sampling={"n": 2})
    with pytest.raises(ValueError, match="seed is -1"):
        Conversation(str(tiny_model), seed=-1)

    # Ctrl-C while a program runs waits for its end: a program that is left would take the cache with it.
    talk.reset()
    talk.set("stop=")
    whole = "".join(talk.say("Hi"))
    talk.reset()
    extend, calls = talk.engine.extend, []

    def interrupted(*args, **more):
        calls.append(1)
        os.kill(os.getpid(), signal.SIGINT)
        return extend(*args, **more)

    talk.engine.extend = interrupted
    with pytest.raises(KeyboardInterrupt):
        list(talk.say("Hi"))
    talk.engine.extend = extend
    assert len(calls) == 1
    talk.undo()
    assert "".join(talk.say("Hi")) == whole


def test_a_conversation_cuts_the_text_of_an_end_token_off(tiny_model):
    talk = Conversation(str(tiny_model), sampling={"max_tokens": 12, "temperature": 1.0, "ignore_eos": True}, seed=2)
    whole = "".join(talk.say("Hi"))
    end = next(letter for letter in whole[1:] if letter.isascii())
    for keep in (False, True):
        talk.undo()
        talk.set(f"stop_token_ids={talk.tokenizer.encode(end)}")
        talk.set(f"include_stop_str_in_output={keep}")
        assert "".join(talk.say("Hi")) == whole[: whole.index(end) + keep]


def test_what_a_conversation_refuses_leaves_it_as_it_was(tiny_model, tmp_path):
    talk = Conversation(str(tiny_model), sampling={"max_new_tokens": 5, "do_sample": False})
    assert (talk.wish.max_tokens, talk.wish.temperature) == (5, 0.0)
    talk.set("stop_strings=END")
    talk.set("max_completion_tokens=3")
    before = (talk.wish, talk.settings)
    for assignment, told in (
        ("logit_bias={999: 1}", "logit_bias has token id 999"),
        ("do_sample=true", "temperature=0 is greedy"),
        ("=5", "unknown sampling parameter ''"),
        ("heat=", "unknown sampling parameter 'heat'"),
    ):
        with pytest.raises(ValueError, match=told):
            talk.set(assignment)
    assert (talk.wish, talk.settings) == before
    assert (talk.wish.max_tokens, talk.wish.stop) == (3, ("END",))
    assert command(talk, "/set\tstop=") == "temperature=0.0  max_tokens=3"
    # Without a value each goes back to the conversation's default, under whichever name.
    talk.set("stop_strings=END")
    for name in ("stop_strings", "max_new_tokens", "do_sample", "top_p"):
        talk.set(f"{name}=")
    assert talk.settings == {"temperature": 0.7, "max_tokens": 512}
    assert (talk.wish.max_tokens, talk.wish.stop, talk.wish.temperature) == (512, (), 0.7)
    path = tmp_path / "talk.json"
    talk.messages = [{"role": "user", "content": "Hi"}]
    for held in (
        '{"system": 5, "messages": []}',
        '{"messages": [{"role": "dragon", "content": "x"}]}',
        '{"messages": [{"role": "user", "content": null}]}',
        '{"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}',
        '{"messages": 5}',
        "[" * 100_000,
    ):
        path.write_text(held)
        with pytest.raises(ValueError, match=r"talk\.json holds no saved conversation"):
            command(talk, f"/load {path}")
    with pytest.raises(ValueError, match="/undo stands alone; '3'"):
        command(talk, "/undo 3")
    assert talk.messages == [{"role": "user", "content": "Hi"}]


@pytest.mark.slow
def test_a_killed_command_goes_on(tiny_model, tmp_path):
    """SIGKILL after a few answers; the same command makes the others, and the file is that of a quiet run."""
    prompts, outs = tmp_path / "p.txt", [tmp_path / "killed.jsonl", tmp_path / "whole.jsonl"]
    prompts.write_text("".join(f"Count {i % 7}\n" for i in range(40)))
    settings = ["--file", str(prompts), "--rows", "3", "--max-tokens", "12", "--temperature", "1", "--set", "n=2"]
    command = [sys.executable, "-m", "jaxpost.cli", "generate", str(tiny_model), *settings, "--out"]
    run = subprocess.Popen([*command, str(outs[0])], stderr=subprocess.DEVNULL)
    while run.poll() is None and not (outs[0].exists() and outs[0].read_bytes().count(b"\n") > 3):
        time.sleep(0.01)
    run.kill()
    run.wait()
    assert 3 < outs[0].read_bytes().count(b"\n") < 80
    for out in outs:
        subprocess.run([*command, str(out)], check=True, stderr=subprocess.DEVNULL)
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert outs[1].read_bytes().count(b"\n") == 80
