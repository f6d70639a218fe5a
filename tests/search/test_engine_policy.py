"""The engine as a policy: what it draws, ranks and scores equals reading whole texts, whatever its cache holds."""

from functools import cache

import numpy as np
import pytest

from jaxpost.generate.params import SamplingParams
from jaxpost.generate.sampler import make_sampler
from jaxpost.search.contract import Case, Found, Job
from jaxpost.search.drive import search, stream
from jaxpost.search.judge import Judge
from jaxpost.search.policy import EnginePolicy
from jaxpost.search.requests import Draw, Likelihood, Push, Rank, Write
from jaxpost.search.tree import Ledger, Node, Problem
from tests.generate.toy_lm import EOS, PAGE, learner_logits, log_softmax, toy

LETTERS = "abcdef"
PROMPTS = ["abc", "e", "afcbdd", "ccccccccb"]


def encode(text):
    return [LETTERS.index(letter) for letter in text]


def decode(tokens):
    return "".join(LETTERS[t] for t in tokens if t != EOS)


@cache
def compiled(window):
    """One sampler's programs for all tests."""
    return make(window, rows=8)


def make(window, **settings):
    options = {"eos_ids": (EOS,), "context": 120, "page_size": PAGE, "prefill_tokens": 16, "max_steps": 8,
               "cache_tokens": 1024}  # fmt: skip
    sampler = make_sampler(toy(window)[0], encode=encode, decode=decode, **(options | settings))
    sampler._least_pages = 32  # one width of all tables: fewer programs
    return sampler


def policy(window=5, *, seed=3, **settings):
    sampler = make(window, **settings) if settings else compiled(window)
    if settings:
        sampler._compiled = compiled(window)._compiled
    return EnginePolicy(sampler, toy(window)[1], render=encode, seed=seed)


def free(made):
    books = made.sampler.engine.books
    return all(book.free == book.full.count - 1 for book in books)


def grow(problem, *, rounds=3, width=3, keep=2):
    """Draws steps that end in "b" or "d", goes on from some; ranks, pushes, writes and scores on the way."""
    nodes = [problem.root]
    scored = []
    for _ in range(rounds):
        drawn = yield Draw(nodes, n=width, max_tokens=7, stop=("b", "d"))
        nodes = [child for children in drawn for child in children if not child.complete][-keep:]
        if not nodes:
            break
        ranked = yield Rank(nodes, best=3)
        pushed = yield Push(nodes, [r[0][1] for r in ranked], [r[1][1] for r in ranked])
        open_ = [node for node in pushed if not node.complete]
        written = yield Write(open_, ["fa"] * len(open_))
        likely = yield Likelihood(written, ["ace"] * len(written))
        scored += [(nodes, ranked), (written, likely)]
        problem.prune([child for children in drawn for child in children if child not in nodes])
        nodes = written or nodes
    problem.root.facts["scored"] = scored
    return Found.best([node for node in problem.root.walk() if not node.children])


def told(outputs):
    return [[(n.number, n.tokens, n.text, n.end) for n in out.tree.walk()] for out in outputs]


def check(root, window):
    """Every number of a tree against the learner's forward pass over whole texts."""
    count = 0
    for node in root.walk():
        if node.parent is None:
            continue
        logp = log_softmax(learner_logits(node.all_tokens, window))
        start = len(node.all_tokens) - len(node.tokens)
        want = [logp[start + i - 1, t] for i, t in enumerate(node.tokens)]
        if node.logprobs:
            np.testing.assert_allclose(node.logprobs, want, atol=1e-4)
            assert node.text == decode(node.tokens)
            count += 1
    for nodes, found in root.facts["scored"]:
        for node, one in zip(nodes, found, strict=True):
            whole = node.all_tokens
            if len(one) == 2:
                logp = log_softmax(learner_logits(whole, window)[-1])
                best = np.argsort(-logp)[:3]
                assert list(one[0]) == best.tolist()
                np.testing.assert_allclose(one[1], logp[best], atol=1e-4)
            else:
                logp = log_softmax(learner_logits(whole + encode("ace"), window))
                want = [logp[len(whole) - 1 + i, t] for i, t in enumerate(encode("ace"))]
                np.testing.assert_allclose(one, want, atol=1e-4)
    return count


