"""Tree search over steps: against a search written anew on the enumerated tree, and what it converges to."""

from __future__ import annotations

import math
from functools import cache, partial

import numpy as np
import pytest

from jaxpost.search.drive import search
from jaxpost.search.mcts import mcts
from tests.search.toy import ToyPolicy, ToyVerifier, texts

STEPS = {"separator": ";", "step_tokens": 4, "answer_tokens": 12}


def table(text):
    """Two or three steps of one letter each; the end after the third, now and then after the second."""
    steps, last = text.count(";"), text[-1]
    if last in "abc" and len(text) > 1:
        return {";": 1.0}
    if steps == 3:
        return {"$": 1.0}
    return {"a": 0.5, "b": 0.3, "$": 0.2} if steps == 2 else {"a": 0.5, "b": 0.3, "c": 0.2}


@cache
def worth(text):
    return float(np.random.default_rng([ord(x) for x in text] + [1]).random())


def run(prompts=("a",), judge=worth, *, table=table, seed=0, budget=None, numbers=None, **kwargs):
    policy, verifier = ToyPolicy(table, seed=seed), ToyVerifier(judge)
    outs = search(list(prompts), partial(mcts, **{**STEPS, **kwargs}), policy, verifiers={"verifier": verifier},
                  budget=budget, numbers=numbers)  # fmt: skip
    return policy, verifier, outs


def key(node):
    return node.answer + ("$" if node.complete else "")


class Anew:
    """The same search on texts, from its definition; the children of a text and their priors are given."""

    def __init__(self, children, *, rule, c, leaves, depth):
        self.children, self.rule, self.c, self.leaves, self.depth = children, rule, c, leaves, depth
        self.n, self.w, self.open, self.lowest = {}, {}, set(), 0.0
        self.waiting = {}

    def pick(self, text):
        n = {c: self.n.get(c, 0) + self.waiting.get(c, 0) for c, _ in self.children[text]}
        total = sum(n.values())

        def rate(child, prior):
            w = self.w.get(child, 0.0) + self.waiting.get(child, 0) * self.lowest
            if self.rule == "puct":
                q = w / n[child] if n[child] else self.w.get(text, 0.0) / max(1, self.n.get(text, 0))
                return q + self.c * prior * math.sqrt(max(1, total)) / (1 + n[child])
            return w / n[child] + self.c * math.sqrt(math.log(total) / n[child]) if n[child] else 1e9 + prior

        return max(self.children[text], key=lambda pair: rate(*pair))[0]

    def ends(self, text):
        return text.endswith("$") or text.count(";") >= self.depth

    def simulate(self, number):
        done = 0
        while done < number:
            paths = []
            for _ in range(min(self.leaves, number - done)):
                path = [""]
                while path[-1] in self.open:
                    path.append(self.pick(path[-1]))
                if any(path[-1] == other[-1] for other in paths):
                    break
                paths.append(path)
                for text in path:
                    self.waiting[text] = self.waiting.get(text, 0) + 1
            for path in paths:
                leaf = path[-1]
                if not self.ends(leaf) and (leaf == "" or self.n.get(leaf)):
                    self.open.add(leaf)
                    path.append(self.pick(leaf))
            for path in paths:
                value = worth(path[-1].removesuffix("$"))
                for text in path:
                    self.n[text] = self.n.get(text, 0) + 1
                    self.w[text] = self.w.get(text, 0.0) + value
            self.waiting = {}
            done += len(paths)


@pytest.mark.parametrize("rule", ["uct", "puct"])
@pytest.mark.parametrize("leaves", [1, 3])
def test_visits_and_values_are_those_of_the_definition(rule, leaves):
    _, _, [out] = run(rule=rule, leaves=leaves, simulations=40, branch=12, max_depth=3, exploration=0.7)
    found = {key(node): node for node in out.tree.walk() if not node.pruned and node.note != "answer"}
    children = {
        text: [(key(child), child.prior) for child in node.children if child.note == "step" and not child.pruned]
        for text, node in found.items()
    }
    for pairs in children.values():
        assert not pairs or math.fsum(prior for _, prior in pairs) == pytest.approx(1.0)
    anew = Anew(children, rule=rule, c=0.7, leaves=leaves, depth=3)
    anew.simulate(40)
    assert {text: node.visits for text, node in found.items() if node.visits} == anew.n
    for text, node in found.items():
        if node.visits:
            assert node.value == pytest.approx(anew.w[text] / anew.n[text])


def hidden(text):
    """Worth seeing only at the end: what the model likes is a trap."""
    return {"a;a;a;": 0.4, "b;b;b;": 1.0}.get(text, 0.2)


