"""Training templates: the text is the family's, the spans are what the assistant writes, and faults have names."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from toy_text import CHATML, OWN, SPECIAL, fast_tokenizer

from jaxpost.text.chat import ChatTemplate, TemplateError, builtin, builtin_names, check_prefixes, choose_template
from jaxpost.text.messages import DataError, Message, ToolCall
from jaxpost.text.tokenizer import Tokenizer

U, A, S = "user", "assistant", "system"
TURNS = ((S, " Be brief. "), (U, "Hi \n"), (A, " Hello!"), (U, "2+2?"), (A, "4\n"))


def messages(turns):
    return [Message(role=role, content=content) for role, content in turns]


def chatml_text(turns):
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)


def llama3_text(turns):
    return "<|begin_of_text|>" + "".join(
        f"<|start_header_id|>{role}<|end_header_id|>\n\n{content.strip()}<|eot_id|>" for role, content in turns
    )


def llama2_text(turns):
    (_, system), *rest = turns
    out, lead = "", f"<<SYS>>\n{system}\n<</SYS>>\n\n"
    for role, content in rest:
        if role == U:
            out += f"<s>[INST] {(lead + content).strip()} [/INST]"
            lead = ""
        else:
            out += f" {content.strip()} </s>"
    return out


def gemma_text(turns):
    (_, system), *rest = turns
    out, lead = "<bos>", system + "\n\n"
    for role, content in rest:
        out += f"<start_of_turn>{'model' if role == A else role}\n{lead}{content.strip()}<end_of_turn>\n"
        lead = ""
    return out


def qwen3_text(turns):
    return "".join(
        f"<|im_start|>{role}\n" + ("<think>\n\n</think>\n\n" if role == A else "") + f"{content}<|im_end|>\n"
        for role, content in turns
    )


def zephyr_text(turns):
    return "".join(f"<|{role}|>\n{content}</s>\n" for role, content in turns)


EXPECTED = {
    "chatml": (chatml_text, [" Hello!<|im_end|>", "4\n<|im_end|>"]),
    "qwen3": (qwen3_text, ["<think>\n\n</think>\n\n Hello!<|im_end|>", "<think>\n\n</think>\n\n4\n<|im_end|>"]),
    "llama3": (llama3_text, ["Hello!<|eot_id|>", "4<|eot_id|>"]),
    "llama2": (llama2_text, [" Hello! </s>", " 4 </s>"]),
    "gemma": (gemma_text, ["Hello!<end_of_turn>", "4<end_of_turn>"]),
    "zephyr": (zephyr_text, [" Hello!</s>", "4\n</s>"]),
}


def special_of(name):
    named = SPECIAL["chatml" if name == "qwen3" else name]
    return {key: value for key, value in named.items() if key != "more"}


def test_every_builtin_template_has_an_expected_text():
    assert set(builtin_names()) == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_text_and_spans(name):
    text, spans = EXPECTED[name]
    template = choose_template(None, special_of(name), name)
    rendered = template.render(messages(TURNS))
    assert rendered.text == text(TURNS)
    assert [rendered.text[start:end] for start, end in rendered.spans] == spans
    check_prefixes(template)


@pytest.mark.parametrize(
    ("own", "family", "default"),
    [
        ("chatml", "chatml", None),
        ("chatml_system", "chatml", "You are kind."),
        ("qwen3", "qwen3", None),
        ("llama3", "llama3", None),
        ("llama31", "llama3", "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"),
        ("llama2", "llama2", None),
        ("gemma", "gemma", None),
        ("zephyr", "zephyr", None),
    ],
)
def test_a_family_is_recognised_by_what_its_own_template_renders(own, family, default):
    special, text = OWN[own]
    tokenizer = Tokenizer(fast_tokenizer(special, text))
    assert tokenizer.chat.name == family
    assert dict(tokenizer.chat.variables)["default_system"] == default
    # The reference is transformers' rendering of the tokenizer's own template, on turns that are no probes.
    turns = [{"role": U, "content": "The quick fox?"}, {"role": A, "content": "Jumps over the dog."}]
    for prompt in (False, True):
        expected = tokenizer.hf.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=prompt, date_string="26 Jul 2024"
        )
        assert tokenizer.render(turns, add_generation_prompt=prompt) == expected


def test_a_system_turn_is_the_templates_own_none_or_the_one_that_is_given():
    special, text = OWN["chatml_system"]
    tokenizer = Tokenizer(fast_tokenizer(special, text))
    user = {"role": U, "content": "Hi"}
    given, own = {"role": "system", "content": "Count."}, {"role": "system", "content": "Mine."}
    assert tokenizer.render([user]).startswith("<|im_start|>system\nYou are kind.<|im_end|>\n<|im_start|>user")
    assert tokenizer.render([user], system="").startswith("<|im_start|>user\nHi")
    assert tokenizer.render([user], system="Count.") == tokenizer.render([given, user])
    assert tokenizer.render([own, user], system="Count.") == tokenizer.render([own, user], system="")


def test_an_own_template_with_markers_is_used_as_it_is():
    own = builtin("chatml").replace("<|im_start|>", "<|begin|>")
    assert choose_template(own, {}) == ChatTemplate("own", own, ())


def test_qwen3_keeps_old_thoughts_so_that_prefixes_hold():
    template = choose_template(None, {}, "qwen3")
    turns = [
        Message(role=U, content="One?"),
        Message(role=A, content="Two", reasoning="Count."),
        Message(role=U, content="Three?"),
        Message(role=A, content="<think>\nOn.\n</think>\n\nFour"),
    ]
    text = template.render(turns).text
    assert "<think>\nCount.\n</think>\n\nTwo<|im_end|>" in text
    assert text.endswith("<think>\nOn.\n</think>\n\nFour<|im_end|>\n")
    assert text.startswith(template.render(turns[:2]).text)


TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]
CALL = [
    Message(role=U, content="Time?"),
    Message(role=A, tool_calls=(ToolCall(name="now", arguments={"zone": "UTC"}),)),
    Message(role="tool", content='{"time": "12:00"}'),
    Message(role=A, content="It is noon."),
]


@pytest.mark.parametrize("name", ["chatml", "qwen3", "llama3"])
def test_tools_calls_and_results_are_shown(name):
    rendered = choose_template(None, special_of(name), name).render(CALL, TOOLS)
    assert '"parameters"' in rendered.text
    assert '"now"' in rendered.text
    written = [rendered.text[start:end] for start, end in rendered.spans]
    assert '{"zone": "UTC"}' in written[0]
    assert "It is noon." in written[1]
    assert "12:00" not in "".join(written)


@pytest.mark.parametrize("name", ["llama2", "gemma", "zephyr"])
def test_a_family_without_tools_refuses_them(name):
    template = choose_template(None, special_of(name), name)
    with pytest.raises(DataError, match=f"{name}"):
        template.render(CALL, TOOLS)
    with pytest.raises(DataError, match="cannot show tools"):
        template.render(messages(TURNS), TOOLS)


@pytest.mark.parametrize("name", ["llama2", "llama3", "gemma", "zephyr"])
def test_a_part_that_the_template_leaves_out_is_an_error(name):
    turns = [Message(role=U, content="Hi"), Message(role=A, content="Hello", reasoning="Greet them.")]
    with pytest.raises(DataError, match="leaves out the reasoning of message 1"):
        choose_template(None, special_of(name), name).render(turns)


def test_turns_that_must_alternate():
    with pytest.raises(DataError, match="gemma refuses this conversation: turns must alternate"):
        choose_template(None, {"bos_token": "<bos>"}, "gemma").render(messages(((U, "a"), (U, "b"))))


def test_no_template_names_the_setting():
    tokenizer = Tokenizer(fast_tokenizer("chatml", None))
    with pytest.raises(TemplateError, match=r"no chat template.*model\.chat_template to one of chatml, gemma"):
        tokenizer.render([{"role": U, "content": "Hi"}])
    assert tokenizer.decode(tokenizer.encode("Hello!")) == "Hello!"  # plain text needs none


def test_an_unknown_template_without_markers_names_the_fix():
    own = "{% for m in messages %}{{ '## ' + m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    with pytest.raises(TemplateError, match=r"no family known here.*\{% generation %\}"):
        choose_template(own, {"eos_token": "<|im_end|>"})


def test_a_template_file_without_markers_names_the_fix(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(CHATML)
    with pytest.raises(TemplateError, match=r"assistant mask would be empty; put \{% generation %\}"):
        choose_template(None, {}, str(path))
    with pytest.raises(TemplateError, match="no chat template file"):
        choose_template(None, {}, str(tmp_path / "other.jinja"))
    with pytest.raises(TemplateError, match="no built-in chat template 'qwen4'; there are chatml, gemma"):
        choose_template(None, {}, "qwen4")


def wrong(old: str, new: str) -> ChatTemplate:
    text = builtin("chatml")
    assert old in text
    return ChatTemplate("mine", text.replace(old, new))


def test_a_template_that_changes_old_turns_is_refused():
    forgetful = wrong("{{- message.content -}}", "{{- message.content + (' ' if loop.last else '') -}}")
    with pytest.raises(TemplateError, match=r"does not preserve prefixes.*first 2;"):
        check_prefixes(forgetful)


def test_a_template_that_marks_its_prompt_or_nothing_is_refused():
    early = ChatTemplate(
        "mine",
        "{%- for message in messages -%}{%- if message.role == 'assistant' -%}{%- generation -%}"
        "{{- '<|im_start|>assistant\n' + message.content + '<|im_end|>\n' -}}{%- endgeneration -%}{%- else -%}"
        "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}{%- endif -%}{%- endfor -%}"
        "{{- '<|im_start|>assistant\n' if add_generation_prompt -}}",
    )
    with pytest.raises(TemplateError, match="marks its generation prompt as generated"):
        check_prefixes(early)
    empty = early.text.replace("{%- generation -%}", "{%- generation -%}{%- endgeneration -%}", 1).replace(
        "\n' -}}{%- endgeneration -%}{%- else", "\n' -}}{%- else", 1
    )
    with pytest.raises(TemplateError, match=r"put one \{% generation %\} block around each assistant turn"):
        check_prefixes(ChatTemplate("mine", empty))


def test_an_end_of_turn_token_outside_of_the_markers_is_refused(tmp_path):
    path = tmp_path / "mine.jinja"
    end = "{{- '<|im_end|>' -}}"
    text = builtin("chatml")
    path.write_text(text.replace(end, "", 1).replace("{%- endgeneration -%}", "{%- endgeneration -%}" + end))
    with pytest.raises(TemplateError, match=r"trains no end-of-turn token: a turn ends in '.*4\.'"):
        Tokenizer(fast_tokenizer("chatml", CHATML), chat_template=str(path))


def test_a_template_of_another_vocabulary_is_refused():
    with pytest.raises(TemplateError, match="trains no end-of-turn token"):
        Tokenizer(fast_tokenizer("chatml", CHATML), chat_template="gemma")


def test_templates_run_in_the_sandbox(tmp_path):
    template = ChatTemplate("evil", "{% generation %}{{ ''.__class__.__mro__ }}{% endgeneration %}")
    with pytest.raises(DataError, match="refuses this conversation"):
        template.render(messages(((U, "Hi"),)))


def test_many_threads_render_one_template():
    """Tools answer on threads; transformers keeps one compiled template, with one record of spans, for all of them."""
    template = ChatTemplate("chatml", builtin("chatml"), tuple(SPECIAL.items()))
    said = [messages([("user", f"question {i}"), ("assistant", f"answer {i} " * i)]) for i in range(1, 65)]
    alone = [template.render(one) for one in said]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(template.render, said * 4)) == alone * 4
    finally:
        sys.setswitchinterval(before)