def test_a_judge_charges_what_it_reads_and_says_what_reading_whole_questions_says():
    def letter(text):
        return [ord(x) % 6 for x in text]

    found = {}
    for shared in (True, False):
        made = policy()
        made._encode = made.render = letter
        judge = Judge(made, mode="likelihood")
        judge._question = lambda problem, answer: f"abc{problem.prompt}ace{answer}dd"
        if not shared:
            judge._head = lambda problem: Node(0, None, (), "")
        problems = [Problem(n, p, Node(0, None, tuple(letter(p)), ""), Ledger(), str.strip) for n, p in enumerate("ab")]
        cases = [Case(p, p.child(p.root, letter(x), x, end="stop")) for p in problems for x in ("ab", "fee", "ab")]
        priced = sum(judge.price(c, 0) for c in cases) + sum(judge.opening(p) for p in problems)
        verdicts = [*judge(cases[:2]), *judge(cases[2:])]
        spent = sum(v.tokens for v in verdicts)
        assert spent == priced == made.shelf.traffic.read + len(cases) * 7, "7: the words yes and no"
        judge.forget([node for p in problems for node in p.root.walk()])
        assert len(made.shelf) == 0
        found[shared] = [v.score for v in verdicts], spent
    np.testing.assert_allclose(found[True][0], found[False][0], atol=1e-4)
    assert found[False][1] - found[True][1] == (6 - 2) * 7, "3 + 1 + 3 tokens are shared"


def test_the_most_probable_tokens_of_every_place_are_the_models_own():
    """Under softmax(logits), whatever the temperature; asking changes no token."""

    def heated(problem, best):
        [drawn] = yield Draw([problem.root], 2, 9, ("b",), sampling={"temperature": 0.5}, top_logprobs=best)
        return Found.best(drawn)

    plain, asked = (search(PROMPTS[:2], lambda p, n=n: heated(p, n), policy()) for n in (0, 3))
    assert told(plain) == told(asked)
    for out in asked:
        for node in out.tree.children:
            logp = log_softmax(learner_logits(node.all_tokens, 5))[len(out.tree.tokens) - 1 : -1]
            np.testing.assert_allclose(node.best, -np.sort(-logp, axis=1)[:, :3], atol=1e-4)
            np.testing.assert_allclose(node.logprobs, logp[range(len(node.tokens)), node.tokens], atol=1e-4)
    assert all(node.best == () for out in plain for node in out.tree.children)


@pytest.mark.parametrize("window", [5, pytest.param(None, marks=pytest.mark.slow)])
def test_trees_equal_reading_every_text_from_the_start(window):
    made = policy(window)
    found = search(PROMPTS, grow, made)
    assert [out.error for out in found if out.error and "no answer" not in out.error] == []
    assert sum(check(out.tree, window) for out in found) > 20
    traffic = made.shelf.traffic
    assert (traffic.again, traffic.evicted) == (0, 0)
    assert len(made.shelf) == 0
    assert free(made), "every page came back"


def test_a_small_cache_other_neighbours_and_few_rows_change_nothing():
    want = told(search(PROMPTS, grow, policy()))
    alone = [search([p], grow, policy(), numbers=[i])[0] for i, p in enumerate(PROMPTS)]
    tight, few = policy(), policy(rows=2)
    pools = [tight.sampler.engine.book.full, tight.sampler.engine.book.windowed]
    taken = [pool.take(pool.free - 14) for pool in pools]
    assert told(alone) == want
    assert told(search(PROMPTS, grow, tight)) == want
    for pool, pages in zip(pools, taken, strict=True):
        pool.give_back(pages)
    assert told(search(PROMPTS, grow, few, together=1)) == want
    assert tight.shelf.traffic.evicted > 0
    assert tight.shelf.traffic.again > 0
    assert free(tight)
    assert told(search(PROMPTS, grow, policy(seed=4))) != want