def trap(text):
    if text[-1] in "abc" and len(text) > 1:
        return {";": 1.0}
    return {"$": 1.0} if text.count(";") == 3 else {"a": 0.6, "b": 0.4}


def sure(text):
    return {"a": 0.8, "b": 0.2} if trap(text) == {"a": 0.6, "b": 0.4} else trap(text)


@pytest.mark.parametrize("rule", ["uct", "puct"])
def test_visits_converge_to_the_optimal_action(rule):
    best = max(texts(trap, "a", 8), key=hidden)
    shares = []
    for simulations in (10, 120):
        _, _, [out] = run(
            judge=hidden, table=trap, rule=rule, value="rollout", rollouts=1, simulations=simulations, branch=12,
            exploration=1.0, max_depth=4, seed=1,
        )  # fmt: skip
        visits = {child.text: child.visits for child in out.tree.children if child.visits}
        shares.append(visits[best[:2]] / sum(visits.values()))
    assert shares[1] > 0.7
    assert shares[0] < shares[1]
    assert out.answers[0].text == best == "b;b;b;"


def test_greedy_completions_value_a_leaf_by_the_way_that_the_model_goes():
    _, _, [out] = run(judge=hidden, table=trap, value="rollout", rollouts=1, rollout_temperature=0.0, simulations=2,
                      branch=8, rule="uct")  # fmt: skip
    assert {child.text: child.value for child in out.tree.children if child.visits} == {"a;": 0.4, "b;": 0.2}


def test_the_subtree_is_kept_and_nothing_is_judged_twice():
    judged = []

    def judge(text):
        judged.append(text)
        return worth(text)

    _, _, [out] = run(judge=judge, simulations=12, moves=3, branch=12, max_depth=3)
    top, commitments = out.tree, 0
    while "committed" in top.facts:
        steps = [child for child in top.children if child.note == "step"]
        best = next(child for child in steps if child.number == top.facts["committed"])
        assert best.visits == max(child.visits for child in steps)
        assert all(child.pruned for child in steps if child is not best)
        top, commitments = best, commitments + 1
    assert commitments == 2
    assert top.visits > 12  # the visits of the moves before it stay
    assert out.answers[0].text.startswith(top.answer)
    scored = [node for node in out.tree.walk() if not math.isnan(node.score)]
    assert len(judged) == len(scored)


def test_leaves_share_batches_and_prompts_do_too():
    policy, verifier, _ = run(["a", "b", "c"], leaves=4, simulations=16, branch=3)
    single, one, _ = run(["a", "b", "c"], leaves=1, simulations=16, branch=3)
    assert verifier.calls < one.calls / 2
    assert max(n for _, n in policy.calls) > max(n for _, n in single.calls)


def test_the_majority_of_completions_is_a_value_without_a_verifier():
    exact = texts(sure, "a", 8)
    [out] = search(["a"], partial(mcts, value="agreement", rollouts=3, simulations=60, branch=4, **STEPS),
                   ToyPolicy(sure))  # fmt: skip
    assert out.error is None
    assert out.answers[0].text == max(exact, key=exact.get)


@pytest.mark.parametrize("choose", ["visits", "value", "score"])
def test_the_choice(choose):
    _, _, [out] = run(judge=hidden, table=trap, value="rollout", simulations=30, branch=4, choose=choose)
    node = out.answers[0].node
    assert node is not None
    if choose == "score":
        assert out.answers[0].score == max(end.score for end in out.tree.walk() if end.complete)
    else:
        for above in node.path[:-1]:
            steps = [child for child in above.children if child.note == "step" and child.visits]
            on_way = next((child for child in steps if child in node.path), None)
            if on_way is not None:
                measure = "visits" if choose == "visits" else "value"
                assert getattr(on_way, measure) == max(getattr(child, measure) for child in steps)


def test_what_the_verifier_cannot_judge_is_worth_the_least_and_the_search_goes_on():
    verifier = ToyVerifier(worth)
    told = type(verifier).__call__
    verifier.__class__ = type("Sometimes", (ToyVerifier,), {
        "__call__": lambda self, cases: [
            "it holds a c" if case.node.answer == "c;" else verdict
            for case, verdict in zip(cases, told(self, cases), strict=True)
        ],
    })  # fmt: skip
    method = partial(mcts, simulations=24, leaves=3, branch=12, max_depth=3, rule="uct", **STEPS)
    [out] = search(["a"], method, ToyPolicy(table), verifiers={"verifier": verifier})
    assert out.error is None
    assert out.tree.visits == 24
    assert any("it holds a c" in sentence for sentence in out.problem.warnings)
