"""Debate between several agents of one model (2305.14325), decided by a vote."""

from __future__ import annotations

from collections.abc import Sequence

from jaxpost.search.contract import Search
from jaxpost.search.pieces import adopt, fill, question
from jaxpost.search.requests import Ask, Draw
from jaxpost.search.tree import Node, Problem
from jaxpost.search.vote import elect

DEBATE = (
    "Question:\n{problem}\n\nYour answer so far:\n{own}\n\nAnswers of the others:\n{others}\n\nWeigh them against your "
    "own, correct what is wrong, and write your answer anew."
)


def debate(
    problem: Problem, *, agents: int = 3, rounds: int = 2, answer_tokens: int = 256, prompt: str = DEBATE
) -> Search:
    """Debate (2305.14325): a vote over the last answers of agents who read each other's.

        y_{i,1} ~ p(y | x);   y_{i,r} ~ p(y | x, y_{i,r-1}, {y_{j,r-1}: j != i})   for r = 2 .. rounds
        answer: argmax over a of |{i: canonical(y_{i,rounds}) = a}|, a tie going to the agent of lower number

    Args:
        problem: the prompt.
        agents, rounds: the paper's 3 and 2; the first round is the answers without debate. An agent for whom the
            budget ends keeps its answer.
        answer_tokens: most tokens of each answer.
        prompt: {problem}, {own}, {others}.
    """
    [drawn] = yield Draw([problem.root], n=agents, max_tokens=answer_tokens, note="round 1")
    answers: list[Node] = list(drawn)
    asked = question(problem.prompt)
    for round_ in range(2, rounds + 1 if len(answers) > 1 else 2):
        prompts = [fill(prompt, problem=asked, own=own.answer.strip(), others=_others(answers, own)) for own in answers]
        roots = yield Ask(prompts, note=f"round {round_}")
        replies = yield Draw(roots, max_tokens=answer_tokens, note=f"round {round_}")
        problem.prune(roots)
        answers = [adopt(problem, new[0]) if new else old for old, new in zip(answers, replies, strict=True)]
    return elect(problem, answers)


def _others(answers: Sequence[Node], own: Node) -> str:
    others = [node for node in answers if node is not own]
    return "\n\n".join(f"Agent {i}:\n{node.answer.strip()}" for i, node in enumerate(others, 1))
