"""Tree of thoughts: breadth-first against brute force, backtracking, generators and evaluators by their replies."""

from __future__ import annotations

from functools import cache, partial

import numpy as np
import pytest

from jaxpost.search import game24
from jaxpost.search.drive import search
from jaxpost.search.tree_of_thoughts import tree_of_thoughts
from tests.search.toy import ToyPolicy, ToyVerifier, says

STEPS = {"separator": ";", "step_tokens": 4, "answer_tokens": 12}


def table(text):
    """Three steps of one letter each, and an end."""
    if text[-1] in "abc" and len(text) > 1:
        return {";": 1.0}
    return {"$": 1.0} if text.count(";") == 3 else {"a": 0.5, "b": 0.3, "c": 0.2}


@cache
def worth(text):
    return float(np.random.default_rng([ord(x) for x in text] + [2]).random())


def run(table, judge=None, *, prompts=("a",), budget=None, **kwargs):
    policy = ToyPolicy(table)
    verifiers = {"verifier": ToyVerifier(judge)} if judge else {}
    outs = search(list(prompts), partial(tree_of_thoughts, **kwargs), policy, verifiers=verifiers, budget=budget)
    return policy, outs


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_breadth_first_keeps_what_brute_force_keeps(keep):
    _, [out] = run(table, worth, evaluator="verifier", branch=40, keep=keep, **STEPS)
    frontier = [""]
    for _ in range(3):
        frontier = sorted((s + x + ";" for s in frontier for x in "abc"), key=worth, reverse=True)[:keep]
    found = {node.answer for node in out.tree.walk() if node.note == "answer"}
    assert found == set(frontier)
    assert out.answers[0].text == max(frontier, key=worth)


def test_scores_are_backed_up():
    _, [out] = run(table, worth, evaluator="verifier", branch=16, keep=2, **STEPS)
    for node in out.tree.walk():
        judged = [worth(n.answer) for n in node.walk() if n.note == "thought" and n.visits]
        if judged:
            assert node.visits == len(judged)
            assert node.value == pytest.approx(np.mean(judged))


def test_depth_first_goes_back_where_nothing_good_follows():
    """a is the best beginning but leads nowhere; b does, and its state is drawn from again."""
    values = {"a;": 0.9, "b;": 0.8, "c;": 0.1, "b;c;": 0.7, "b;c;a;": 0.6, "b;c;b;": 0.9}
    policy, [out] = run(
        table,
        lambda text: values.get(text, 0.2),
        order="depth",
        evaluator="verifier",
        threshold=0.5,
        branch=16,
        **STEPS,
    )
    assert out.answers[0].text == "b;c;b;"
    assert out.tree.facts["backtracks"] == 1
    assert out.tree.facts["cut_off"] == 1 + 3 + 2 + 1  # c; a;?; b;(a b); b;c;c;
    first = {child.text: child for child in out.tree.children if child.visits}
    assert first["a;"].pruned
    assert not first["b;"].pruned
    assert first["a;"] in policy.forgotten


def test_depth_first_finishes_the_best_it_has_where_nothing_passes():
    _, [out] = run(table, lambda text: 0.1, order="depth", evaluator="verifier", threshold=0.5, branch=3, **STEPS)
    assert out.error is None
    assert out.answers[0].node.complete
    _, [out] = run(table, worth, order="depth", evaluator="verifier", threshold=2.0, branch=3, max_states=2, **STEPS)
    assert out.answers[0].node.complete


PUZZLE = game24.ask([1, 4, 6])


