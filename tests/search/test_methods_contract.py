"""What every method keeps: its budget, its independence of the batch, its answers when things go wrong.

`METHODS` is the list that a new method joins.
"""

from __future__ import annotations

import itertools
from functools import partial

import pytest

from jaxpost.search.actions import PIECES, rap, rstar
from jaxpost.search.best_of_n import best_of_n
from jaxpost.search.debate import debate
from jaxpost.search.drive import search
from jaxpost.search.dvts import dvts
from jaxpost.search.forcing import budget_forcing
from jaxpost.search.mcts import mcts
from jaxpost.search.oreo import oreo
from jaxpost.search.rebase import rebase
from jaxpost.search.refine import self_refine
from jaxpost.search.sampling import greedy, sample
from jaxpost.search.self_consistency import self_consistency
from jaxpost.search.step_beam import step_beam
from jaxpost.search.token_beam import token_beam
from jaxpost.search.token_mcts import token_mcts
from jaxpost.search.tree_of_thoughts import tree_of_thoughts
from tests.search.toy import ToyPolicy, ToyVerifier

STEPS = {"separator": ";", "max_tokens": 6, "max_steps": 6}
THOUGHT = {"separator": ";", "step_tokens": 6, "answer_tokens": 12}
THOUGHTS = {"depth": 3, **THOUGHT}
SHORT = {"feedback_prompt": "{problem}b", "refine_prompt": "{problem}a{feedback}"}
METHODS = {
    "greedy": partial(greedy, max_tokens=12),
    "sample": partial(sample, n=4, max_tokens=12),
    "token_beam": partial(token_beam, beams=3, max_tokens=8),
    "best_of_n": partial(best_of_n, n=4, max_tokens=12),
    "best_of_n_weighted": partial(best_of_n, n=4, max_tokens=12, choose="weighted"),
    "majority": partial(self_consistency, n=6, max_tokens=12),
    "early_stop": partial(self_consistency, n=6, max_tokens=12, early_stop=True, wave=2),
    "score_vote": partial(self_consistency, n=6, max_tokens=12, weights="score"),
    "confident": partial(
        self_consistency, n=6, max_tokens=12, weights="confidence", measure="bottom", window=2, keep=0.5
    ),
    "step_beam": partial(step_beam, width=4, factor=2, **STEPS),
    "lookahead": partial(step_beam, width=4, factor=2, lookahead=2, **STEPS),
    "dvts": partial(dvts, width=4, factor=2, **STEPS),
    "rebase": partial(rebase, width=4, **STEPS),
    "oreo": partial(oreo, beams=2, expand=2, likelihood=0.1, **STEPS),
    "oreo_tokens": partial(oreo, unit="token", beams=2, expand=3, max_tokens=8),
    "breadth_first": partial(tree_of_thoughts, evaluator="verifier", branch=3, keep=2, **THOUGHTS),
    "depth_first": partial(
        tree_of_thoughts, order="depth", evaluator="verifier", branch=3, threshold=0.3, max_states=9, **THOUGHTS
    ),
    "mcts": partial(mcts, simulations=6, branch=3, max_depth=4, **THOUGHT),
    "mcts_moves": partial(
        mcts, simulations=4, moves=3, leaves=2, rule="uct", branch=3, max_depth=4, choose="value", **THOUGHT
    ),
    "mcts_rollouts": partial(mcts, simulations=5, branch=2, value="rollout", rollouts=2, **THOUGHT),
    "mcts_agreement": partial(mcts, simulations=5, branch=2, value="agreement", rollouts=2, **THOUGHT),
    "rap": partial(
        rap, simulations=3, branch=2, answers=2, max_depth=2, final="ab", question_piece="a{t}", answer_piece="b{t}",
        useful_prompt="{question}a", useful_words=("a", "b"), **THOUGHT
    ),
    "rstar": partial(rstar, simulations=4, max_depth=3, pieces=dict.fromkeys(PIECES, ""), **THOUGHT),
    "token_mcts": partial(token_mcts, simulations=4, best=3, considered=2, search_tokens=3, answer_tokens=8),
    "self_refine": partial(self_refine, rounds=2, keep="best", answer_tokens=8, feedback_tokens=6, **SHORT),
    "debate": partial(debate, answer_tokens=8, prompt="{problem}a{own}"),
    "budget_forcing": partial(budget_forcing, marker=";", max_thinking=12, waits=1, wait="b", max_tokens=6),
}  # fmt: skip
SEPARATED = ("breadth_first", "depth_first", "mcts", "mcts_moves", "mcts_rollouts", "mcts_agreement", "rap", "rstar")
ASIDE = ("rap", "rstar", "self_refine", "debate")
"""They draw from prompts of their own, or for a second pass, so that what is paid is not all in the tree."""
STEPWISE = ("step_beam", "lookahead", "dvts", "rebase", "oreo")
TREES = ("breadth", "depth", "mcts_moves", "mcts_rollouts", "token_mcts", "self_refine")
SCORED = tuple(name for name in METHODS if name.startswith(("best", "score", *STEPWISE, *TREES)))


def letters(text):
    """Steps of a few letters; an answer of about three steps."""
    return {"a": 0.35, "b": 0.25, ";": 0.25, "$": 0.15}


