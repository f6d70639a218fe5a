"""Self-refine and debate: what is asked of whom, and what is answered."""

from __future__ import annotations

from functools import partial

import pytest

from jaxpost.search.debate import debate
from jaxpost.search.drive import search
from jaxpost.search.refine import self_refine
from tests.search.toy import ToyPolicy, ToyVerifier, says

PROMPTS = {
    "feedback_prompt": "{problem} {answer}?",
    "refine_prompt": "{problem} {answer} {feedback}!".replace("!", "="),
}


def student(text):
    """Draft 1; each refinement adds one; from 3 on the answer is found right, though 4 would be better."""
    if "?" in text:
        answer = text.partition("?")[0].split(" ")[-1]
        return says(text, "?", "Fine.\nno mistakes" if int(answer) >= 3 else "Too small.")
    if "=" in text:
        return says(text, "=", str(int(text.split(" ")[1]) + 1))
    return says(text, "c", "1")


@pytest.mark.parametrize(("rounds", "answer"), [(0, "1"), (1, "2"), (2, "3"), (5, "3")])
def test_it_refines_until_the_feedback_is_content(rounds, answer):
    [out] = search(["c"], partial(self_refine, rounds=rounds, **PROMPTS), ToyPolicy(student))
    assert out.answers[0].text == answer
    assert out.answers[0].node.parent is out.tree  # an answer to the question itself
    assert {c.text for c in out.answers} == {str(i) for i in range(1, int(answer) + 1)}
    asked = [root.facts["prompt"] for root in out.problem.asides]
    assert asked[:2] == ["c 1?", "c 1 Too small.="][: len(asked)]
    assert out.tree.facts.get("said_to_be_right", 0) == (rounds > 2)


def test_the_best_of_them_by_a_verifier():
    [out] = search(["c"], partial(self_refine, keep="best", **PROMPTS), ToyPolicy(student),
                   verifiers={"verifier": ToyVerifier(lambda text: -abs(int(text) - 2))})  # fmt: skip
    assert out.answers[0].text == "2"
    assert out.answers[0].score == 0


def crowd(text):
    """Agents say 1 or 2; who reads that more others say 2 than 1 says 2, the rest stay."""
    if "=" in text:
        own, others = text[1], [line for line in text.partition("=")[0].splitlines() if line in ("1", "2")]
        return says(text, "=", "2" if others.count("2") > others.count("1") else own)
    return {"1": 0.5, "2": 0.5} if text == "c" else {"$": 1.0}


def test_a_debate_is_decided_by_the_last_rounds_vote():
    flips = 0
    for number in range(12):
        method = partial(debate, agents=3, rounds=2, prompt="{problem}{own}\n{others}\n=")
        [out] = search(["c"], method, ToyPolicy(crowd), numbers=[number])
        first = [node.text for node in out.tree.children if node.note == "round 1"]
        last = ["2" if (first[:i] + first[i + 1 :]).count("2") == 2 else own for i, own in enumerate(first)]
        votes = {x: float(last.count(x)) for x in dict.fromkeys(last)}
        assert out.votes == votes
        assert out.answers[0].text == max(votes, key=votes.get)
        assert len(out.problem.asides) == 3
        flips += first != last
    assert flips


def test_one_round_is_a_vote_and_one_agent_has_nobody_to_hear():
    [out] = search(["c"], partial(debate, rounds=1), ToyPolicy(crowd))
    assert not out.problem.asides
    [out] = search(["c"], partial(debate, agents=1, rounds=4), ToyPolicy(crowd))
    assert not out.problem.asides
    assert len(out.answers) == 1


def test_agents_whom_the_budget_leaves_out_keep_their_answers():
    [out] = search(["c"], partial(debate, answer_tokens=4, prompt="{problem}{own}\n{others}\n="), ToyPolicy(crowd),
                   budget=8)  # fmt: skip
    assert out.tokens_spent <= 8
    assert sum(out.votes.values()) == 3
