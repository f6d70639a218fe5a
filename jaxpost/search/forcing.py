"""Budget forcing: thinking that is made longer by "Wait" and ended by force."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from jaxpost.search.contract import Candidate, Found, Search
from jaxpost.search.requests import Draw, Request, Write
from jaxpost.search.tree import Node, Problem


def budget_forcing(
    problem: Problem,
    *,
    marker: str = "</think>",
    max_thinking: int = 512,
    waits: int = 1,
    wait: str = "Wait",
    answer_prefix: str = "",
    max_tokens: int = 256,
) -> Search:
    """Thinking of a chosen length, then the answer (s1, 2501.19393).

    The policy thinks until it writes `marker` or ends. The first `waits` times that it does so before `max_thinking`
    tokens, its end is taken away and `wait` is written in that place, and it thinks on. At `max_thinking` tokens, and
    at the end of thinking otherwise, `marker` stands there: written by force where the policy did not write it.
    Then the answer follows. A policy that ends its answer without the marker once no wait is left has answered.

    Args:
        marker: text that ends thinking.
        max_thinking: most thinking tokens in all, those of `wait` not counted.
        waits: how often an end is refused (0: thinking is only bounded).
        answer_prefix: written behind a forced marker, such as "Final Answer:".
        max_tokens: of the answer.

    Example:
      >>> from jaxpost.search.tree import Ledger, Node, Problem
      >>> request = next(budget_forcing(Problem(0, "2+2=", Node(0, None, (1,), ""), Ledger(), str.strip)))
      >>> request.max_tokens, request.stop
      (512, ('</think>',))
    """
    at, used, refused = problem.root, 0, 0
    thought: Node | None = None
    while used < max_thinking:
        [drawn] = yield Draw([at], max_tokens=max_thinking - used, stop=(marker,), note="thinking")
        if not drawn:
            return _found(thought)
        thought = drawn[0]
        used += len(thought.tokens)
        if thought.end == "length" or refused == waits or used >= max_thinking:
            break
        refused += 1
        at = yield from _without_end(problem, thought, marker)
        [at] = yield Write([at], [wait], note="wait")
    if thought is None or thought.complete:
        return _found(thought)
    if thought.end == "length":
        [thought] = yield Write([thought], [marker + answer_prefix], note="forced end of thinking")
    [answers] = yield Draw([thought], max_tokens=max_tokens, note="answer")
    return _found(answers[0] if answers else thought)


def _without_end(problem: Problem, node: Node, marker: str) -> Generator[Request, Any, Node]:
    """A node that stands for the same text without the marker, or without the token that ended the answer.

    Tokens are kept as they were drawn; only where the marker's own tokens do not stand at the end (they merged with
    the text before them) is the rest of the piece written anew.
    """
    assert node.parent is not None
    note = "the end was refused"
    problem.prune([node])
    if node.complete:
        known = {"logprobs": node.logprobs[:-1], "best": node.best[:-1]}
        return problem.child(node.parent, node.tokens[:-1], node.text, **known, note=note)
    text = node.text[: node.text.rindex(marker)]
    [probe] = yield Write([node.parent], [marker])
    node.parent.children.remove(probe)
    size = len(probe.tokens)
    if node.tokens[len(node.tokens) - size :] == probe.tokens and node.text == text + marker:
        kept = node.tokens[:-size]
        known = {"logprobs": node.logprobs[: len(kept)], "best": node.best[: len(kept)]}
        return problem.child(node.parent, kept, text, **known, note=note)
    [kept_node] = yield Write([node.parent], [text], note=note)
    return kept_node


def _found(node: Node | None) -> Found:
    return Found(() if node is None else (Candidate(node.answer, node.logprob, node),))
