"""Training templates against the families' own, as TRL keeps copies of them."""

from pathlib import Path

import pytest

trl = pytest.importorskip("trl")

from jaxpost.text.chat import PROBES, choose_template  # noqa: E402
from jaxpost.text.messages import Message, ToolCall, to_template  # noqa: E402

FOLDER = Path(trl.__file__).parent / "chat_templates"
SPECIAL = {"bos_token": "<bos>", "eos_token": "</s>"}
FIXED = {"date_string": "26 Jul 2024"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "now",
            "description": "The time <here>",
            "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}, "required": ["zone"]},
        },
    }
]


def own_text(name, messages, tools=None, prompt=False):
    from transformers.utils.chat_template_utils import render_jinja_template

    text = (FOLDER / f"{name}.jinja").read_text()
    return render_jinja_template(
        conversations=[to_template(messages)],
        tools=tools,
        chat_template=text,
        add_generation_prompt=prompt,
        **SPECIAL,
        **FIXED,
    )[0][0]


def training(name):
    return choose_template((FOLDER / f"{name}.jinja").read_text(), SPECIAL)


FAMILY = {
    "llama3": "llama3",
    "llama3_1": "llama3",
    "llama3_2": "llama3",
    "qwen2_5": "chatml",
    "qwen3": "qwen3",
    "qwen3_instruct_2507": "chatml",
    "gemma": "gemma",
    "gemma3": "gemma",
}


@pytest.mark.parametrize("name", FAMILY)
def test_the_family_is_recognised(name):
    assert training(name).name == FAMILY[name]


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("prompt", [False, True])
def test_plain_conversations(name, prompt):
    system = Message(role="system", content="Speak  briefly.\n")
    turns = [
        Message(role="user", content="  How are you?\n\n"),
        Message(role="assistant", content="Well, thanks."),
        Message(role="user", content="Grüße, 狐 <b>"),
        Message(role="assistant", content="\nTwo lines\nhere. "),
    ]
    for count in (1, 2, 3, 4):
        if name == "qwen3" and count > 2:
            continue  # its own template drops old (empty) thoughts
        for lead in ([], [system]):
            if name == "gemma" and lead:
                continue  # refuses system turns
            conversation = lead + turns[:count]
            rendered = training(name).render(conversation, add_generation_prompt=prompt)
            assert rendered.text == own_text(name, conversation, prompt=prompt)


CALLS = [
    Message(role="user", content="Time?"),
    Message(role="assistant", tool_calls=(ToolCall(name="now", arguments={"zone": "UTC", "n": [1, None]}),)),
    Message(role="tool", content='{"time": "12:00"}', name="now"),
    Message(role="assistant", content="It is noon."),
]


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3_instruct_2507", "llama3_1", "llama3_2"])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_tools(name, count):
    for lead in ([], [Message(role="system", content="Be kind.")]):
        conversation = lead + CALLS[:count]
        assert training(name).render(conversation, TOOLS).text == own_text(name, conversation, TOOLS)


def test_qwen3_tools_and_thoughts():
    thinking = [
        CALLS[0],
        Message(role="assistant", reasoning="I need the time.", content="Wait.", tool_calls=CALLS[1].tool_calls * 2),
        CALLS[2],
        CALLS[2],
        Message(role="assistant", reasoning="Noon it is.", content="It is noon."),
    ]
    for conversation in (thinking, [PROBES[2][0], *thinking]):
        assert training("qwen3").render(conversation, TOOLS).text == own_text("qwen3", conversation, TOOLS)


def test_qwen3_conversations_equal_trls_training_template():
    turns = [
        Message(role="user", content="One?"),
        Message(role="assistant", content="Two", reasoning="Count."),
        Message(role="user", content="Three?"),
        Message(role="assistant", content="<think>\nOn.\n</think>\n\nFour"),
    ]
    assert training("qwen3").render(turns).text == own_text("qwen3_training", turns)
