"""Training chat templates: text of a conversation, and which characters the assistant wrote.

A model's own chat template says how a conversation looks, but not which part of it is to be trained. For each
family there is a template here that renders the same text and puts `{% generation %}` around what the assistant
writes, its end-of-turn token included. The family is recognised by rendering: the template chosen is one whose
text equals the own template's on probe conversations, so that equality is checked, not assumed.

Rendering is transformers' sandboxed jinja (`ImmutableSandboxedEnvironment`); templates run no Python.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jaxpost.text.messages import DataError, Message, ToolCall, to_template

TEMPLATES = Path(__file__).parent / "templates"
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE_KWARGS = {"date_string": "26 Jul 2024"}
_RENDERING = threading.Lock()
"""transformers keeps one compiled template for all threads, and its record of spans refuses a second reader."""


class TemplateError(DataError):
    """A chat template that cannot be used for training, with a sentence that says what to set.

    It is no fault of a row: skipping bad rows does not skip it.
    """

    def __init__(self, message: str):
        super().__init__(message, kind="template")


def _refused(message: str) -> DataError:
    """A conversation that a template cannot show: a bad row, not a bad template."""
    return DataError(message, kind="template")


class Rendered(NamedTuple):
    """A conversation as text. `spans[i]` is the character range that the i-th assistant turn wrote."""

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ChatTemplate:
    """A training template and the values it needs beside messages (special tokens, a default system prompt)."""

    name: str
    text: str
    variables: tuple[tuple[str, Any], ...] = ()

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping] | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> Rendered:
        """The conversation's text and the assistant's spans.

        Raises: DataError where the template refuses the conversation, or leaves a part of it out.
        """
        if not messages:
            raise _refused("a conversation without messages cannot be rendered")
        rendered = _render(
            self.text, to_template(messages), tools, add_generation_prompt, dict(self.variables), name=self.name
        )
        _check_complete(self.name, rendered.text, messages, tools)
        return rendered


@dataclass(frozen=True)
class Family:
    """How a family's own template is recognised.

    `preamble` finds what the own template says before a conversation without a system turn; its group becomes the
    variable `default_system`. `history` False: earlier turns are shown otherwise than the last one (Qwen3 leaves
    out old thoughts), so only single exchanges are compared.
    """

    name: str
    preamble: str | None
    history: bool = True


FAMILIES = (
    Family("chatml", r"<\|im_start\|>system\n(.*?)<\|im_end\|>\n"),
    Family("qwen3", None, history=False),
    Family("llama3", r"<\|start_header_id\|>system<\|end_header_id\|>\n\n(.*?)<\|eot_id\|>"),
    Family("llama2", None),
    Family("gemma", None),
    Family("zephyr", None),
)


@cache
def builtin(name: str) -> str:
    """The text of a built-in template. Raises: TemplateError naming those that exist."""
    path = TEMPLATES / f"{name}.jinja"
    if not path.is_file():
        raise TemplateError(f"no built-in chat template {name!r}; there are {', '.join(builtin_names())}")
    return path.read_text(encoding="utf-8")


def builtin_names() -> tuple[str, ...]:
    """Names that `model.chat_template` may give."""
    return tuple(sorted(path.stem for path in TEMPLATES.glob("*.jinja")))


def has_markers(text: str) -> bool:
    """Whether a template says which part the assistant writes."""
    return _MARKER.search(text) is not None


def _render(
    text: str,
    messages: list[dict],
    tools: Sequence[Mapping] | None,
    add_generation_prompt: bool,
    variables: Mapping[str, Any],
    *,
    name: str,
) -> Rendered:
    from jinja2 import TemplateError as JinjaError
    from transformers.utils.chat_template_utils import render_jinja_template

    marked = has_markers(text)
    render: Any = render_jinja_template  # annotated as giving one text, it gives lists of texts and spans
    try:
        with _RENDERING:
            texts, spans = render(
                conversations=[messages],
                tools=None if tools is None else [dict(tool) for tool in tools],
                chat_template=text,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
    except JinjaError as error:
        raise _refused(f"the chat template {name} refuses this conversation: {error}") from None
    except (TypeError, AttributeError, KeyError) as error:
        raise _refused(f"the chat template {name} fails on this conversation: {error}") from None
    return Rendered(texts[0], tuple(spans[0]) if marked else ())


def _check_complete(name: str, text: str, messages: Sequence[Message], tools: Sequence[Mapping] | None) -> None:
    """A template that leaves out a tool, a call or a turn would train on another conversation than the row's."""
    shown = "".join(text.split())  # templates trim and put newlines between parts
    for index, message in enumerate(messages):
        for what, part in (("text", message.content), ("reasoning", message.reasoning)):
            quoted = json.dumps(part, ensure_ascii=False)[1:-1]  # Llama 3 shows what tools say as JSON
            if part and "".join(part.split()) not in shown and "".join(quoted.split()) not in shown:
                raise _refused(
                    f"the chat template {name} leaves out the {what} of message {index}; take it out of the rows, or "
                    "set model.chat_template to a template that shows it"
                )
        for call in message.tool_calls:
            if call.name not in text:
                raise _refused(f"the chat template {name} leaves out message {index}'s call of {call.name}")
    for tool in tools or ():
        tool_name = str((tool.get("function") or tool).get("name"))
        if tool_name not in text:
            raise _refused(f"the chat template {name} cannot show tools ({tool_name} is not in the text)")


