"""`jaxpost generate` to a file, and conversations, on a tiny model."""

import io
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from jaxpost.assemble import Conversation, chat, generate, read_prompts
from jaxpost.assemble.answer import encode_prompt
from jaxpost.assemble.chat import HELP, command
from jaxpost.assemble.commands import load_bound
from jaxpost.generate.thinking import ThinkingBudget

SAMPLING = {"max_tokens": 6, "temperature": 1.0, "n": 2}
PROMPTS = ["Hi", "Count", [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]


@pytest.fixture(scope="module")
def answers(tiny_model):
    return list(generate(str(tiny_model), PROMPTS, sampling=SAMPLING, seed=1))


def test_an_interrupted_file_goes_on_where_it_stopped(tiny_model, answers, tmp_path):
    out = tmp_path / "answers.jsonl"
    part = list(generate(str(tiny_model), PROMPTS, sampling=SAMPLING, seed=1, out=out))
    assert [{k: v for k, v in row.items() if k != "settings"} for row in part] == answers
    assert len({row["settings"] for row in part}) == 1
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.write_bytes(lines[4] + lines[0] + lines[3][:7])  # two answers out of order and a torn one
    assert list(generate(str(tiny_model), PROMPTS, sampling=SAMPLING, seed=1, out=out)) == part
    assert out.read_bytes() == whole
    with pytest.raises(ValueError, match="line 1: answers another prompt than number 0"):
        list(generate(str(tiny_model), ["Other"], sampling=SAMPLING, out=out))
    out.write_text('{"text": "x"}\n')
    with pytest.raises(ValueError, match="not an answer of `jaxpost generate`"):
        list(generate(str(tiny_model), PROMPTS, sampling=SAMPLING, out=out))


def test_rows_say_what_was_asked_and_failures_do_not_stop_the_others(tiny_model, answers, capsys):
    assert [(a["index"], a["sample"]) for a in answers] == [(i, k) for i in range(3) for k in range(2)]
    assert [a["prompt"] for a in answers[::2]] == PROMPTS
    found = list(generate(str(tiny_model), ["Hi", "x" * 5000], sampling={"max_tokens": 3, "logprobs": 2}))
    assert len(found[0]["top_logprobs"]) == found[0]["tokens"] == len(found[0]["logprobs"])
    assert "does not fit the model's context" in found[1]["error"]
    with pytest.raises(ValueError, match="unknown sampling parameter 'topp'"):
        list(generate(str(tiny_model), ["Hi"], sampling={"topp": 1}))


def test_answers_can_be_given_a_shape(tiny_model):
    rows = generate(str(tiny_model), ["Hi", "Ho"], sampling={"max_tokens": 9}, shape={"choice": ["red", "blue"]})
    assert {row["text"] for row in rows} <= {"red", "blue"}
    rows = generate(str(tiny_model), ["Hi"], sampling={"max_tokens": 9}, shape={"regex": "[0-9]{3}"})
    assert [len(row["text"]) for row in rows] == [3]


def test_guessed_tokens_change_no_answer(tiny_model, answers):
    found = list(generate(str(tiny_model), PROMPTS, sampling=SAMPLING, seed=1, speculate=3))
    assert [(row["text"], row["finish"], row["tokens"]) for row in found] == [
        (row["text"], row["finish"], row["tokens"]) for row in answers
    ]


def test_beams_are_told_with_their_scores(tiny_model, tmp_path):
    wish = {"max_tokens": 6, "num_beams": 3, "n": 2, "length_penalty": 0.5}
    out = tmp_path / "beams.jsonl"
    found = list(generate(str(tiny_model), [*PROMPTS, "x" * 5000], sampling=wish, out=out))
    assert [(row["index"], row["sample"]) for row in found] == [(i, k) for i in range(4) for k in range(2)]
    assert all(found[i]["score"] > found[i + 1]["score"] for i in (0, 2, 4))
    assert "does not fit" in found[6]["error"]
    one = {"max_tokens": 6, "num_beams": 1}
    [greedy] = generate(str(tiny_model), ["Hi"], sampling=one)
    assert "score" not in greedy
    for wrong, told in (
        ({"length_penalty": 2.0}, "length_penalty belong to beam search"),
        ({"num_beams": "many"}, "num_beams is 'many'"),
        ({"num_beams": 2, "n": 3}, "2 beams cannot give n=3"),
        ({"num_beams": 2, "early_stopping": "soon"}, "early_stopping is 'soon'"),
        ({"num_beams": 2, "length_penalty": "long"}, "length_penalty is 'long'"),
    ):
        with pytest.raises(ValueError, match=told):
            list(generate(str(tiny_model), ["Hi"], sampling=wrong))
    with pytest.raises(ValueError, match="leave those out"):
        list(generate(str(tiny_model), ["Hi"], sampling={"num_beams": 2}, shape={"regex": "a"}))


def test_prompts_may_have_parameters_of_their_own(tiny_model, answers):
    own = [{"n": 1, "max_tokens": 2}, {}, {"temperature": 0.0}]
    found = list(generate(str(tiny_model), PROMPTS, sampling=SAMPLING, seed=1, own=own))
    assert [(a["index"], a["sample"]) for a in found] == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert found[0]["tokens"] <= 2
    assert found[1:3] == answers[2:4]
    assert found[3]["text"] == found[4]["text"], "greedy"
    with pytest.raises(ValueError, match="3 prompts with 1 sets"):
        list(generate(str(tiny_model), PROMPTS, own=[{}]))


def test_parameters_of_a_row_that_cannot_be_met_fail_it_alone_and_may_be_mended(tiny_model, answers, tmp_path):
    bad = {
        1: ({"min_tokens": 7}, "min_tokens is 7, more than max_tokens, 6"),
        2: ({"topp": 1}, "unknown sampling parameter 'topp'"),
        3: ("hot", "it is 'hot'; write names and values in braces"),
        4: ({"do_sample": True, "temperature": 0.0}, "do_sample"),
        5: ({"max_tokens": 3, "max_new_tokens": 4}, "say the same thing"),
        6: ({"allowed_token_ids": [10**6]}, "1000000"),
    }
    rows = [{"prompt": "Hi"}, *({"prompt": "Hi", "sampling": own} for own, _ in bad.values())]
    path, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    prompts, own = read_prompts(path)
    found = list(generate(str(tiny_model), prompts, sampling=SAMPLING, own=own, out=out))
    assert [(row["index"], row["sample"]) for row in found] == [(i, k) for i in range(7) for k in range(2)]
    for row in found:
        told = bad.get(row["index"], ((), ""))[1]
        assert told in row.get("error", "")
        assert (row["finish"] == "error") == bool(told)
        assert row["error"].startswith(f"prompt {row['index']}") if told else row["text"]
    # The first line is kept, the others are answered once they are mended, their prompts too.
    mended = ["Hi", *(f"Ho {i}" for i in range(6))]
    again = list(generate(str(tiny_model), mended, sampling=SAMPLING, own=[{}] * 7, out=out))
    assert again[:2] == found[:2]
    assert not any("error" in row for row in again)
    assert [json.loads(line) for line in out.read_text().splitlines()] == again
    # An answer by the command's parameters is none to a row that now asks for what cannot be met.
    with pytest.raises(ValueError, match="line 3: answered by another model, or with other parameters"):
        list(generate(str(tiny_model), mended, sampling=SAMPLING, own=[{}, {"topp": 1}, *[{}] * 5], out=out))


def test_rows_may_have_shapes_of_their_own(tiny_model, tmp_path):
    held = [
        {"regex": "[0-9]{3}"},
        {"choice": ["red", "blue"]},
        {"json": {"type": "boolean"}},
        None,
        {"regex": "a(?=b)"},
    ]
    held += [{"json": {"type": "integer", "minimum": 3, "maximum": 2}}, {"lark": "x"}, {"regex": "a", "choice": ["a"]}]
    held += [{"regex": "("}]
    own, out = [{"structured_outputs": shape} for shape in held], tmp_path / "out.jsonl"
    asked = {"sampling": {"max_tokens": 20}, "shape": {"regex": "x{4}"}, "out": out}
    rows = list(generate(str(tiny_model), ["Hi"] * 9, own=own, **asked))
    assert re.fullmatch("[0-9]{3}", rows[0]["text"])
    assert rows[1]["text"] in ("red", "blue")
    assert rows[2]["text"] in ("true", "false")
    assert rows[3]["text"] == "xxxx", "null is absent, and the command's stands"
    told = ["look", "JSON schema", "structured_outputs has no 'lark'; write one of regex", "exactly one of", "'('"]
    for row, words in zip(rows[4:], told, strict=True):
        assert words in row["error"]
        assert row["error"].startswith(f'prompt {row["index"]}: "sampling": ')
    assert list(generate(str(tiny_model), ["Hi"] * 9, own=own, **asked)) == rows
    # Another shape is another question, whose answer the file does not hold.
    with pytest.raises(ValueError, match="line 1: answered by another model, or with other parameters"):
        list(generate(str(tiny_model), ["Hi"] * 9, own=[{}, *own[1:]], **asked))
    [alone] = generate(str(tiny_model), ["Hi"], own=own[:1], sampling={"max_tokens": 20})
    assert alone["text"] == rows[0]["text"]


def test_thinking_is_bounded_and_a_shape_follows(tiny_model):
    settings = {"sampling": {"max_tokens": 30}, "shape": {"regex": "[0-9]{2}"}}
    for bounds, length in (({"max": 4}, 4), ({"min": 3, "max": 3}, 3)):
        [row] = generate(str(tiny_model), ["Hi"], thinking=bounds, **settings)
        begin, _, between = row["text"].partition("<think>")
        answer = row["text"].rpartition("</think>")[2]
        assert (begin, len(answer)) == ("", 2)
        assert answer.isdigit()
        # The tiny model writes bytes: a marker has as many tokens as letters.
        assert row["tokens"] <= len("<think></think>") + length + 2 + 1
        assert between
    with pytest.raises(ValueError, match="thinking of at least 5 and at most 4"):
        list(generate(str(tiny_model), ["Hi"], thinking={"min": 5, "max": 4}))
    with pytest.raises(ValueError, match="say the fewest tokens"):
        list(generate(str(tiny_model), ["Hi"], thinking={"waits": 1}))


def test_prompt_files_name_their_bad_line(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"messages": [{"role": "user", "content": "b"}]}\n')
    assert read_prompts(path) == (["a", [{"role": "user", "content": "b"}]], [{}, {}])
    path.write_text('{"prompt": "a", "sampling": {"top_k": 3}}\n{"prompt": "b", "sampling": {"topp": 1}}\n')
    assert read_prompts(path) == (["a", "b"], [{"top_k": 3}, {"topp": 1}])
    path.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(ValueError, match=r"p.jsonl, line 2: a row needs"):
        read_prompts(path)
    path.write_text("{\n")
    with pytest.raises(ValueError, match=r"p.jsonl, line 1: not JSON"):
        read_prompts(path)
    for row, told in (
        ('{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}', "not both"),
        ('{"prompt": "a", "prompt": "b"}', "the key 'prompt' stands twice"),
        ('{"prompt": "a", "tools": [{"description": "no name"}]}', '"tools": a tool definition has no name'),
        ('{"prompt": null, "messages": null}', "a row needs"),
    ):
        path.write_text('{"prompt": "fine"}\n' + row)
        with pytest.raises(ValueError, match=rf"p\.jsonl, line 2: .*{told}"):
            read_prompts(path)


def test_null_is_absent_and_keys_that_nothing_reads_are_told_once(tmp_path):
    path, notes = tmp_path / "p.jsonl", io.StringIO()
    rows = [
        {"messages": None, "prompt": "a", "sampling": None, "tools": None, "id": 1},
        {"prompt": "b", "system": "Be kind.", "id": 2, "url": None},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert read_prompts(path, notes) == (["a", "b"], [{}, {}])
    told = "nothing reads 'id' (2 rows), 'system' (1 row); a row may have prompt, messages, tools, sampling"
    assert notes.getvalue() == f"{path}: {told}\n"


TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {}}}]


