"""A process model that keeps what it read says what it says of whole texts; learned verifiers of whole answers."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.generate.engine import Engine, Weights
from jaxpost.generate.scoring import Scorer
from jaxpost.models import heads
from jaxpost.search.contract import Case, Found
from jaxpost.search.drive import search
from jaxpost.search.learned import LikelihoodVerifier, OutcomeVerifier
from jaxpost.search.process import ProcessVerifier, Written
from jaxpost.search.requests import Draw, Score
from jaxpost.search.tree import Ledger, Node, Problem, aggregate
from tests.generate.toy_lm import PAGE, toy
from tests.search.toy import ToyPolicy, ToyVerifier

STEP, CLOSE = 4, 5


def write(prompt, answer, close=(CLOSE,)):
    """Letters as tokens, steps end in ";" and are scored there; a closing token that the next step does not keep."""
    if not answer:
        raise ValueError("the answer is empty")
    tokens = [0, *("ab".index(x) for x in prompt), 3]
    start, places = len(tokens), []
    for step in filter(None, answer.split(";")):
        tokens += ["ab".index(x) if x in "ab" else 2 for x in step] + [STEP]
        places.append(len(tokens) - 1)
    return Written(np.array([*tokens, *close], np.int32), places, start)


def read(head, hidden):
    return heads.score(head, hidden)


def probability(outputs):
    return 1 / (1 + np.exp(-outputs[:, 0].astype(np.float64)))


@cache
def head():
    return {"kernel": jax.random.normal(jax.random.key(1), (16, 1), jnp.float32)}


@cache
def programs(window):
    return {}


def verifier(window=5, **options):
    model, params = toy(window)
    engine = Engine(model, cache_tokens=1024, page_size=PAGE, prefill_tokens=64, compiled=programs(window))
    engine.least_pages = 16
    options = {"write": write, "how": "min", "scores": probability, "head": head(), "read": read} | options
    return ProcessVerifier(engine, Weights(params, params), **options)


@cache
def scorer(window):
    return Scorer(toy(window)[0], lambda params, hidden: heads.score(params["head"], hidden))


def whole(texts, window=5):
    """Scores of every text read from its start."""
    params = {"policy": toy(window)[1], "head": head()}
    found = scorer(window)(params, [t.tokens for t in texts], [t.places for t in texts])
    return [probability(outputs) for outputs in found]


def tree(prompt, number=0, *, depth=4, width=2):
    """A tree of steps with two children a node."""
    problem = Problem(number, prompt, Node(0, None, (1,), ""), Ledger(), str.strip)
    rng = np.random.default_rng(number)
    level = [problem.root]
    for _ in range(depth):
        texts = ["".join(rng.choice(list("ab$"), rng.integers(1, 5))) + ";" for _ in range(width * len(level))]
        level = [problem.child(level[i // width], (1,), text) for i, text in enumerate(texts)]
    return problem


def by_depth(problems):
    nodes = [(p, n) for p in problems for n in p.root.walk() if n.parent is not None]
    return [[Case(p, n) for p, n in nodes if n.depth == d] for d in range(1, 1 + max(n.depth for _, n in nodes))]


@pytest.mark.parametrize("window", [5, pytest.param(None, marks=pytest.mark.slow)])
def test_scores_are_those_of_whole_texts_and_only_new_steps_are_read(window):
    judge = verifier(window)
    problems = [tree("ab", 0), tree("bbab", 1)]
    spent = 0
    for cases in by_depth(problems):
        priced = sum(judge.price(case, 0) for case in cases) + sum(judge.opening(p) for p in problems)
        verdicts = judge(cases)
        assert sum(v.tokens for v in verdicts) == priced
        spent += priced
        for case, verdict, want in zip(
            cases, verdicts, whole([write(c.problem.prompt, c.node.answer) for c in cases], window), strict=True
        ):
            np.testing.assert_allclose(verdict.steps, want, atol=1e-4)
            assert verdict.score == aggregate(verdict.steps, "min")
            # One new step, its separator, and the closing token once more.
            assert judge.price(case, 0) == 0
    every = [case for cases in by_depth(problems) for case in cases]
    texts = [write(c.problem.prompt, c.node.answer) for c in every]
    exact = sum(write(p.prompt, "x").start for p in problems) + sum(len(c.node.text) + 1 for c in every)
    assert spent == judge.shelf.traffic.read == exact
    assert spent < sum(len(t.tokens) for t in texts) / 2
    if window is None:
        assert judge.shelf.traffic.again == 0
        dense = sum(-(-len(t.tokens) // PAGE) for t in texts)
        assert judge.shelf.pages < dense
    for problem in problems:
        judge.forget(list(problem.root.walk()))
    book = judge.engine.book
    assert book.free == book.full.count - 1
    assert (judge._judged, judge._written, judge._probes) == ({}, {}, {})


def test_all_of_a_tree_at_once_any_order_and_lost_pages_give_the_same():
    judge, lost = verifier(), verifier()
    problem = tree("ab")
    cases = [case for level in by_depth([problem]) for case in level]
    want = judge(cases)
    turned = verifier()(cases[::-1])[::-1]
    parts = []
    for level in by_depth([problem]):
        parts += lost(level)
        lost.shelf.drop(list(lost.shelf._texts))
    for other in (turned, parts):
        for a, b in zip(want, other, strict=True):
            np.testing.assert_allclose(a.steps, b.steps, atol=1e-4)
    assert [v.tokens for v in parts] == [v.tokens for v in want], "what a judgement costs is not the cache's matter"
    assert lost.shelf.traffic.again > judge.shelf.traffic.again


def test_a_layout_that_cannot_be_extended_is_read_again_and_counted():
    def turned(prompt, answer):
        text = write(prompt, answer, close=())
        whole = np.concatenate([[len(text.places)], text.tokens])  # says first how many steps there are
        return Written(whole.astype(np.int32), [p + 1 for p in text.places], text.start + 1)

    judge = verifier(write=turned)
    problem = tree("ab", depth=3, width=1)
    cases = [level[0] for level in by_depth([problem])]
    for case in cases:
        [verdict] = judge([case])
        text = turned("ab", case.node.answer)
        np.testing.assert_allclose(verdict.steps, whole([text])[0], atol=1e-4)
        assert verdict.tokens >= len(text.tokens) - (case is cases[0]) * text.start


def test_what_it_cannot_read_is_a_sentence_beside_the_others():
    judge = verifier()
    problem = tree("ab", depth=1, width=1)
    bad = problem.child(problem.root, (), "")
    good, empty = judge([Case(problem, problem.root.children[0]), Case(problem, bad)])
    assert good.score > 0
    assert "cannot read it: the answer is empty" in empty


@pytest.mark.parametrize("budget", [0, 9, 24, 40, 80, 400])
def test_searches_keep_their_budget(budget):
    table = {"a": 0.5, "b": 0.3, ";": 0.2}

    def steps(problem):
        nodes = [problem.root]
        for _ in range(3):
            drawn = yield Draw(nodes, n=2, max_tokens=6, stop=(";",), scored=True)
            nodes = [node for children in drawn for node in children]
            if not nodes:
                break
            yield Score(nodes)
        return Found.best(nodes)

    judge = verifier()
    outs = search(["ab", "ba"], steps, ToyPolicy(lambda text: table), verifiers={"verifier": judge}, budget=budget)
    for out in outs:
        assert out.problem.ledger.spent <= budget
    scored = [n for out in outs for n in out.tree.walk() if not np.isnan(n.score)]
    assert bool(scored) == (budget >= 9)
    assert judge.engine.book.free == judge.engine.book.full.count - 1


def test_outcome_models_judge_all_prompts_in_one_batch():
    batches = []

    def score(texts):
        batches.append(len(texts))
        return [float(text.count("a")) for text in texts]

    judge = OutcomeVerifier(lambda prompt, answer: (prompt + answer, len(prompt + answer)), score)
    problems = [tree("ab", 0, depth=1), tree("a", 1, depth=1)]
    cases = by_depth(problems)[0]
    verdicts = judge(cases)
    assert batches == [4]
    assert [v.score for v in verdicts] == [float((c.problem.prompt + c.node.answer).count("a")) for c in cases]
    assert [v.tokens for v in verdicts] == [judge.price(c, 0) for c in cases]


def test_likelihood_is_the_mean_probability_of_what_was_drawn():
    root = Node(0, None, (1,), "")
    step = Node(1, root, (2, 3), "ab", logprobs=(np.log(0.5), np.log(0.25)), end="step")
    given = Node(2, step, (9,), "!")
    node = Node(3, given, (2,), "a", logprobs=(np.log(0.125),), end="stop")
    problem = Problem(0, "", root, Ledger(), str.strip)
    [mean, none] = LikelihoodVerifier()([Case(problem, node), Case(problem, root)])
    np.testing.assert_allclose(mean.score, (0.5 * 0.25 * 0.125) ** (1 / 3))
    [product] = LikelihoodVerifier(length_penalty=0)([Case(problem, node)])
    np.testing.assert_allclose(product.score, 0.5 * 0.25 * 0.125)
    assert "nothing" in none
    assert ToyVerifier(len).price(Case(problem, node), 0) == 0
