"""Self-refine (2303.17651): the model criticises its own answer and writes a better one."""

from __future__ import annotations

from typing import Literal

from jaxpost.search.contract import Search
from jaxpost.search.pieces import adopt, chosen_first, count, fill, last_line, question
from jaxpost.search.requests import Ask, Draw, Score
from jaxpost.search.tree import Problem

FEEDBACK = (
    "Question:\n{problem}\n\nAnswer:\n{answer}\n\nGo through the answer step by step. Name each mistake and say how to "
    "put it right. If there is none, end with one line: No mistakes."
)
REFINE = (
    "Question:\n{problem}\n\nAn earlier answer:\n{answer}\n\nWhat is wrong with it:\n{feedback}\n\nWrite the corrected "
    "answer."
)


def self_refine(
    problem: Problem,
    *,
    rounds: int = 3,
    keep: Literal["last", "best"] = "last",
    answer_tokens: int = 256,
    feedback_tokens: int = 256,
    feedback_prompt: str = FEEDBACK,
    refine_prompt: str = REFINE,
    stop: str = "No mistakes",
) -> Search:
    """Self-refine (2303.17651): y_0 ~ p(y | x); f_t ~ p(f | x, y_t); y_{t+1} ~ p(y | x, y_t, f_t).

    Ends when the last line of f_t is `stop`, or after `rounds` refinements. The answer is the last one, or of all the
    one that the verifier scores highest (`keep="best"`, which needs a verifier). Answers y_1 .. stand below the root
    like y_0, so that they are judged as answers to the question alone.

    Args:
        problem: the prompt.
        rounds: most refinements; 0 is the draft alone.
        keep: "last" asks no verifier.
        answer_tokens, feedback_tokens: most tokens of each.
        feedback_prompt: {problem}, {answer}. refine_prompt: {problem}, {answer}, {feedback}.
        stop: what the feedback's last line says of an answer without faults; letters' case and a full stop are free.
    """
    scored = keep == "best"
    [answers] = yield Draw([problem.root], max_tokens=answer_tokens, scored=scored, note="draft")
    answers = list(answers)
    asked = question(problem.prompt)
    for _ in range(rounds if answers else 0):
        text = answers[-1].answer
        [root] = yield Ask([fill(feedback_prompt, problem=asked, answer=text)], note="feedback")
        [feedback] = yield Draw([root], max_tokens=feedback_tokens, note="feedback")
        if not feedback:
            break
        said = feedback[0].text
        if last_line(said).lower() == last_line(stop).lower():
            count(problem, "said_to_be_right")
            break
        [again] = yield Ask([fill(refine_prompt, problem=asked, answer=text, feedback=said.strip())], note="refine")
        [drawn] = yield Draw([again], max_tokens=answer_tokens, scored=scored, note="refined")
        problem.prune([root, again])
        if not drawn:
            break
        answers.append(adopt(problem, drawn[0]))
        count(problem, "rounds")
    if scored and answers:
        yield Score(answers)
        return chosen_first(None, answers)
    whole = [answer for answer in answers if answer.complete]
    return chosen_first((whole or answers or [None])[-1], answers)