def test_tools_of_a_row_are_shown_to_the_model_and_decide_its_answers(tiny_model, tmp_path):
    path, out = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    turns = [{"role": "user", "content": "Hi"}]
    rows = [{"prompt": "Hi", "tools": TOOLS}, {"messages": turns, "tools": json.dumps(TOOLS)}, {"prompt": "Hi"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    prompts, _ = read_prompts(path)
    tokenizer = load_bound(str(tiny_model))[0].tokenizer
    shown = tokenizer.encode(tokenizer.render(turns, TOOLS, add_generation_prompt=True))
    first, second, plain = (encode_prompt(tokenizer, prompt, system=None, chat=True) for prompt in prompts)
    assert first == second == shown != plain
    asked = {"sampling": {"max_tokens": 2}, "out": out}
    found = list(generate(str(tiny_model), prompts[2:], **asked))
    assert "tools" not in found[0]
    with pytest.raises(ValueError, match="line 1: answered by another model, or with other parameters"):
        list(generate(str(tiny_model), prompts[:1], **asked))
    out.unlink()
    found = list(generate(str(tiny_model), prompts, **asked))
    assert [(row["prompt"], row.get("tools")) for row in found] == [("Hi", TOOLS), (turns, TOOLS), ("Hi", None)]
    assert list(generate(str(tiny_model), prompts, **asked)) == found
    [row] = generate(str(tiny_model), prompts[:1], chat=False)
    assert "tools need the chat format" in row["error"]


@pytest.mark.slow
def test_a_conversation_answers_as_if_read_anew(tiny_model, tmp_path):
    """The kept cache changes nothing: each answer is that of `generate` on the same messages."""
    talk = Conversation(str(tiny_model), sampling={"max_tokens": 12, "temperature": 0.0}, system="Be kind.")
    for text in ("Hi", "And now?"):
        said = "".join(talk.say(text))
        [want] = generate(str(tiny_model), [talk.messages[:-1]], sampling={"max_tokens": 12}, system="Be kind.")
        assert said == want["text"] == talk.messages[-1]["content"]
    book = talk.engine.book.full
    held = book.count - 1 - book.free
    talk.undo()
    assert "".join(talk.say("And now?")) == said
    assert book.count - 1 - book.free == held, "pages of the old turn were given back"
    stop = {"max_tokens": 12, "min_tokens": 4, "stop": [said[0]]}  # not where the answer begins with it
    [want] = generate(str(tiny_model), [talk.messages[:-1]], sampling=stop, system="Be kind.")
    talk.undo()
    talk.wish = replace(talk.wish, min_tokens=4, stop=(said[0],))
    assert "".join(talk.say("And now?")) == want["text"] != ""
    path = tmp_path / "talk.json"
    assert command(talk, f"/save {path}") == f"(wrote {path})"
    talk.reset()
    assert command(talk, f"/load {path}") == "(4 messages)"
    assert json.loads(path.read_text())["system"] == "Be kind."
    assert command(talk, "/set temperature=0.5").startswith("temperature=0.5")
    for line, problem in (("/set n=2", "one answer"), ("/set heat=1", "unknown"), ("/dance", "no command")):
        with pytest.raises(ValueError, match=problem):
            command(talk, line)


@pytest.mark.slow
def test_a_conversation_keeps_a_budget_of_thinking(tiny_model):
    """Each answer is that of `generate` with the same budget, and no longer held to it once the thinking is over."""
    sampling, thinking = {"max_tokens": 40, "temperature": 0.0, "ignore_eos": True}, {"min": 3, "max": 4}
    talk = Conversation(str(tiny_model), sampling=sampling, thinking=thinking)
    for text in ("Hi", "And now?"):
        said = "".join(talk.say(text))
        [want] = generate(str(tiny_model), [talk.messages[:-1]], sampling=sampling, thinking=thinking)
        assert said == want["text"]
        begin, _, rest = said.partition("<think>")
        assert begin == ""
        between, marker, after = rest.partition("</think>")
        assert marker
        assert between
        assert after
    talk.reset()
    [free] = generate(str(tiny_model), ["Hi"], sampling=sampling | {"logprobs": 1})
    best, wait = free["top_logprobs"][0][0][0], talk.tokenizer.encode("Wait")
    budget, talk.thinking = talk.thinking, ThinkingBudget(end=[best], min_tokens=9, wait=wait, max_waits=1)
    assert "".join(talk.say("Hi")).startswith("Wait"), "in the place of an end that comes too early"
    talk.thinking = budget
    talk.set("max_tokens=2")
    assert "".join(talk.say("Hm")) == "<t", "the answer may end within a marker"
    talk.set("allowed_token_ids=[5]")
    with pytest.raises(ValueError, match=r"every token is banned here \(allowed_token_ids=\(5,\), a grammar or"):
        list(talk.say("Hm"))


def test_the_loop_goes_on_after_complaints_and_interrupts(tiny_model):
    talk = Conversation(str(tiny_model), sampling={"max_tokens": 400, "temperature": 1.0, "ignore_eos": True})
    lines, said = iter(["/help", "", "/nonsense", "Hi", "/undo", "x" * 9000, "/exit"]), []

    def write(text):
        said.append(text)
        if len(said) == 4:  # while the answer is being written
            raise KeyboardInterrupt

    chat(talk, lambda: next(lines), write)
    assert said[0] == HELP + "\n"
    assert "no command" in said[1]
    assert " (stopped)\n" in said
    assert "(0 messages)\n" in said
    assert "does not fit" in said[-1]


def test_a_file_takes_more_samples_but_no_other_parameters_nor_weights(tiny_model, tmp_path):
    tiny_model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    out = tmp_path / "o.jsonl"
    wish = {"max_tokens": 3, "temperature": 1.0, "n": 1}
    [first] = generate(str(tiny_model), ["Hi"], sampling=wish, seed=1, out=out)
    both = list(generate(str(tiny_model), ["Hi"], sampling={**wish, "n": 2}, seed=1, out=out))
    assert [row["sample"] for row in both] == [0, 1]
    assert both[0] == first
    held = out.read_text()
    assert list(generate(str(tiny_model), ["Hi"], sampling=wish, seed=1, out=out)) == [first]
    assert out.read_text() == held, "samples that are not asked for now stay in the file"
    changes = [
        {"sampling": {**wish, "temperature": 0.5}},
        {"seed": 2},
        {"system": "Be brief."},
        {"shape": {"regex": "[0-9]"}},
        {"thinking": {"max": 2}},
        {"sampling": {"max_tokens": 3, "num_beams": 2}},
    ]
    for change in changes:
        asked = {"sampling": wish, "seed": 1} | change
        with pytest.raises(ValueError, match=r"line 1: answered by another model, or with other parameters"):
            list(generate(str(tiny_model), ["Hi"], out=out, **asked))
        assert out.read_text() == held
    for weights in tiny_model.glob("*.safetensors"):  # the same folder after more training
        os.utime(weights, (1, 1))
    with pytest.raises(ValueError, match=r"line 1: answered by another model"):
        list(generate(str(tiny_model), ["Hi"], sampling=wish, seed=1, out=out))