def _user(text: str) -> Message:
    return Message(role="user", content=text)


def _assistant(text: str, **extra: Any) -> Message:
    return Message(role="assistant", content=text, **extra)


PROBES: tuple[tuple[Message, ...], ...] = (
    (_user("What is 2+2?"),),
    (_user("What is 2+2?"), _assistant("It is 4.")),
    (Message(role="system", content="Be brief."), _user("Hi"), _assistant("Hello!")),
    (_user("One"), _assistant("Two"), _user("Three"), _assistant("Four")),
)
"""Plain conversations on which templates are compared and checked."""

RICH_PROBES: tuple[tuple[Message, ...], ...] = (
    (_user("One"), _assistant("Two", reasoning="After one."), _user("Three"), _assistant("Four", reasoning="Go on.")),
    (
        _user("Time?"),
        _assistant("", tool_calls=(ToolCall(name="now", arguments={"zone": "UTC"}),)),
        Message(role="tool", content="12:00", name="now"),
        _assistant("It is noon."),
    ),
)
"""Conversations with reasoning and tools; checked where the template can show them."""


def choose_template(own: str | None, special_tokens: Mapping[str, str], request: str | None = None) -> ChatTemplate:
    """The training template: the one asked for, the own one if it has markers, else that of the recognised family.

    Args:
      own: the tokenizer's chat template.
      special_tokens: bos_token, eos_token ... as templates read them.
      request: a built-in name or the path of a .jinja file.
    Raises: TemplateError that says what to set.
    """
    variables = dict(special_tokens)
    if request is not None and request.endswith(".jinja"):
        if not Path(request).is_file():
            raise TemplateError(f"no chat template file {request}")
        return _marked(request, Path(request).read_text(encoding="utf-8"), variables)
    if request is not None:
        family = next((family for family in FAMILIES if family.name == request), Family(request, None))
        found = {"default_system": _default_system(own, family, variables)} if own else {}
        return _marked(request, builtin(request), {**variables, **found})
    if own is None:
        raise TemplateError(
            "the tokenizer has no chat template, so conversations have no text; set model.chat_template to one of "
            f"{', '.join(builtin_names())} or to a .jinja file"
        )
    if has_markers(own):
        return _marked("own", own, variables)
    for family in FAMILIES:
        candidate = ChatTemplate(
            family.name,
            builtin(family.name),
            tuple({**variables, "default_system": _default_system(own, family, variables)}.items()),
        )
        if renders_like(candidate, own, history=family.history):
            return candidate
    raise TemplateError(
        "the tokenizer's chat template is of no family known here, and has no {% generation %} markers to say what "
        f"the assistant writes; set model.chat_template to one of {', '.join(builtin_names())}, or to a .jinja file "
        "that puts {% generation %} ... {% endgeneration %} around the assistant's text and its end-of-turn token"
    )


