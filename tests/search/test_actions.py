"""RAP's rewards and rStar's actions and second pass, by hand."""

from __future__ import annotations

import math
from functools import partial

import pytest

from jaxpost.search.actions import mutual_consistency, rap, rstar
from jaxpost.search.contract import Found
from jaxpost.search.drive import search
from jaxpost.search.requests import Draw, Write
from tests.search.toy import ToyPolicy, says

RAP = {
    "question_piece": "q", "answer_piece": "r", "useful_prompt": "{question}?", "useful_words": ("y", "n"),
    "final": "z", "separator": ";", "step_tokens": 4, "answer_tokens": 8,
}  # fmt: skip
USEFUL = {"a": 0.8, "b": 0.4, "z": 0.9}


def asker(text):
    """Sub-questions a; and b;, answered 1; or 2;, then z; and a last answer that a's way makes right."""
    if text.endswith("?"):
        return {"y": USEFUL[text[-2]], "n": 1 - USEFUL[text[-2]]}
    if text[-1] == "q":
        return {"a": 0.5, "b": 0.5} if "r" not in text else {"z": 1.0}
    if text[-1] in "abz" and "q" in text[-2:]:
        return {";": 1.0}
    if text[-1] == "r":
        return {"1": 1.0} if text[-3] in "az" else {"1": 0.5, "2": 0.5}
    if "z;r" in text:
        return {"$": 1.0}
    return {";": 1.0}


def test_raps_rewards_are_usefulness_and_agreement():
    [out] = search(["c"], partial(rap, simulations=12, branch=6, answers=4, max_depth=3, **RAP), ToyPolicy(asker))
    assert out.error is None
    chosen = [node for node in out.tree.walk() if "reward" in node.facts]
    assert chosen
    for node in chosen:
        question = node.parent.parent
        useful = USEFUL[question.text.strip(";q")]
        draws = [a.text for a in node.parent.children]
        share = max(draws.count(x) for x in draws) / len(draws)
        assert node.facts["useful"] == pytest.approx(useful)
        assert node.facts["confidence"] == share
        assert node.facts["reward"] == pytest.approx(math.sqrt(useful * share))
        if node.visits:
            rewards = [n.facts["reward"] for n in node.path if "reward" in n.facts]
            assert node.score == pytest.approx(sum(rewards) / len(rewards))
    first = {n.parent.parent.text: n for n in chosen if len([m for m in n.path if "reward" in m.facts]) == 1}
    assert first["a;"].prior == pytest.approx(0.8 / 1.2)
    assert first["a;"].visits > first["b;"].visits
    # The vote: whole answers by the sum of their values.
    whole = [n for n in chosen if n.complete and n.visits]
    votes = {}
    for node in whole:
        votes[node.answer.strip()] = votes.get(node.answer.strip(), 0.0) + node.score
    assert out.votes == pytest.approx(votes)
    assert out.answers[0].canonical == max(votes, key=votes.get)


def test_raps_last_question_is_forced_and_answered_to_the_end():
    [out] = search(["c"], partial(rap, simulations=4, branch=4, answers=2, max_depth=1, **RAP), ToyPolicy(asker))
    assert out.answers[0].text == "qz;r1"
    assert out.answers[0].node.complete


def walker(text):
    """Steps of a letter; an answer after three of them."""
    if text[-1] in "ab" and len(text) > 1:
        return {";": 1.0}
    return {"$": 1.0} if text.count(";") >= 3 else {"a": 0.9, "b": 0.1}


PIECES = {"subquestion": "s", "subanswer": "t", "reanswer": "u", "rephrase": "v"}
STEPS = {"separator": ";", "step_tokens": 4, "answer_tokens": 10}


def test_rstars_actions_stand_where_they_may():
    [out] = search(["c"], partial(rstar, simulations=40, branch=2, max_depth=3, pieces=PIECES, **STEPS),
                   ToyPolicy(walker))  # fmt: skip
    notes = {}
    for node in out.tree.walk():
        notes.setdefault(node.note, []).append(node)
    assert {"step", "rest", "subquestion", "subanswer", "reanswer", "rephrase"} <= notes.keys()
    assert all(node.parent.text == "v" and node.parent.parent is out.tree for node in notes["rephrase"])
    assert all(node.parent.text == "u" and node.parent.parent.note == "subanswer" for node in notes["reanswer"])
    assert all(node.parent.text == "t" and node.parent.parent.note == "subquestion" for node in notes["subanswer"])
    assert all(node.end != "step" for node in notes["rest"])
    assert out.answers[0].node.facts["agreed"] in (0.0, 1.0)
    with pytest.raises(ValueError, match="no such action: jump"):
        next(rstar(out.problem, actions=["jump"]))


def test_what_is_answered_is_what_most_say_and_a_second_pass_confirms():
    [out] = search(["c"], partial(rstar, simulations=30, actions=["step", "rest"], checks=3, **STEPS),
                   ToyPolicy(walker))  # fmt: skip
    total = sum(out.votes.values())
    for candidate in out.answers:
        share, agreed = out.votes[candidate.canonical] / total, candidate.node.facts["agreed"]
        assert candidate.score == pytest.approx(share * agreed)
    assert out.answers[0].text == "a;a;a;"


def test_the_second_pass_is_given_a_part_and_never_the_end():
    """Of three lines two are given; a line alone is found anew."""

    def checked(problem):
        [answers] = yield Draw([problem.root], n=1, max_tokens=12)
        [short] = yield Write([problem.root], ["x"])
        agreed = yield from mutual_consistency(problem, [*answers, short], checks=2, given=0.9, answer_tokens=12)
        problem.root.facts["agreed"] = agreed
        return Found.best(answers)

    def lines(text):
        return says(text, "c", "1\n2\n3")

    [out] = search(["c"], checked, ToyPolicy(lines))
    assert out.tree.facts["agreed"] == [1.0, 0.0]
    given = [node for node in out.tree.children if node.note == "given"]
    assert [node.text for node in given] == ["1\n2\n"]
    assert out.problem.ledger.verified == 2 * len("3$") + 2 * len("1\n2\n3$")