def gamer(text):
    """Lists next steps, a dead end first; judges by the exact solver; states what it has at the end."""
    propose, value = game24.PROPOSE.rpartition("}")[2], game24.VALUE.rpartition("}")[2]
    done = text.count(" (left: ") - text.count("`a + b = c (left: ...)") - 3  # the example's
    if propose in text:
        steps = text.rpartition("Steps so far:\n")[2].partition("\n\n")[0]
        left = game24.read_step(steps.splitlines()[-1]).left if steps else game24.puzzle_of(PUZZLE).numbers
        lines = game24.next_steps(left)
        good = [x for x in lines if game24.reachable(game24.read_step(x).left)]
        bad = [x for x in lines if x not in good]
        return says(text, propose, "\n".join(f"- {line}" for line in bad[:2] + good[:1]))
    if value in text:
        steps = text.rpartition("Steps so far:\n")[2].partition("\n\n")[0]
        fine = game24.reachable(game24.read_step(steps.splitlines()[-1]).left)
        return says(text, value, "Let me see.\n" + ("Sure." if fine else "impossible"))
    return {"$": 1.0} if done else {"4": 1.0}


@pytest.mark.parametrize("order", ["breadth", "depth"])
def test_game_of_24_by_proposals_and_verdicts(order):
    tree = {"propose_prompt": game24.PROPOSE, "value_prompt": game24.VALUE, "read_proposals": game24.proposals}
    _, [out] = run(gamer, prompts=[PUZZLE], order=order, generator="propose", keep=1, branch=3, depth=2,
                        evaluations=2, separator="\n", answer_tokens=2, **tree)  # fmt: skip
    answer = out.answers[0]
    assert game24.judge(game24.puzzle_of(PUZZLE), answer.text, whole=True)[0] == 1.0
    assert out.problem.ledger.verified > 0  # questions and verdicts
    assert out.tree.facts.get("unread_verdicts", 0) == 0
    judged = [n for n in out.tree.walk() if n.note == "thought"]
    for node in judged:
        fine = game24.judge(game24.puzzle_of(PUZZLE), node.answer, whole=False)[0]
        assert node.score == (1.0 if fine else 0.00005)


def voter(reply):
    marker = "form `Best: N`."
    return lambda text: says(text, marker, reply) or table(text)


@pytest.mark.parametrize(("reply", "share"), [("Best: 2", 1.0), ("I say\n**Best: 2.**", 1.0), ("the second", None),
                                              ("Best: 99", None)])  # fmt: skip
def test_votes_are_counted_and_what_is_no_vote_too(reply, share):
    _, [out] = run(voter(reply), evaluator="vote", keep=1, branch=4, depth=1, evaluations=3, **STEPS)
    thoughts = [n for n in out.tree.walk() if n.note == "thought" and (n.visits or not n.pruned)]
    if share is None:
        assert out.tree.facts["unread_verdicts"] == 3
        assert all(np.isnan(n.score) for n in thoughts)
    else:
        assert [n.score for n in thoughts] == [float(i == 1) for i in range(len(thoughts))]
        assert out.answers[0].text.startswith(thoughts[1].text)
    assert out.answers[0].node.complete


def test_a_reply_without_a_proposal_is_counted_and_the_answer_still_comes():
    marker = "and nothing else."
    _, [out] = run(lambda text: says(text, marker, "no idea") or table(text), generator="propose", **STEPS)
    assert out.tree.facts["unread_proposals"] == 1
    assert out.answers[0].node.complete


@pytest.mark.parametrize("order", ["breadth", "depth"])
@pytest.mark.parametrize("evaluator", ["value", "vote"])
def test_budgets_hold_with_prompts_of_its_own(order, evaluator):
    verdict = {"value_prompt": "{steps}?", "vote_prompt": "{choices}?"}

    def judge(text):
        return says(text, "?", "sure") if evaluator == "value" else says(text, "?", "Best: 1")

    for budget in (0, 10, 40, 90, 200):
        _, outs = run(lambda text: judge(text) or table(text), prompts=["a", "b"], budget=budget, order=order,
                      evaluator=evaluator, **verdict, **STEPS)  # fmt: skip
        assert all(out.tokens_spent <= budget for out in outs)
        assert all(out.answers or out.error for out in outs)
