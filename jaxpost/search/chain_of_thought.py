"""Chain-of-thought templates: prompts that ask for the way to an answer. `template(prompt) -> prompt`.

A template changes a prompt before a search reads it:

    prompts = [zero_shot(prompt) for prompt in prompts]
    search(prompts, method, policy, ...)

so it goes with every method. A prompt is a text or a list of messages, and stays what it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Prompt = str | Sequence[Mapping[str, Any]]


def zero_shot(prompt: Prompt, *, instruction: str = "Let's think step by step.") -> Any:
    """The prompt with an instruction behind it (2205.11916).

    Raises:
        ValueError: messages that do not end with a user's.

    >>> zero_shot("What is 2+2?")
    "What is 2+2?\\n\\nLet's think step by step."
    """
    return _behind(prompt, f"\n\n{instruction}")


def step_format(
    prompt: Prompt,
    *,
    instruction: str = "Solve the problem in short steps, with an empty line between them. End with the final answer "
    "in \\boxed{}.",
) -> Any:
    """The prompt with the request for steps that a search can tell apart, and for one boxed answer.

    The instruction and the search's `separator` must name the same thing; the default goes with "\\n\\n".

    Raises:
        ValueError: messages that do not end with a user's.
    """
    return _behind(prompt, f"\n\n{instruction}")


def few_shot(prompt: Prompt, *, examples: Sequence[tuple[str, str]], question: str = "Q: ", answer: str = "A:") -> Any:
    """Worked examples before the prompt (2201.11903): in a text as "Q: ... A: ...", in messages as turns.

    Args:
        examples: (question, worked answer).
        question, answer: what leads them in a text.

    Raises:
        ValueError: no examples, or messages that do not end with a user's.

    >>> print(few_shot("3+3?", examples=[("2+2?", "2 and 2 are 4. The answer is 4.")]))
    Q: 2+2?
    A: 2 and 2 are 4. The answer is 4.
    <BLANKLINE>
    Q: 3+3?
    A:
    """
    if not examples:
        raise ValueError("few-shot prompting needs examples: give (question, worked answer) pairs")
    if isinstance(prompt, str):
        shown = "".join(f"{question}{asked}\n{answer} {said}\n\n" for asked, said in examples)
        return f"{shown}{question}{prompt}\n{answer}"
    messages = _ending_with_user(prompt)
    turns = [
        {"role": role, "content": text}
        for asked, said in examples
        for role, text in (("user", asked), ("assistant", said))
    ]
    head = next((n for n, message in enumerate(messages) if message["role"] != "system"), len(messages))
    return [*messages[:head], *turns, *messages[head:]]


def _behind(prompt: Prompt, text: str) -> Any:
    if isinstance(prompt, str):
        return prompt + text
    messages = _ending_with_user(prompt)
    return [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + text}]


def _ending_with_user(prompt: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    messages = list(prompt)
    if not messages or messages[-1].get("role") != "user" or not isinstance(messages[-1].get("content"), str):
        raise ValueError("a chain-of-thought template needs messages that end with a user's text")
    return messages