def _marked(name: str, text: str, variables: Mapping[str, Any]) -> ChatTemplate:
    if not has_markers(text):
        raise TemplateError(
            f"the chat template {name} has no {{% generation %}} markers, so the assistant mask would be empty; put "
            "{% generation %} ... {% endgeneration %} around the assistant's text and its end-of-turn token"
        )
    return ChatTemplate(name, text, tuple(variables.items()))


def _default_system(own: str, family: Family, variables: Mapping[str, Any]) -> str | None:
    if family.preamble is None:
        return None
    try:
        text = _render(own, to_template(PROBES[0]), None, False, {**variables, **_PROBE_KWARGS}, name="own").text
    except DataError:
        return None
    bos = re.escape(variables.get("bos_token") or "")
    match = re.match(f"(?:{bos})?{family.preamble}", text, re.DOTALL)
    return match.group(1) if match else None


def renders_like(template: ChatTemplate, own: str, *, history: bool = True) -> bool:
    """Whether a training template and an own template give the same text on the plain probes.

    A probe that the own template refuses (no system turns in Gemma 2) is left out; at least one must count.
    """
    compared = 0
    variables = {**dict(template.variables), **_PROBE_KWARGS}
    variables.pop("default_system", None)
    for probe in PROBES:
        if not history and len(probe) > 3:
            continue
        for prompt in (False, True):
            try:
                expected = _render(own, to_template(probe), None, prompt, variables, name="own").text
            except DataError:
                continue
            try:
                if template.render(probe, add_generation_prompt=prompt).text != expected:
                    return False
            except DataError:
                return False
            compared += 1
    return compared > 0


def check_prefixes(template: ChatTemplate) -> None:
    """Checks that a conversation's text begins with the text of its first turns, and a prompt with its own.

    Otherwise the tokens trained would not be those that the model sees when it writes. Assistant turns must have
    one span each, that begins no earlier than the generation prompt ends and holds the turn's text.

    Raises: TemplateError naming the turn.
    """
    for probe in PROBES + RICH_PROBES:
        calls = any(message.tool_calls for message in probe)
        tools = ({"type": "function", "function": {"name": "now", "parameters": {}}},) if calls else None
        try:
            whole = template.render(probe, tools)
        except DataError as error:
            if probe in PROBES[1:2] + PROBES[3:]:
                raise TemplateError(str(error)) from None
            continue  # a family without system turns, tools or reasoning says so when a row has them
        _check_spans(template.name, probe, whole)
        for k, message in enumerate(probe):
            if message.role != "assistant":
                continue
            start = template.render(probe[:k], tools, add_generation_prompt=True).text
            upto = template.render(probe[: k + 1], tools).text
            if not upto.startswith(start) or not whole.text.startswith(upto):
                raise TemplateError(
                    f"the chat template {template.name} does not preserve prefixes: the text of a conversation of "
                    f"{len(probe)} messages does not begin with the text of its first {k + 1}; turns must not be "
                    "rendered otherwise once others follow"
                )
            index = sum(m.role == "assistant" for m in probe[:k])
            if whole.spans[index][0] < len(start):
                raise TemplateError(f"the chat template {template.name} marks its generation prompt as generated")


def _check_spans(name: str, probe: Sequence[Message], rendered: Rendered) -> None:
    turns = [message for message in probe if message.role == "assistant"]
    if len(rendered.spans) != len(turns) or not all(end > start for start, end in rendered.spans):
        raise TemplateError(
            f"the chat template {name} marks {len(rendered.spans)} generated parts in a conversation of {len(turns)} "
            "assistant turns; put one {% generation %} block around each assistant turn"
        )
    for (start, end), turn in zip(rendered.spans, turns, strict=True):
        if turn.content not in rendered.text[start:end]:
            raise TemplateError(f"the chat template {name} leaves an assistant's text outside of {{% generation %}}")