def run(name, prompts, *, table=letters, judge=lambda text: text.count("a") / (1 + len(text)), price=1, **known):
    verifiers = {"verifier": ToyVerifier(judge, price=price)}
    return search(prompts, METHODS[name], ToyPolicy(table, seed=3), verifiers=verifiers, **known)


def shape(output):
    """All that a search found and made, without the floats of the policy."""
    return (
        [(c.text, c.canonical, round(c.score, 9) if c.score == c.score else None) for c in output.answers],
        [(n.number, n.text, n.end, n.note) for n in output.tree.walk()],
        output.tokens_spent,
        output.error,
    )


@pytest.mark.parametrize("name", METHODS)
def test_the_result_depends_on_the_prompts_number_alone(name):
    together = run(name, ["a", "b", "ab"], together=2)
    for number, prompt in ((2, "ab"), (0, "a")):
        [alone] = run(name, [prompt], numbers=[number])
        assert shape(alone) == shape(together[number])
    assert shape(run(name, ["a"])[0]) != shape(run(name, ["a"], numbers=[5])[0]) or name in (
        "greedy", "token_beam", "oreo_tokens",
    )  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("budget", [0, 1, 2, 5, 9, 14, 30, 100])
def test_no_budget_is_exceeded_and_every_end_has_an_answer_or_a_sentence(name, budget):
    for price in (0, 1, 3):
        outputs = run(name, ["a", "b"], price=price, budget=[budget, None])
        assert outputs[0].tokens_spent <= budget
        ledger = outputs[0].problem.ledger
        assert ledger.spent == ledger.generated + ledger.verified
        assert outputs[0].error or any(c.node.complete for c in outputs[0].answers) or outputs[0].answers
        assert not outputs[1].error or not any(c.node.complete for c in outputs[1].answers)
        assert outputs[1].answers  # one prompt's poverty is not the other's


@pytest.mark.parametrize("name", METHODS)
def test_nothing_generated_is_unpaid(name):
    [output] = run(name, ["a"], price=0)
    drawn = [n for n in output.tree.walk() if n.logprobs and n.note != "the end was refused"]
    paid = sum(len(n.tokens) for n in drawn)
    if name in ASIDE:
        drawn += [n for root in output.problem.asides for n in root.walk() if n.logprobs]
        ledger = output.problem.ledger
        read = sum(len(root.tokens) for root in output.problem.asides if root.note == "useful") + 2 * sum(
            root.note == "useful" for root in output.problem.asides
        )
        assert ledger.spent == sum(len(n.tokens) for n in drawn) + read
    elif name in (
        "token_beam",
        "oreo_tokens",
        "token_mcts",
    ):  # a rank is paid as one token a beam, what is pushed is free
        assert 0 < output.problem.ledger.generated <= paid + (name == "token_mcts")  # which ranks the prompt too
    else:
        assert output.problem.ledger.generated == paid


@pytest.mark.parametrize("name", SCORED)
def test_a_score_of_nan_is_a_sentence_and_the_other_prompts_go_on(name):
    calls = itertools.count()

    def judge(text):
        return float("nan") if next(calls) == 0 else 0.5

    outputs = run(name, ["a", "b"], judge=judge)
    assert sum("it said NaN" in (output.error or "") for output in outputs) == 1
    assert any(output.answers and not output.error for output in outputs)


@pytest.mark.parametrize("name", [*STEPWISE, *SEPARATED])
@pytest.mark.parametrize("table", [lambda text: {"a": 0.7, "$": 0.3}, lambda text: {"a": 0.5, "b": 0.5}])
def test_a_separator_that_never_appears_is_a_sentence(name, table):
    [output] = run(name, ["a"], table=table)
    assert any("';' never appeared" in sentence for sentence in output.problem.warnings)
    assert output.answers
    assert not any("never appeared" in w for w in run(name, ["a"])[0].problem.warnings)


@pytest.mark.parametrize("name", METHODS)
def test_an_answer_that_ends_at_once_is_one(name):
    [output] = run(name, ["a"], table=lambda text: {"$": 1.0})
    assert output.error is None
    assert {c.text for c in output.answers} == {""} or name == "budget_forcing"


@pytest.mark.parametrize("name", METHODS)
def test_what_is_left_behind_is_let_go(name):
    """At the end, and on the way: no branch that died is held while others go on."""
    held = set()
    policy = ToyPolicy(letters, seed=3)
    draw, forget = policy.draw, policy.forget
    policy.draw = lambda jobs: (held.update(id(job.node) for job in jobs), draw(jobs))[1]
    policy.forget = lambda nodes: (held.difference_update(map(id, nodes)), forget(nodes))[1]
    verifiers = {"verifier": ToyVerifier(lambda text: 0.5)}
    [output] = search(["a"], METHODS[name], policy, verifiers=verifiers)
    assert not held
    if name in STEPWISE:
        # A node that is held leads to another that is, or is where the search stopped (rollouts aside).
        for node in output.tree.walk():
            grown = [child for child in node.children if child.note != "lookahead"]
            assert node is output.tree or node.pruned or not grown or not all(child.pruned for child in grown)