def test_forks_share_pages_and_only_what_is_new_is_read():
    made = policy()
    root = Node(0, None, tuple(encode("abcdef" * 6)), "")
    jobs = [Job(root, 3, (), {}, 0, i + 1) for i in range(8)]
    drawn = made.draw(jobs)
    dense = sum(-(-(len(root.tokens) + len(d.tokens)) // PAGE) for d in drawn)
    # The prompt's pages once, and two for every child: the copy of the prompt's last, and what it wrote itself.
    assert made.shelf.pages <= 36 // PAGE + 8 * 2 < dense / 2
    assert made.shelf.traffic.read == len(root.tokens)
    children = [Node(i + 1, root, d.tokens, d.text, d.logprobs, d.end) for i, d in enumerate(drawn)]
    going = [child for child in children if child.end == "length"]
    assert going
    made.draw([Job(child, 3, (), {}, 0, 20 + i) for i, child in enumerate(going)])
    assert made.shelf.traffic.again == 0
    assert made.shelf.traffic.read == len(root.tokens)
    made.forget([root, *children, *[Node(20 + i, child, (), "") for i, child in enumerate(going)]])
    assert free(made)


def test_a_step_ends_at_the_token_that_completes_the_separator_and_later_ones_cost_no_token_too_many():
    made = policy()
    root = Node(0, None, tuple(encode("abc")), "")
    for first in (1, 40):
        drawn = made.draw([Job(root, 30, ("b",), {}, 0, first + i) for i in range(16)])
        for one in drawn:
            assert one.text.count("b") == (one.end == "step")
            assert one.end != "step" or one.text.endswith("b")
    [halts] = made._room.halts.values()
    assert halts.tolist() == [1 << LETTERS.index("b")]
    made.shelf.drop(list(made.shelf._texts))
    assert free(made)


def test_the_answers_own_stop_strings_end_it():
    sampler = compiled(5)
    made = EnginePolicy(sampler, toy(5)[1], render=encode, sampling=SamplingParams(stop=("b",), temperature=1.5))
    drawn = made.draw([Job(Node(0, None, (1, 2), ""), 20, ("d",), {}, 0, i) for i in range(20)])
    ends = {one.end for one in drawn}
    assert {"stop", "step"} <= ends
    assert all("b" not in one.text for one in drawn)
    made.shelf.drop(list(made.shelf._texts))
    assert free(made)


def test_greedy_steps_are_the_greedy_answer():
    def steps(problem):
        node = problem.root
        for _ in range(8):
            [[node]] = yield Draw([node], max_tokens=5, stop=("b",), sampling={"temperature": 0})
            if node.complete:
                break
        return Found.best([node])

    made = policy()
    [whole] = made.sampler(toy(5)[1], [encode("afc")], SamplingParams(temperature=0, max_tokens=40))
    [out] = search(["afc"], steps, made)
    tokens = [t for node in out.answers[0].node.path for t in node.tokens]
    assert tokens == list(whole.tokens[: len(tokens)])


def test_pages_come_back_after_an_error_and_an_early_close(monkeypatch):
    made = policy()
    running = stream(PROMPTS[:2] + PROMPTS, grow, made, together=2)
    next(running)
    running.close()
    assert free(made)
    calls = []

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return extend(*args, **kwargs)

    extend = made.sampler.engine.extend
    monkeypatch.setattr(made.sampler.engine, "extend", fail)
    with pytest.raises(KeyboardInterrupt):
        search(PROMPTS, grow, made)
    assert free(made)


def test_what_cannot_be_drawn_is_a_sentence_and_the_others_go_on():
    def once(problem):
        [answers] = yield Draw([problem.root], n=2, max_tokens=200, sampling={"temperature": 1.0})
        return Found.best(answers)

    outs = search(["abc", "", "a" * 119, "b" * 500], once, policy())
    assert "is empty" in outs[1].error
    assert outs[2].error is None
    assert len(outs[2].answers[0].node.tokens) == 1  # as far as the context goes
    assert "context of 120" in outs[3].error
    assert outs[0].error is None
    bad = lambda problem: (yield Draw([problem.root], sampling={"temperatur": 1}))  # noqa: E731
    assert "the nearest name is 'temperature'" in search(["a"], bad, policy())[0].error


def test_letters_of_several_tokens_come_when_they_are_whole():
    letters = {0: b"\xc3", 1: b"\xa9", 2: b"a"}
    made = EnginePolicy(compiled(5), toy(5)[1], render=encode)
    made._decode = lambda tokens: b"".join(letters.get(t, b"") for t in tokens).decode(errors="replace")
    problem = Problem(0, "", Node(0, None, (2,), ""), Ledger(), str.strip)
    first = problem.child(problem.root, (2, 0), made._text(problem.root, (2, 0)))
    assert first.text == "a"
    assert made._text(first, (1, 2)) == "éa"
