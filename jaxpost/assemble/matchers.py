"""What an answer must keep to, as automata for the sampler: a shape, a budget of thinking, or both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from jaxpost.assemble.model import Pretrained
from jaxpost.generate import grammar
from jaxpost.generate.matcher import Matcher
from jaxpost.generate.thinking import ThinkingBudget, ThinkingMatcher
from jaxpost.text.tokenizer import Tokenizer


def thinking_budget(tokenizer: Tokenizer, thinking: Mapping[str, int]) -> ThinkingBudget:
    """The budget of tokens between <think> and </think>, which are written if the model does not.

    Args:
      thinking: "min" and "max" tokens; "waits": how many ends that come before "min" become "Wait".

    Raises:
      ValueError: a budget that contradicts itself.
    """
    least, waits = thinking.get("min", 0), thinking.get("waits", 0)
    if waits and not least:
        raise ValueError(f"waits={waits} take the place of ends that come too early: say the fewest tokens of thinking")
    return ThinkingBudget(
        end=tokenizer.encode("</think>"),
        begin=tokenizer.encode("<think>"),
        min_tokens=least,
        max_tokens=thinking.get("max"),
        wait=tokenizer.encode("Wait") if waits else (),
        max_waits=waits,
    )


def start_thinking(
    pretrained: Pretrained, budget: ThinkingBudget, prompt: Sequence[int], then: Callable[[], Matcher] | None = None
) -> ThinkingMatcher:
    """The automaton of one answer that thinks; what `then` makes follows the thinking."""
    return budget.start(
        prompt,
        vocab_size=pretrained.config.vocab_size,
        end_ids=pretrained.tokenizer.eos_ids,
        then=None if then is None else then(),
    )


def make_matchers(
    pretrained: Pretrained,
    prompts: Sequence[Sequence[int]],
    shape: Mapping[str, Any] | None,
    thinking: Mapping[str, int] | None,
) -> Sequence[Callable[[], Matcher]] | None:
    """What makes each prompt's automaton; None where answers are free.

    Args:
      prompts: token ids.
      shape: `grammar.Constraint`'s regex, choice or json; of what follows the thinking.
      thinking: as `thinking_budget`.
    """
    start = None
    if shape:
        constraint = grammar.Constraint(**shape)
        start = grammar.compile(constraint, pretrained.tokenizer, vocab_size=pretrained.config.vocab_size).start
    if thinking:
        budget = thinking_budget(pretrained.tokenizer, thinking)
        return [partial(start_thinking, pretrained, budget, prompt, start) for prompt in prompts]
    return None if start is None else [start] * len(prompts)
