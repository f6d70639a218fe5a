"""Conversations with tools: the policy calls a tool by <name>input</name>, reads its answer, and goes on."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxpost.envs.contract import Codec, Step
from jaxpost.envs.tools import Described, Tool, failed

Reward = Callable[[Mapping[str, Any], str], float]
"""reward(example, the last turn's text)."""


class ToolEnv:
    """An episode: a question, turns that call tools, and a last turn that calls none.

    The first complete call of a turn is answered by a message <result>...</result>, which is encoded once and appended;
    the policy's own tokens stay as they were drawn. In a tool's answer nothing is taken for a special token: what a
    program prints cannot begin a turn of its own.

    Args:
      codec: the tokenizer.
      tools: with different names.
      reward: of the last turn; None leaves it to whoever reads the episodes (reward 0).
      max_calls: a turn with a further call is answered by none: the episode ends there, with the reward of that turn.
      max_result: characters of a tool's answer; its middle is left out.
      system: the system turn; None describes the tools, "" leaves it out.
      prompt_key: example[prompt_key] is the question, or a list of messages.
      role: who tells results; "tool" where the chat template has such turns.

    Raises:
      ValueError: two tools of one name, a name that is no identifier, or a tokenizer without end of turn.
    """

    def __init__(
        self,
        codec: Codec,
        tools: Sequence[Tool],
        *,
        reward: Reward | None = None,
        max_calls: int = 4,
        max_result: int = 2000,
        system: str | None = None,
        prompt_key: str = "prompt",
        role: str = "user",
    ):
        names = [tool.name for tool in tools]
        if len(set(names)) < len(names) or not all(name.isidentifier() for name in names):
            raise ValueError(f"tools need different names that are identifiers, not {names}")
        if codec.end_of_turn_id is None:
            raise ValueError("a conversation with tools needs a tokenizer whose chat template ends its turns")
        self.codec, self.tools, self.reward = codec, {tool.name: tool for tool in tools}, reward
        self.max_calls, self.max_result, self.prompt_key, self.role = max_calls, max_result, prompt_key, role
        self.system = describe(tools) if system is None else system
        self._opening = re.compile(rf"<({'|'.join(map(re.escape, names)) or '(?!)'})>")
        self.example: Mapping[str, Any] = {}
        self.calls = self.errors = 0
        self.cut = False
        """The last turn called a tool once too often."""

    def reset(self, example: Mapping[str, Any]) -> tuple[int, ...]:
        prompt = example.get(self.prompt_key)
        if not prompt:
            raise ValueError(
                f"an environment needs {self.prompt_key!r} in each example; this one has {sorted(example)}"
            )
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if self.system:
            messages = [{"role": "system", "content": self.system}, *messages]
        self.begin(example)
        return tuple(self.codec.encode(self.codec.render_spans(messages, add_generation_prompt=True).text))

    def begin(self, example: Mapping[str, Any]) -> None:
        """Another episode, whose prompt the caller knows."""
        self.example, self.calls, self.errors, self.cut = example, 0, 0, False

    def step(self, tokens: Sequence[int]) -> Step:
        text = self.codec.decode(tokens)
        call = self._first_call(text)
        if call is None or self.calls >= self.max_calls:
            self.cut = call is not None
            return Step((), 0.0 if self.reward is None else float(self.reward(self.example, text)), True)
        self.calls += 1
        result = self.tools[call[0]](call[1])
        self.errors += failed(result)
        return Step(self._reply(result, tokens), 0.0, False)

    def _first_call(self, text: str) -> tuple[str, str] | None:
        """The name and input of the first complete call; in linear time, however many calls are begun."""
        unclosed: set[str] = set()
        for opening in self._opening.finditer(text):
            if (name := opening[1]) not in unclosed:
                if (end := text.find(f"</{name}>", opening.end())) >= 0:
                    return name, text[opening.end() : end]
                unclosed.add(name)
        return None

    def _reply(self, result: str, tokens: Sequence[int]) -> tuple[int, ...]:
        """The tokens between the policy's turn and its next one."""
        if len(result) > self.max_result:
            half = self.max_result // 2
            result = f"{result[:half]} ... {result[len(result) - half :]}"
        if self.codec.holds_special(result):
            result = "error: the result holds special tokens and cannot be shown"
        # How a template goes on after an assistant's turn does not depend on what that turn said.
        said = [
            {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"},
            {"role": self.role, "content": f"<result>\n{result}\n</result>"},
        ]  # fmt: skip
        rendered = self.codec.render_spans(said, add_generation_prompt=True)
        reply = self.codec.encode(rendered.text[rendered.spans[0][1] :])
        end = self.codec.end_of_turn_id
        ended = bool(tokens) and tokens[-1] == end
        return tuple(reply) if ended or end is None else (end, *reply)


def describe(tools: Sequence[Described]) -> str:
    """A system turn that says how tools are called; "" without tools."""
    if not tools:
        return ""
    return (
        "You can use tools. Write a call, then end your turn; the result comes in <result> tags.\n"
        + listed(tools)
        + "\nWhen you know the answer, give it in a turn without a call."
    )


def listed(tools: Sequence[Described]) -> str:
    """A line for each tool: how it is called and what it does."""
    return "\n".join(f"<{tool.name}>...</{tool.name}>: {tool.description}" for tool in tools)
