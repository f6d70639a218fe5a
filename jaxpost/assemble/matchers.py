"""What an answer must keep to, as automata for the sampler: a shape, a budget of thinking, or both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

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


def unsatisfiable(
    pretrained: Pretrained, shapes: Mapping[int, grammar.Constraint], numbers: Iterable[int]
) -> dict[int, str]:
    """Why shapes of prompts' own cannot be kept to, by the prompt's number; of `numbers` alone."""
    faults = {}
    for number in (i for i in numbers if i in shapes):
        try:
            _compiled(pretrained, shapes[number])
        except ValueError as error:
            faults[number] = f'"sampling": {error}'
    return faults


def make_matchers(
    pretrained: Pretrained,
    prompts: Sequence[Sequence[int]],
    shapes: Sequence[grammar.Constraint | None],
    thinking: Mapping[str, int] | None,
) -> Sequence[Callable[[], Matcher] | None] | None:
    """What makes each prompt's automaton, None of an answer that is free; None where all are.

    Args:
      prompts: token ids.
      shapes: of what follows each prompt's thinking.
      thinking: as `thinking_budget`.

    Raises:
      ValueError: a shape that no text matches, or a budget that contradicts itself.
    """
    starts = [None if shape is None else _compiled(pretrained, shape).start for shape in shapes]
    if thinking:
        budget = thinking_budget(pretrained.tokenizer, thinking)
        ways = zip(prompts, starts, strict=True)
        return [partial(start_thinking, pretrained, budget, prompt, start) for prompt, start in ways]
    return starts if any(start is not None for start in starts) else None


def _compiled(pretrained: Pretrained, shape: grammar.Constraint) -> grammar.Automaton:
    return grammar.compile(shape, pretrained.tokenizer, vocab_size=pretrained.config.vocab_size)
